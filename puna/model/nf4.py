"""NF4 with double quantisation (QLoRA, 2305.14314) in plain torch: a codec, and a frozen layer that holds it.

A block of 64 weights is divided by its largest magnitude and each weight rounded to the nearest of 16
levels; the scales, less their mean, are rounded to 8 bits in blocks of 256. Levels, order of the codes
and the 8-bit map are those of bitsandbytes, so its packed bytes and these can be compared. What
differs: division by the scale is exact here where bitsandbytes multiplies by a rounded reciprocal, so
that a weight halfway between two levels may fall on the other one; a scale that its own rounding
would make negative counts as zero; and the two tables are computed, not stored with each matrix.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from puna.core.errors import PunaError
from puna.model.llama import Llama
from puna.model.nf4_layout import BLOCK, SCALE_BLOCK
from puna.model.weights import check_finite

_BLOCKS_AT_ONCE = 1 << 12  # bounds scratch space to a few megabytes


@functools.cache
def levels() -> Tensor:
    """The 16 levels, float32, ascending: from quantiles of N(0, 1), with an exact zero, from -1 to 1.

    Eight quantiles from probability d to 1/2 and nine from 1/2 to 1 - d, evenly spaced, with
    d = (1/32 + 1/30) / 2; the two zeros are one. Divided by the largest.
    """
    edge = (1 / 32 + 1 / 30) / 2
    below = torch.special.ndtri(torch.linspace(edge, 0.5, 8, dtype=torch.float64, device="cpu"))
    above = torch.special.ndtri(torch.linspace(0.5, 1 - edge, 9, dtype=torch.float64, device="cpu"))
    found = torch.cat((below[:-1], below.new_zeros(1), above[1:]))
    return (found / found.abs().max()).float()


@functools.cache
def dynamic_map() -> Tensor:
    """The 256 values of the signed dynamic 8-bit type (Dettmers 2015, 1511.04561), float32, ascending.

    For each exponent e from 0 to 6 the middles of 2^e equal parts of [0.1, 1], times 10^(e - 6), with
    either sign; zero; and one. There is no minus one: the lowest value is -0.993.
    """
    found = [0.0, 1.0]
    for exponent in range(7):
        middles = _middles(torch.linspace(0.1, 1, 2**exponent + 1, device="cpu")) * 10 ** (exponent - 6)
        found += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(found), dtype=torch.float32, device="cpu")


@dataclass(frozen=True)
class Packed:
    """A tensor in NF4: ``codes`` uint8, two to a byte, the first in the upper half.

    ``scale_codes`` uint8 for each block of weights, ``scale_sizes`` float32 for each block of scales,
    ``scale_mean`` float32, one number.
    """

    shape: tuple[int, ...]
    codes: Tensor
    scale_codes: Tensor
    scale_sizes: Tensor
    scale_mean: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held; eight times that is the sum of :func:`puna.model.nf4_layout.bits`."""
        tensors = (self.codes, self.scale_codes, self.scale_sizes, self.scale_mean)
        return sum(tensor.nbytes for tensor in tensors)


def encode(weight: Tensor) -> Packed:
    """Any tensor of floating-point numbers in NF4; the last block may be short.

    Raises :class:`PunaError` for an empty tensor and for NaN and infinite numbers.
    """
    if not weight.numel() or not weight.is_floating_point():
        raise PunaError("NF4 holds floating-point weights", found=f"{tuple(weight.shape)} of {weight.dtype}")
    check_finite("weight", weight, "NF4")
    codes, scales = encode_blocks(weight)
    return Packed(tuple(weight.shape), codes, *encode_scales(scales))


