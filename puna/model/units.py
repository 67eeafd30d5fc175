"""What can be taken out of a decoder, and all that hangs together with it.

The only place that knows which rows and columns belong to a key-value head and its queries, to a channel
of a feed-forward, to a dimension of the hidden states, or to a block; which matrices are tied; and what a
norm needs when its width shrinks. Everything that prunes, masks, searches or trains a smaller copy goes
through here, and through :mod:`puna.model.slicing`, which takes units out, masks them and puts them back.

Units: ``head_group``, a key-value head with the query heads that read it (one query head in multi-head
attention, all of them in multi-query attention); ``channel``, a row of gate and up and a column of down;
``hidden``, a dimension of the residual stream through all layers, embedding and head; ``block``, a layer.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from puna.core.errors import PunaError, unknown_name
from puna.model.sizes import cache_bytes, step_operations
from puna.model.spec import BlockSpec, LlamaSpec

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["head_group", "channel", "hidden", "block"]
KINDS: tuple[Kind, ...] = get_args(Kind)
WHOLE = -1
"""The layer of a hidden dimension, which goes through all of them."""

_LAYER = "model.layers."
_SERIES = "mlp.act_fn."
_HALVES: dict[Kind, tuple[str, str]] = {
    "head_group": ("self_attn.", "input_layernorm."),
    "channel": ("mlp.", "post_attention_layernorm."),
}


@dataclass(frozen=True, order=True)
class Unit:
    """One unit: its kind, its layer (:data:`WHOLE` for a hidden dimension) and its number in there."""

    kind: Kind
    layer: int
    index: int = 0


@dataclass(frozen=True)
class Member:
    """A tensor in which unit ``i`` of some kind owns the entries from ``i * span`` of ``dimension``."""

    name: str
    dimension: int
    span: int


def number_of(spec: LlamaSpec, kind: Kind, layer: int) -> int:
    """How many units of a kind a layer has: of ``hidden`` the decoder's, of ``block`` one."""
    _check_kind(kind)
    if kind == "hidden":
        return spec.hidden_size
    block = spec.blocks[layer]
    return {"head_group": block.kv_heads, "channel": block.width, "block": 1}[kind]


def layers_of(spec: LlamaSpec, kind: Kind) -> Sequence[int]:
    """The layers that units of a kind are counted in."""
    return (WHOLE,) if kind == "hidden" else range(len(spec.blocks))


def members(spec: LlamaSpec, kind: Kind, layer: int) -> tuple[Member, ...]:
    """The tensors, by transformers' names, that hold the units of a kind in a layer; not for blocks."""
    _check_kind(kind)
    spec.refuse_twins("the division of a decoder into units")
    if kind == "hidden":
        return tuple(_stream(spec))
    block, at = spec.blocks[layer], f"{_LAYER}{layer}."
    found: list[Member] = []
    if kind == "head_group" and block.attention == "full":
        queries, keys = block.heads // block.kv_heads * block.head_dim, block.head_dim
        for name, span in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            found.append(Member(f"{at}self_attn.{name}.weight", 0, span))
            if spec.attention_bias != "none":
                found.append(Member(f"{at}self_attn.{name}.bias", 0, span))
        found.append(Member(f"{at}self_attn.o_proj.weight", 1, queries))
    elif kind == "channel" and block.feed_forward == "swiglu":
        for name in ("gate_proj", "up_proj"):
            found.append(Member(f"{at}mlp.{name}.weight", 0, 1))
            if spec.mlp_bias:
                found.append(Member(f"{at}mlp.{name}.bias", 0, 1))
        found.append(Member(f"{at}mlp.down_proj.weight", 1, 1))
        if block.series:
            found += [Member(f"{at}{_SERIES}{name}", 0, block.series) for name in ("weight", "bias")]
    return tuple(found)


