"""A decoder grows by some of its layers, and shrinks back to its size (S02, Control LLM, 2501.10979).

``concat`` gives a layer a twin, a copy with a merger (:mod:`puna.model.twins`); ``stack`` inserts the copy
behind it with output projections of zero, so that it adds nothing yet; ``hybrid`` does the two in turn, stack
first. The layers are the last ones of equal groups. At the start the logits are those of the base to the bit;
those of ``prog`` are if its map has no noise.

Back to the base's size a layer and its twin become one: by a line between their weights where the merger is
``lerp``, along the arc between each two rows otherwise (a norm is one row), at the twin's share of the
outputs: that of the merger's constant, or the mean of those seen on text. The merged layer is a third one,
not the expanded one in another form; the map of ``proj`` and ``prog`` is lost.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from puna.core.errors import PunaError, unknown_name
from puna.core.seeds import torch_generator
from puna.model.llama import Llama
from puna.model.spec import BlockSpec, LlamaSpec, MergerKind
from puna.model.twins import expanded_layers, spherical, watched

Kind = Literal["concat", "stack", "hybrid"]
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_OUTPUTS = ("self_attn.o_proj", "self_attn.linear_attn", "mlp.down_proj", "mlp.linear_mlp")


@dataclasses.dataclass(frozen=True)
class Plan:
    """The spec of an expanded decoder; ``sources`` says of which layer of the base each of its layers is.

    ``twins`` and ``inserted`` are numbers of its own layers.
    """

    spec: LlamaSpec
    sources: tuple[int, ...]
    twins: tuple[int, ...]
    inserted: tuple[int, ...]


def last_of_groups(layers: int, count: int) -> tuple[int, ...]:
    """The last layer of each of ``count`` equal groups of ``layers``."""
    if not 1 <= count <= layers or layers % count:
        fitting = [number for number in range(1, layers + 1) if layers % number == 0]
        raise PunaError(
            "layers are expanded evenly: their number divides the model's",
            where="layers",
            found=f"{count} of {layers}",
            expected=f"one of {', '.join(map(str, fitting))}",
        )
    return tuple(range(layers // count - 1, layers, layers // count))


def plan(spec: LlamaSpec, chosen: Sequence[int], merger: MergerKind, kind: Kind = "concat") -> Plan:
    """What becomes of a decoder whose layers ``chosen`` are expanded; a spec alone is enough to tell."""
    if kind not in get_args(Kind):
        raise unknown_name("kind of expansion", kind, get_args(Kind))
    spec.refuse_twins("an expansion")
    beyond = [layer for layer in chosen if not 0 <= layer < len(spec.blocks)]
    if beyond:
        raise PunaError(
            "a layer to expand is not one of the model's",
            where="layers",
            found=beyond,
            expected=f"numbers from 0 to {len(spec.blocks) - 1}",
        )
    turn = {"concat": ("concat",), "stack": ("stack",), "hybrid": ("stack", "concat")}[kind]
    how = {layer: turn[place % len(turn)] for place, layer in enumerate(chosen)}
    blocks: list[BlockSpec] = []
    sources, twins, inserted = list[int](), list[int](), list[int]()
    for layer, block in enumerate(spec.blocks):
        if how.get(layer) == "concat":
            twins.append(len(blocks))
            block = dataclasses.replace(block, merger=merger)
        blocks.append(block)
        sources.append(layer)
        if how.get(layer) == "stack":
            inserted.append(len(blocks))
            blocks.append(block)
            sources.append(layer)
    grown = spec.replace(blocks=tuple(blocks))
    return Plan(grown, tuple(sources), tuple(twins), tuple(inserted))


@torch.no_grad()
def expand(model: Llama, planned: Plan, *, seed: int, noise: float = 0.01) -> Llama:
    """The expanded decoder, on the CPU; all weights are copies but those that do not lie in layers.

    Gates and the noise of maps are drawn by ``seed`` and the layer.
    """
    if model.adapter is not None:
        raise PunaError("layers cannot be expanded under an adapter", fix="merge the adapter first")
    source = model.state_dict()
    grown = Llama(planned.spec, dtype=model.dtype, device="meta")
    weights: dict[str, Tensor] = {}
    for name, parameter in grown.named_parameters():
        if ".merger." in name:
            weights[name] = torch.empty(parameter.shape, dtype=model.dtype)
            continue
        match = _LAYER.match(name)
        if match is None:
            weights[name] = source[name]
            continue
        layer, rest = int(match[1]), name[match.end() :].removeprefix("twin.")
        weights[name] = source[f"model.layers.{planned.sources[layer]}.{rest}"].clone()
        if layer in planned.inserted and rest.startswith(_OUTPUTS):
            weights[name].zero_()
    grown.load_state_dict(weights, strict=True, assign=True)
    for block in expanded_layers(grown):
        block.merger.begin(torch_generator(seed, "merger", block.layer), noise)
    grown.tokenizer, grown.template, grown.source = model.tokenizer, model.template, model.source
    return grown.train(model.training)


@torch.no_grad()
def learnt_shares(model: Llama) -> dict[int, float]:
    """The twin's share by layer as the merger's constant has it: sigmoid of it."""
    return {block.layer: float(torch.sigmoid(block.merger.bias.float())) for block in expanded_layers(model)}


def first_tokens(model: Llama, texts: Iterable[str], tokens: int) -> list[list[int]]:
    """Token ids of the first texts, up to so many in all; the last one is cut."""
    if model.tokenizer is None:
        raise PunaError("the model has no tokenizer", where=model.source, fix="put tokenizer.json beside it")
    found: list[list[int]] = []
    for text in texts:
        if tokens <= 0:
            break
        ids = model.tokenizer.encode(text)[: min(tokens, model.spec.max_positions)]
        tokens -= len(ids)
        if ids:
            found.append(ids)
    return found


@torch.no_grad()
def seen_shares(model: Llama, texts: Sequence[Sequence[int]]) -> dict[int, float]:
    """The mean of the twin's share over all tokens of ``texts`` (token ids), by layer."""
    sums = {block.layer: 0.0 for block in expanded_layers(model)}
    tokens = 0
    for ids in texts:
        with watched(model) as seen:
            model.hidden(torch.tensor([list(ids)], device=model.device))
        tokens += len(ids)
        for each in seen:
            sums[each.layer] += float(each.share.double().mean()) * len(ids)
    if not tokens:
        raise PunaError("there is no text to see the twins' shares on", expected="at least one token")
    return {layer: total / tokens for layer, total in sums.items()}