def decode(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """The tensor again: computed in float32, rounded once to ``dtype``."""
    scales = decode_scales(packed.scale_codes, packed.scale_sizes, packed.scale_mean)
    return decode_blocks(packed.codes, scales, packed.shape, dtype)


def encode_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, two to a byte, and a float32 scale for each block: the largest magnitude in it.

    Decoded with these scales, a weight is off by at most half the largest gap between levels times the
    scale, and what was decoded has the same codes and scales again.
    """
    flat = weight.detach().flatten()
    middles = _middles(levels()).to(weight.device)
    codes, scales = [], []
    for part in torch.split(flat, BLOCK * _BLOCKS_AT_ONCE):
        blocks = functional.pad(part.float(), (0, -part.numel() % BLOCK)).view(-1, BLOCK)
        scale = blocks.abs().amax(dim=1)
        scaled = blocks / torch.where(scale > 0, scale, 1.0)[:, None]
        nearest = torch.bucketize(scaled, middles, out_int32=True).to(torch.uint8).flatten()
        nearest = nearest[: part.numel() + part.numel() % 2]  # what fills the last byte up is a zero
        codes.append(nearest[::2] << 4 | nearest[1::2])
        scales.append(scale)
    return torch.cat(codes), torch.cat(scales)


def decode_blocks(codes: Tensor, scales: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Levels times scales, [shape]. Scratch space is bounded; only the result has the size of the tensor."""
    found = torch.empty(shape, dtype=dtype, device=codes.device)
    flat = found.view(-1)
    both = _pairs().to(codes.device)
    for start in range(0, len(scales), _BLOCKS_AT_ONCE):
        stop = min(start + _BLOCKS_AT_ONCE, len(scales))
        part = codes[start * BLOCK // 2 : stop * BLOCK // 2].int()
        values = both.index_select(0, part).flatten()
        scale = scales[start:stop].repeat_interleave(BLOCK)[: len(values)]
        target = flat[start * BLOCK : stop * BLOCK]
        target.copy_((values * scale)[: len(target)])
    return found


def encode_scales(scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales less their mean in the dynamic 8-bit map: codes, the size of each block of 256, the mean."""
    mean = scales.mean()
    centred = functional.pad(scales - mean, (0, -len(scales) % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
    sizes = centred.abs().amax(dim=1)
    scaled = centred / torch.where(sizes > 0, sizes, 1.0)[:, None]
    codes = torch.bucketize(scaled, _middles(dynamic_map()).to(scales.device), out_int32=True)
    return codes.to(torch.uint8).flatten()[: len(scales)].clone(), sizes, mean[None]


def decode_scales(codes: Tensor, sizes: Tensor, mean: Tensor) -> Tensor:
    """Float32 scales, none negative: a sign from rounding would turn a whole block of weights around."""
    values = dynamic_map().to(codes.device).index_select(0, codes.int())
    return (values * sizes.repeat_interleave(SCALE_BLOCK)[: len(codes)] + mean).clamp_(min=0)


def _middles(values: Tensor) -> Tensor:
    """Halfway between neighbours, where the nearest value changes."""
    return (values[:-1] + values[1:]) / 2


@functools.cache
def _pairs() -> Tensor:
    """The two levels in each of the 256 bytes, [256, 2]."""
    codes = torch.arange(256, device="cpu")
    return levels()[torch.stack((codes >> 4, codes & 15), dim=1)]


class _Product(torch.autograd.Function):
    """hidden @ weight.T + bias. The decoded weight is not kept: the backward pass decodes it again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, bias: Tensor | None, layer: NF4Linear) -> Tensor:
        ctx.layer = layer
        return functional.linear(hidden, layer.decoded(hidden.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        to_hidden = gradient @ ctx.layer.decoded(gradient.dtype) if ctx.needs_input_grad[0] else None
        to_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return to_hidden, to_bias, None


class NF4Linear(nn.Module):
    """A frozen linear layer whose matrix is held in NF4; it computes in the dtype of what enters it.

    Codes and scales are buffers: no gradient, no optimiser, not moved by ``.to(dtype)``. ``dtype`` is
    that of the layer it stands for and follows ``.to(dtype)``. A bias stays as it is.
    """

    codes: Tensor
    scale_codes: Tensor
    scale_sizes: Tensor
    scale_mean: Tensor
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.weight.dtype
        packed = encode(linear.weight)
        for name in ("codes", "scale_codes", "scale_sizes", "scale_mean"):
            self.register_buffer(name, getattr(packed, name))
        self.register_parameter("bias", linear.bias)

    @property
    def packed(self) -> Packed:
        """Codes and scales as the codec takes them."""
        shape = (self.out_features, self.in_features)
        return Packed(shape, self.codes, self.scale_codes, self.scale_sizes, self.scale_mean)

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """The matrix [out_features, in_features]."""
        return decode(self.packed, dtype)

    @property
    def weight(self) -> Tensor:
        """The matrix in the layer's own dtype, decoded anew each time: peft's DoRA asks for it."""
        return self.decoded(self.dtype)

    def plain(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A linear layer with the decoded matrix, of ``dtype`` (None: the layer's own)."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=False)
        linear.weight = nn.Parameter(self.decoded(dtype or self.dtype))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(linear.weight.dtype))
        return linear.train(self.training)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        return cast(Tensor, _Product.apply(hidden, self.bias, self))  # type: ignore[no-untyped-call]

    def _apply(self, fn: Any, recurse: bool = True) -> NF4Linear:
        """Move to another device or dtype; scales stay float32: rounding them would change the weights."""
        exact = dict(self._buffers)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in exact.items():
            moved = cast(Tensor, self._buffers[name])
            self._buffers[name] = cast(Tensor, buffer).to(moved.device)
        return self

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, dtype={self.dtype}"


def quantised_layers(model: nn.Module) -> Iterator[tuple[str, NF4Linear]]:
    """Name and layer of each matrix that is held in NF4, as if no adapter lay over it."""
    for name, module in list(model.named_modules()):
        if isinstance(module, NF4Linear):
            yield name.removesuffix(".base_layer"), module


def parameter_count(model: nn.Module) -> int:
    """Weights of a model, those held in NF4 included."""
    quantised = sum(layer.in_features * layer.out_features for _, layer in quantised_layers(model))
    return quantised + sum(parameter.numel() for parameter in model.parameters())


def held_bytes(model: nn.Module) -> int:
    """Bytes of all that a model holds but its adapter: weights, codes and scales, masks."""
    own = [tensor for name, tensor in model.named_parameters() if ".lora_" not in name]
    return sum(tensor.nbytes for tensor in (*own, *model.buffers()))


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put ``layer`` in the place of the module called ``name``."""
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, layer)


def quantize_base(model: Llama, *, leave: frozenset[str] = frozenset()) -> int:
    """Hold the projections of all layers in NF4, in place, but those called ``leave``; returns their number.

    Embeddings, head and norms stay as they are, and so do projections in NF4 already.
    """
    if model.adapter is not None:
        raise PunaError(
            "a model is put into NF4 before it gets an adapter", where=model.source, fix="merge it first"
        )
    found = [
        (name, module)
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name.startswith("model.layers.") and name not in leave
    ]
    for name, linear in found:
        replace_layer(model, name, NF4Linear(linear))
    return len(found)


def dequantize_base(model: Llama) -> None:
    """Make what is held in NF4 plain again, in place, with decoded weights; no adapter may lie over it."""
    for name, layer in quantised_layers(model):
        replace_layer(model, name, layer.plain())


def take_quantised(model: Llama, other: Llama) -> None:
    """Give ``model``, a plain decoder of the same shapes, the codes and scales that ``other`` holds in NF4.

    Dtype, device and biases are those of the layers that are replaced.
    """
    for name, layer in quantised_layers(other):
        linear = cast(nn.Linear, model.get_submodule(name))
        copied = copy.deepcopy(layer).to(device=linear.weight.device, dtype=linear.weight.dtype)
        copied.bias = linear.bias
        replace_layer(model, name, copied)