def _stream(spec: LlamaSpec) -> Iterator[Member]:
    """The tensors with a side on the residual stream."""
    yield Member("model.embed_tokens.weight", 1, 1)
    for layer, block in enumerate(spec.blocks):
        at = f"{_LAYER}{layer}."
        if block.attention == "full":
            yield Member(f"{at}input_layernorm.weight", 0, 1)
            for name in ("q_proj", "k_proj", "v_proj"):
                yield Member(f"{at}self_attn.{name}.weight", 1, 1)
            yield Member(f"{at}self_attn.o_proj.weight", 0, 1)
            if block.shortcut:
                yield Member(f"{at}self_attn.squeeze_proj.weight", 1, 1)
                yield Member(f"{at}self_attn.expand_proj.weight", 0, 1)
            if spec.attention_bias == "all":
                yield Member(f"{at}self_attn.o_proj.bias", 0, 1)
        elif block.attention == "linear":
            yield Member(f"{at}input_layernorm.weight", 0, 1)
            yield from _square(f"{at}self_attn.linear_attn", spec.attention_bias != "none")
        if block.feed_forward == "swiglu":
            yield Member(f"{at}post_attention_layernorm.weight", 0, 1)
            for name in ("gate_proj", "up_proj"):
                yield Member(f"{at}mlp.{name}.weight", 1, 1)
            yield Member(f"{at}mlp.down_proj.weight", 0, 1)
            if spec.mlp_bias:
                yield Member(f"{at}mlp.down_proj.bias", 0, 1)
        elif block.feed_forward == "linear":
            yield Member(f"{at}post_attention_layernorm.weight", 0, 1)
            yield from _square(f"{at}mlp.linear_mlp", spec.mlp_bias)
    yield Member("model.norm.weight", 0, 1)
    if not spec.tied:
        yield Member("lm_head.weight", 1, 1)


def _square(name: str, biased: bool) -> Iterator[Member]:
    """A linear half, which reads the stream and writes it."""
    yield Member(f"{name}.weight", 0, 1)
    yield Member(f"{name}.weight", 1, 1)
    if biased:
        yield Member(f"{name}.bias", 0, 1)


def sum_over_units(spec: LlamaSpec, kind: Kind, layer: int, entries: Mapping[str, Tensor]) -> Tensor:
    """Sums of ``entries``, tensors of the parameters' shapes by name, over what each unit owns.

    Returns float32 [units]. Of a block everything with its name counts.
    """
    if kind == "block":
        own = [tensor for name, tensor in entries.items() if name.startswith(f"{_LAYER}{layer}.")]
        return sum((tensor.float().sum() for tensor in own), start=_zero(own)).view(1)
    parts = [_by_entry(member, entries[member.name].float()) for member in members(spec, kind, layer)]
    spans = [member.span for member in members(spec, kind, layer)]
    return sum(
        (part.view(-1, span).sum(1) for part, span in zip(parts, spans, strict=True)),
        start=_zero(parts).expand(number_of(spec, kind, layer)),
    )


def _by_entry(member: Member, entries: Tensor) -> Tensor:
    """Sums over all other dimensions than the member's, [size of that dimension]."""
    if entries.dim() == 1:
        return entries
    sums = entries.movedim(member.dimension, 0).flatten(1).sum(1)
    # Of a square matrix the unit's row and its column have one entry in common.
    return sums - entries.diagonal() if member.dimension == 1 and _is_square(member) else sums


def _is_square(member: Member) -> bool:
    """Whether the tensor, a linear half's, has both of its sides on the stream."""
    return member.name.endswith(("linear_attn.weight", "linear_mlp.weight"))


def _zero(like: Sequence[Tensor]) -> Tensor:
    import torch

    return torch.zeros((), device=like[0].device if like else None)


