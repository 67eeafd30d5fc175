"""Variants of a half of a layer, and the weights they start with.

System S31, Puzzle (2411.19146): attention with fewer key-value heads, each the mean of those it stands for; a
feed-forward of fewer channels, those that contribute most; either half as one matrix, W_o W_v or
W_down W_up, which leaves out the softmax or the gate; either half left out. Shares of widths are given, since
the paper's exact list is not stated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from puna.core.errors import PunaError
from puna.model.spec import BlockSpec, LlamaSpec

Half = Literal["attention", "feed_forward"]
HALVES: tuple[Half, ...] = get_args(Half)
PARENT, LINEAR, NONE = "parent", "linear", "none"
_FEWER: dict[Half, str] = {"attention": "kv_heads-", "feed_forward": "width-"}
_MODULES: dict[Half, tuple[str, str]] = {
    "attention": ("input_layernorm.", "self_attn."),
    "feed_forward": ("post_attention_layernorm.", "mlp."),
}


@dataclass(frozen=True)
class Space:
    """What a half may become besides staying as it is: ``kv_heads``, ``widths`` as shares of the parent's
    channels, one matrix, nothing.
    """

    kv_heads: tuple[int, ...] = ()
    widths: tuple[float, ...] = (0.75, 0.5, 0.25)
    linear: bool = True
    none: bool = True

    def variants(self, block: BlockSpec, half: Half) -> tuple[str, ...]:
        """Names of what a half of this layer may be, the parent's own first.

        A count of key-value heads that the layer's cannot be shared out over is not among them, and a
        half that is no attention or gated feed-forward in the parent can only stay or go.
        """
        kind = block.attention if half == "attention" else block.feed_forward
        found = [PARENT]
        if kind == "none":
            return (PARENT,)
        if kind == "full":
            fitting = [n for n in self.kv_heads if n < block.kv_heads and block.kv_heads % n == 0]
            found += [f"kv_heads-{number}" for number in fitting]
        if kind == "swiglu":
            numbers = [max(1, round(share * block.width)) for share in self.widths]
            found += [f"width-{number}" for number in dict.fromkeys(numbers) if number < block.width]
        if self.linear and kind != "linear":
            found.append(LINEAR)
        if self.none:
            found.append(NONE)
        return tuple(found)


def number_in(variant: str, half: Half) -> int | None:
    """The count of heads or channels in a variant's name; None for the other variants."""
    count = variant.removeprefix(_FEWER[half])
    if count != variant and count.isdigit() and int(count) > 0:
        return int(count)
    if variant not in (PARENT, LINEAR, NONE):
        raise PunaError(
            f"no variant of {half}",
            found=variant,
            expected=f"{PARENT}, {_FEWER[half]}N, {LINEAR} or {NONE}",
        )
    return None


def changed(block: BlockSpec, half: Half, variant: str) -> BlockSpec:
    """The layer's spec with one half as in ``variant``."""
    number = number_in(variant, half)
    if variant == PARENT:
        return block
    if number is None:
        return _of_kind(block, half, variant)
    if half == "feed_forward":
        if block.feed_forward != "swiglu" or number > block.width:
            raise _no_room(variant, f"{block.width} channels")
        return dataclasses.replace(block, width=number)
    if block.attention != "full" or block.kv_heads % number:
        raise _no_room(variant, f"{block.kv_heads} key-value heads")
    return dataclasses.replace(block, kv_heads=number)


def _no_room(variant: str, found: str) -> PunaError:
    return PunaError("this layer has no such variant", where=variant, found=found)


def alone(block: BlockSpec, half: Half) -> BlockSpec:
    """The layer's spec with the other half left out."""
    other: Half = "feed_forward" if half == "attention" else "attention"
    return _of_kind(block, other, NONE)


def _of_kind(block: BlockSpec, half: Half, kind: str) -> BlockSpec:
    changes: dict[str, Any] = {half: kind}
    return dataclasses.replace(block, **changes)


def of_half(tensors: Mapping[str, Tensor], layer: int, half: Half) -> dict[str, Tensor]:
    """The tensors of a half, by their names in the layer, out of a decoder's."""
    prefix = f"model.layers.{layer}."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(tuple(prefix + start for start in _MODULES[half]))
    }


@torch.no_grad()
def initial(
    own: Mapping[str, Tensor], spec: LlamaSpec, layer: int, half: Half, variant: str, order: Sequence[int]
) -> dict[str, Tensor]:
    """What a variant starts with, out of the parent's tensors ``own`` of that half (:func:`of_half`).

    ``order`` are the layer's channels, those that contribute most first. The norm stays the parent's.
    """
    block, number = spec.blocks[layer], number_in(variant, half)
    changed(block, half, variant)
    if variant == PARENT:
        return dict(own)
    if variant == NONE:
        return {}
    if variant == LINEAR:
        return _linear(own, block, half)
    assert number is not None
    if half == "attention":
        return {
            name: _pooled(tensor, block.kv_heads, number)
            if ".k_proj." in name or ".v_proj." in name
            else tensor
            for name, tensor in own.items()
        }
    chosen = torch.tensor(sorted(order[:number]))
    return {name: _narrower(name, tensor, block, chosen) for name, tensor in own.items()}


def _pooled(tensor: Tensor, heads: int, fewer: int) -> Tensor:
    """Rows of so many heads, [heads * head_dim, ...], as means of neighbouring heads."""
    grouped = tensor.float().view(fewer, heads // fewer, len(tensor) // heads, -1)
    return grouped.mean(1).reshape(-1, *tensor.shape[1:]).to(tensor.dtype)


def _narrower(name: str, tensor: Tensor, block: BlockSpec, channels: Tensor) -> Tensor:
    """A feed-forward's tensor with some of its channels."""
    if "down_proj.weight" in name:
        return tensor[:, channels]
    if "act_fn" in name:
        return tensor.view(block.width, block.series)[channels].flatten()
    return tensor[channels] if "gate_proj" in name or "up_proj" in name else tensor


def _linear(own: Mapping[str, Tensor], block: BlockSpec, half: Half) -> dict[str, Tensor]:
    """The norm, and the product of the matrix that reads the stream and the one that writes it."""
    if half == "attention":
        norm, reads, writes, new = "input_layernorm", "v_proj", "o_proj", "self_attn.linear_attn"
    else:
        norm, reads, writes, new = "post_attention_layernorm", "up_proj", "down_proj", "mlp.linear_mlp"
    group = new.partition(".")[0]
    into, out = own[f"{group}.{reads}.weight"].float(), own[f"{group}.{writes}.weight"].float()
    bias = own.get(f"{group}.{reads}.bias")
    if half == "attention":  # every query head takes the values of its group
        into = _spread(into, block)
        bias = None if bias is None else _spread(bias, block)
    dtype = own[f"{norm}.weight"].dtype
    found = {f"{norm}.weight": own[f"{norm}.weight"], f"{new}.weight": (out @ into).to(dtype)}
    if bias is not None:
        added = own.get(f"{group}.{writes}.bias")
        summed = out @ bias.float() + (0 if added is None else added.float())
        found[f"{new}.bias"] = summed.to(dtype)
    return found


def _spread(rows: Tensor, block: BlockSpec) -> Tensor:
    """Rows [kv_heads * head_dim, ...] repeated for the query heads that read them."""
    shaped = rows.view(block.kv_heads, block.head_dim, -1)
    return shaped.repeat_interleave(block.heads // block.kv_heads, 0).reshape(-1, *rows.shape[1:])