@torch.no_grad()
def merge_back(
    model: Llama, shares: Mapping[int, float], method: Literal["own", "lerp", "slerp"] = "own"
) -> Llama:
    """A decoder of the base's shape, each layer made of itself and its twin at the twin's share of it.

    ``own`` takes the line for layers merged by ``lerp``, the arc for all others.
    """
    expanded = {block.layer: block for block in expanded_layers(model)}
    if not expanded:
        raise PunaError("there is no twin to put back", where=model.source, expected="an expanded model")
    spec = model.spec.replace(merger=None)
    weights: dict[str, Tensor] = {}
    source = model.state_dict()
    for name in Llama(spec, device="meta").state_dict():
        match = _LAYER.match(name)
        layer = None if match is None else int(match[1])
        if match is None or layer not in expanded:
            weights[name] = source[name]
            continue
        other = source[f"{match[0]}twin.{name[match.end() :]}"]
        own = "lerp" if expanded[layer].merger.kind == "lerp" else "slerp"
        share = shares[layer]
        mix = torch.lerp if (own if method == "own" else method) == "lerp" else spherical
        wide = (source[name].float(), other.float(), torch.tensor([share]))
        weights[name] = mix(*wide).to(other.dtype)
    merged = Llama(spec, dtype=model.dtype, device="meta")
    merged.load_state_dict(weights, strict=True, assign=True)
    merged.tokenizer, merged.template, merged.source = model.tokenizer, model.template, model.source
    return merged.train(model.training)