@dataclass(frozen=True)
class Kept:
    """What stays of a decoder: by layer the head groups and channels, the hidden dimensions, the blocks.

    Numbers are those of the whole decoder and rise; of a block that is not kept the rest says nothing.
    """

    head_groups: tuple[tuple[int, ...], ...]
    channels: tuple[tuple[int, ...], ...]
    hidden: tuple[int, ...]
    blocks: tuple[int, ...]

    @classmethod
    def everything(cls, spec: LlamaSpec) -> Kept:
        """All units of a decoder."""
        spec.refuse_twins("the division of a decoder into units")
        return cls(
            tuple(tuple(range(block.kv_heads)) for block in spec.blocks),
            tuple(tuple(range(block.width)) for block in spec.blocks),
            tuple(range(spec.hidden_size)),
            tuple(range(len(spec.blocks))),
        )

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Kept:
        """What :func:`dataclasses.asdict` made, read back."""
        nested = [tuple(tuple(layer) for layer in value[name]) for name in ("head_groups", "channels")]
        return cls(nested[0], nested[1], tuple(value["hidden"]), tuple(value["blocks"]))

    def of(self, kind: Kind, layer: int) -> tuple[int, ...]:
        """The numbers of a kind that are kept in a layer."""
        if kind == "hidden":
            return self.hidden
        if kind == "block":
            return (0,) if layer in self.blocks else ()
        return (self.head_groups if kind == "head_group" else self.channels)[layer]

    def without(self, units: Iterable[Unit]) -> Kept:
        """The same less these units."""
        gone: dict[tuple[Kind, int], set[int]] = {}
        for unit in units:
            gone.setdefault((unit.kind, unit.layer), set()).add(unit.index)

        def left(kind: Kind, layer: int, numbers: tuple[int, ...]) -> tuple[int, ...]:
            taken = gone.get((kind, layer), set())
            return tuple(number for number in numbers if number not in taken) if taken else numbers

        return Kept(
            tuple(left("head_group", layer, numbers) for layer, numbers in enumerate(self.head_groups)),
            tuple(left("channel", layer, numbers) for layer, numbers in enumerate(self.channels)),
            left("hidden", WHOLE, self.hidden),
            tuple(block for block in self.blocks if ("block", block) not in gone),
        )

    def then(self, later: Kept) -> Kept:
        """What is left of the whole decoder if ``later`` is kept of the one that this leaves."""
        groups, channels = list(self.head_groups), list(self.channels)
        for place, layer in enumerate(self.blocks):
            groups[layer] = tuple(groups[layer][number] for number in later.head_groups[place])
            channels[layer] = tuple(channels[layer][number] for number in later.channels[place])
        hidden = tuple(self.hidden[number] for number in later.hidden)
        return Kept(
            tuple(groups), tuple(channels), hidden, tuple(self.blocks[place] for place in later.blocks)
        )

    def check(self, spec: LlamaSpec) -> None:
        """Refuse what is not part of a decoder of ``spec``, or leaves none."""
        spec.refuse_twins("the division of a decoder into units")
        if len(self.head_groups) != len(spec.blocks) or len(self.channels) != len(spec.blocks):
            raise PunaError(
                "the units were chosen for another decoder",
                found=f"units of {len(self.head_groups)} layers",
                expected=f"{len(spec.blocks)} layers",
            )
        _check_numbers("blocks", self.blocks, len(spec.blocks), empty=False)
        _check_numbers("hidden", self.hidden, spec.hidden_size, empty=False)
        for layer, block in enumerate(spec.blocks):
            stays = spec.attention_bias == "all" or block.shortcut > 0
            adds = {"head_groups": stays, "channels": spec.mlp_bias}
            for name, total in (("head_groups", block.kv_heads), ("channels", block.width)):
                numbers = getattr(self, name)[layer]
                _check_numbers(f"{name} of layer {layer}", numbers, total, empty=True)
                if total and not numbers and adds[name]:
                    raise PunaError(
                        "a half with a bias on its output, or a shortcut, adds without its units too",
                        where=f"layer {layer}",
                        found=f"no {name} kept",
                        expected="at least one",
                    )


def _check_numbers(where: str, numbers: tuple[int, ...], total: int, *, empty: bool) -> None:
    rising = all(later > earlier for earlier, later in itertools.pairwise(numbers))
    inside = not numbers or (numbers[0] >= 0 and numbers[-1] < total)
    if not rising or not inside or not (numbers or empty):
        raise PunaError(
            "units to keep are rising numbers of those that are there",
            where=where,
            found="none" if not numbers else f"{len(numbers)} numbers from {numbers[0]} to {numbers[-1]}",
            expected=f"numbers from 0 to {total - 1}" + ("" if empty else ", at least one"),
        )


