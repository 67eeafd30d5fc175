"""Units taken out of a decoder, masked, and put back; what belongs together, :mod:`puna.model.units` says.

:func:`sliced` gives a smaller decoder, :func:`soft_mask` multiplies what units give by factors, and
:func:`scatter_back` puts weights of the small decoder at their places in the whole one. A decoder masked
with zeros and one with the same units sliced away give the same logits.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from puna.core.errors import PunaError, unknown_name
from puna.model.llama import Llama
from puna.model.spec import LlamaSpec
from puna.model.units import (
    Kept,
    layers_of,
    members,
    name_when_sliced,
    number_of,
    parameter_shapes,
    sliced_spec,
)

if TYPE_CHECKING:
    from puna.model.llama import Block


_WRITERS = ("o_proj", "expand_proj", "linear_attn")  # of attention halves


@dataclass(frozen=True)
class _Cut:
    """Of one tensor: its name when sliced, the entries kept by dimension, the factor of a norm."""

    name: str
    entries: dict[int, Tensor] = field(default_factory=dict)
    factor: float = 1.0


def _cuts(spec: LlamaSpec, kept: Kept, names: Iterable[str]) -> dict[str, _Cut]:
    """How each of the named tensors is cut; those that are not kept at all are left out."""
    kept.check(spec)
    entries: dict[str, dict[int, Tensor]] = {}
    for kind in ("head_group", "channel", "hidden"):
        for layer in layers_of(spec, kind):
            numbers = kept.of(kind, layer)
            if len(numbers) == number_of(spec, kind, layer):
                continue
            first = torch.tensor(numbers, dtype=torch.int64)
            for member in members(spec, kind, layer):
                places = (first[:, None] * member.span + torch.arange(member.span)).flatten()
                entries.setdefault(member.name, {})[member.dimension] = places
    factor = math.sqrt(spec.hidden_size / len(kept.hidden))
    found: dict[str, _Cut] = {}
    for name in names:
        new = name_when_sliced(spec, name, kept)
        if new is not None:
            is_norm = name.endswith("norm.weight")
            found[name] = _Cut(new, entries.get(name, {}), factor if is_norm else 1.0)
    return found


def slice_tensors(
    tensors: Mapping[str, Tensor],
    spec: LlamaSpec,
    kept: Kept,
    *,
    correct: bool = True,
    views: bool = False,
) -> dict[str, Tensor]:
    """Tensors of the decoder's parameters' names and shapes, cut to those of what is left.

    What is not cut is not copied, with ``views`` nor is what lies together. A norm over ``h`` of ``H``
    dimensions, the others being zero, divides by a mean that is ``H / h`` times as large: its weights are
    multiplied by ``sqrt(H / h)``, unless ``correct`` is False (gradients, moments), and epsilon by ``H / h``
    (:func:`sliced_spec`).
    """
    found: dict[str, Tensor] = {}
    for name, cut in _cuts(spec, kept, tensors).items():
        tensor = tensors[name]
        for dimension, places in cut.entries.items():
            if views and int(places[-1]) - int(places[0]) + 1 == len(places):
                tensor = tensor.narrow(dimension, int(places[0]), len(places))
            else:
                tensor = tensor.index_select(dimension, places.to(tensor.device))
        found[cut.name] = tensor * cut.factor if correct and cut.factor != 1.0 else tensor
    return found


def sliced(model: Llama, kept: Kept) -> Llama:
    """A decoder of what is kept of ``model``; what is not cut is shared with it."""
    if model.adapter is not None:
        raise PunaError("units cannot be taken out under an adapter", fix="merge the adapter first")
    small = Llama(sliced_spec(model.spec, kept), dtype=model.dtype, device="meta")
    small.load_state_dict(slice_tensors(model.state_dict(), model.spec, kept), strict=True, assign=True)
    small.tokenizer, small.template, small.source = model.tokenizer, model.template, model.source
    return small.train(model.training)


def scatter_back(
    tensors: Mapping[str, Tensor],
    spec: LlamaSpec,
    kept: Kept,
    *,
    onto: Mapping[str, Tensor] | None = None,
    correct: bool = True,
) -> dict[str, Tensor]:
    """The reverse of :func:`slice_tensors`: tensors of the small decoder at their places in the whole one.

    ``spec`` and ``kept`` are those of the whole decoder. Everything else is zero, or as in ``onto`` (of the
    whole decoder's names and shapes), which is not changed. Names of a small decoder's LoRA factors,
    ``<projection>.lora_A.weight`` [rank, inputs] and ``lora_B`` [outputs, rank], are taken too.
    """
    whole = {name: torch.empty(shape, device="meta") for name, shape in parameter_shapes(spec).items()}
    places = {cut.name: (name, cut) for name, cut in _cuts(spec, kept, whole).items()}
    found: dict[str, Tensor] = {} if onto is None else dict(onto)
    for small_name, tensor in tensors.items():
        stem, factor = _factor_of(small_name)
        if stem not in places:
            raise unknown_name("parameter of the small decoder", small_name, places)
        name, cut = places[stem]
        shape, entries = list(whole[name].shape), cut.entries
        if factor is not None:
            shape[factor.rank] = tensor.shape[factor.rank]
            entries = {side: found_ for side, found_ in entries.items() if side != factor.rank}
            name = name.removesuffix("weight") + factor.suffix
        given = tensor / cut.factor if correct and cut.factor != 1.0 else tensor
        base = found[name] if name in found else given.new_zeros(shape)
        found[name] = _placed(base, given, entries)
    return found


@dataclass(frozen=True)
class _Factor:
    """Of a low-rank factor: the end of its name, and which of its dimensions is the rank."""

    suffix: str
    rank: int


_FACTORS = (_Factor("lora_A.weight", 0), _Factor("lora_B.weight", 1))


def _factor_of(name: str) -> tuple[str, _Factor | None]:
    """The parameter that a tensor belongs to, and which low-rank factor of it the tensor is."""
    for factor in _FACTORS:
        if name.endswith(factor.suffix):
            return name.removesuffix(factor.suffix) + "weight", factor
    return name, None


def _placed(base: Tensor, values: Tensor, entries: Mapping[int, Tensor]) -> Tensor:
    """A copy of ``base`` with ``values`` at the entries of each dimension."""
    sides = [entries.get(side, torch.arange(size)) for side, size in enumerate(base.shape)]
    sides = [side.to(base.device) for side in sides]
    copy = base.clone()
    if len(sides) == 1:
        copy[sides[0]] = values.to(copy.dtype)
    else:
        copy[sides[0][:, None], sides[1][None]] = values.to(copy.dtype)
    return copy


@dataclass(frozen=True)
class Masks:
    """Factors of what units give, by layer; differentiable, 1 leaves a unit and 0 takes it out.

    ``head_groups`` [kv_heads], ``channels`` [width], ``hidden`` [hidden_size], ``blocks`` [layers].
    ``gated`` multiplies both what gate and what up give by a channel's factor, in place of the product of
    the two: the same for 0 and 1, not between them.
    """

    head_groups: Mapping[int, Tensor] = field(default_factory=dict)
    channels: Mapping[int, Tensor] = field(default_factory=dict)
    hidden: Tensor | None = None
    blocks: Tensor | None = None
    gated: bool = False

    @classmethod
    def of(cls, spec: LlamaSpec, kept: Kept, dtype: torch.dtype | None = None) -> Masks:
        """Ones for what is kept and zeros for all else."""
        kept.check(spec)

        def mask(numbers: tuple[int, ...], total: int) -> Tensor:
            found = torch.zeros(total, dtype=dtype)
            found[list(numbers)] = 1.0
            return found

        layers = list(enumerate(spec.blocks))
        return cls(
            {n: mask(kept.head_groups[n], block.kv_heads) for n, block in layers if block.kv_heads},
            {n: mask(kept.channels[n], block.width) for n, block in layers if block.width},
            mask(kept.hidden, spec.hidden_size),
            mask(kept.blocks, len(spec.blocks)),
        )


@contextlib.contextmanager
def soft_mask(model: Llama, masks: Masks) -> Iterator[None]:
    """A block in which what each unit gives is multiplied by its factor.

    A head group and a channel are multiplied where they enter the projection to the stream (a channel of
    ``gated`` masks where it leaves gate and up), a block where its halves add to the stream, a hidden
    dimension wherever the stream is written, so that every norm sees zeros. Works with any factors; gradients
    reach them.
    """
    handles: list[Any] = []
    blocks = cast("Sequence[Block]", list(cast("Iterable[Block]", model.model.layers)))
    try:
        for layer, block in enumerate(blocks):
            spec = block.block
            whole = None if masks.blocks is None else masks.blocks[layer]
            if spec.attention == "full":
                span = spec.heads // spec.kv_heads * spec.head_dim
                factors = masks.head_groups.get(layer)
                spread = None if factors is None else factors.repeat_interleave(span)
                handles += _hooked(block.self_attn.o_proj, spread, None)
            if spec.attention != "none":
                for module in _writers(block.self_attn):
                    handles += _hooked(module, None, masks.hidden)
                handles += _hooked(block.self_attn, None, whole)
            if spec.feed_forward == "swiglu":
                channels = masks.channels.get(layer)
                if masks.gated:
                    for module in (block.mlp.gate_proj, block.mlp.up_proj):
                        handles += _hooked(module, None, channels)
                handles += _hooked(block.mlp.down_proj, None if masks.gated else channels, masks.hidden)
            elif spec.feed_forward == "linear":
                handles += _hooked(block.mlp.linear_mlp, None, masks.hidden)
            if spec.feed_forward != "none":
                handles += _hooked(block.mlp, None, whole)
        if masks.hidden is not None:  # not a hook on the embedding, which a trainer goes around
            handles.append(blocks[0].register_forward_pre_hook(_before(masks.hidden)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def folded(tensors: Mapping[str, Tensor], spec: LlamaSpec, masks: Masks) -> dict[str, Tensor]:
    """Weights that compute unmasked what ``tensors``, the decoder's weights, compute under ``masks``.

    Factors go into the matrices where their units are written. A tied embedding is read by the head too,
    so the final norm is divided by what the embedding is multiplied with; where that is 0 nothing arrives,
    and the norm's weight stays.
    """
    factors: dict[str, list[tuple[int, Tensor]]] = {}

    def multiply(name: str, dimension: int, factor: Tensor | None) -> None:
        if factor is not None and name in tensors:
            factors.setdefault(name, []).append((dimension, factor))

    for layer, block in enumerate(spec.blocks):
        at = f"model.layers.{layer}."
        groups, channels = masks.head_groups.get(layer), masks.channels.get(layer)
        if groups is not None and block.kv_heads:
            span = block.heads // block.kv_heads * block.head_dim
            multiply(f"{at}self_attn.o_proj.weight", 1, groups.repeat_interleave(span))
        if masks.gated:
            for name in ("gate_proj.weight", "gate_proj.bias", "up_proj.weight", "up_proj.bias"):
                multiply(f"{at}mlp.{name}", 0, channels)
        else:
            multiply(f"{at}mlp.down_proj.weight", 1, channels)
        for name in (*(f"self_attn.{name}" for name in _WRITERS), "mlp.down_proj", "mlp.linear_mlp"):
            for part in ("weight", "bias"):
                multiply(f"{at}{name}.{part}", 0, masks.hidden)
                multiply(f"{at}{name}.{part}", 0, None if masks.blocks is None else masks.blocks[layer])
    if masks.hidden is not None:
        multiply("model.embed_tokens.weight", 1, masks.hidden)
        if spec.tied:
            hidden = masks.hidden
            multiply("model.norm.weight", 0, torch.where(hidden == 0, 1.0, 1 / hidden))
    return {name: _multiplied(tensor, factors.get(name, [])) for name, tensor in tensors.items()}


def _multiplied(tensor: Tensor, factors: list[tuple[int, Tensor]]) -> Tensor:
    """``tensor`` times factors [entries of a dimension], or scalars."""
    for dimension, factor in factors:
        shape = [-1 if place == dimension else 1 for place in range(tensor.dim())]
        tensor = tensor * (factor.view(shape) if factor.dim() else factor).to(tensor)
    return tensor


def _writers(attention: torch.nn.Module) -> list[torch.nn.Module]:
    """What writes the stream in an attention half."""
    return [module for name, module in attention.named_children() if name in _WRITERS]


def _hooked(module: torch.nn.Module, entering: Tensor | None, leaving: Tensor | None) -> list[Any]:
    """Hooks that multiply what enters a module, and what leaves it."""
    found: list[Any] = []
    if entering is not None:
        found.append(module.register_forward_pre_hook(_before(entering)))
    if leaving is not None:
        factors = leaving
        found.append(
            module.register_forward_hook(lambda _module, _inputs, output: output * factors.to(output.dtype))
        )
    return found


def _before(factors: Tensor) -> Callable[[torch.nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def multiply(_module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0] * factors.to(inputs[0].dtype), *inputs[1:])

    return multiply