def sliced_spec(spec: LlamaSpec, kept: Kept) -> LlamaSpec:
    """The spec of what is left. A half without units is "none"; a thinner stream has a smaller epsilon."""
    kept.check(spec)
    blocks = tuple(
        _sliced_block(spec.blocks[layer], len(kept.head_groups[layer]), len(kept.channels[layer]))
        for layer in kept.blocks
    )
    share = len(kept.hidden) / spec.hidden_size
    return spec.replace(blocks=blocks, hidden_size=len(kept.hidden), norm_eps=spec.norm_eps / share)


def _sliced_block(block: BlockSpec, groups: int, channels: int) -> BlockSpec:
    changes: dict[str, Any] = {}
    if block.attention == "full":
        each = block.heads // block.kv_heads
        changes = {"heads": groups * each, "kv_heads": groups} if groups else {"attention": "none"}
    if block.feed_forward == "swiglu":
        changes |= {"width": channels} if channels else {"feed_forward": "none"}
    return dataclasses.replace(block, **changes)


def name_when_sliced(spec: LlamaSpec, name: str, kept: Kept) -> str | None:
    """The name that a tensor has in the small decoder, if it is there; ``spec`` is the whole one's."""
    if not name.startswith(_LAYER):
        return name
    number, _, rest = name.removeprefix(_LAYER).partition(".")
    layer = int(number)
    if layer not in kept.blocks:
        return None
    for kind, starts in _HALVES.items():
        # A half that never had units of the kind, a linear one, does not go with them.
        if rest.startswith(starts) and number_of(spec, kind, layer) and not kept.of(kind, layer):
            return None
    return f"{_LAYER}{kept.blocks.index(layer)}.{rest}"


@dataclass(frozen=True)
class Counts:
    """What a decoder costs: weights, bytes of the keys of a token, operations of a decoding step."""

    parameters: int
    block_parameters: int
    """Those of the layers alone, without embedding, final norm and head."""
    cache_bytes: int
    """Of keys and values of one token, in bfloat16."""
    step_operations: float
    """Floating-point operations of one token at the context that was asked for."""


def count(spec: LlamaSpec, kept: Kept | None = None, *, context: int = 512) -> Counts:
    """Costs of a decoder, or of what is kept of it; ``context`` is in tokens."""
    left = spec if kept is None else sliced_spec(spec, kept)
    return Counts(
        left.parameter_count(), block_parameters(left), cache_bytes(left), step_operations(left, context)
    )


def block_parameters(spec: LlamaSpec) -> int:
    """Weights of the layers alone."""
    return sum(
        block.parameter_count(spec.hidden_size, spec.attention_bias, spec.mlp_bias) for block in spec.blocks
    )


def unit_parameters(spec: LlamaSpec, kind: Kind, layer: int) -> int:
    """Weights that one unit of a kind owns in a layer; 0 where there is none."""
    if kind == "block":
        return spec.blocks[layer].parameter_count(spec.hidden_size, spec.attention_bias, spec.mlp_bias)
    if not number_of(spec, kind, layer):
        return 0
    shapes = parameter_shapes(spec) if kind == "hidden" else {}
    total = 0
    for member in members(spec, kind, layer):
        if kind == "hidden":
            total += math.prod(shapes[member.name]) // shapes[member.name][member.dimension]
            # Of a square matrix the unit's row and its column have one entry in common.
            total -= member.dimension == 1 and _is_square(member)
        else:
            vector = member.name.endswith(".bias") or _SERIES in member.name
            total += member.span * (1 if vector else spec.hidden_size)
    return total


def parameter_shapes(spec: LlamaSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of a decoder of ``spec``."""
    from puna.model.llama import Llama

    return {name: tuple(weight.shape) for name, weight in Llama(spec, device="meta").named_parameters()}


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise unknown_name("kind of unit", kind, KINDS)
