"""The product of an adapted projection, forward and backward in one piece.

A LoRA layer computes x W' + s (x A') B'. Composed from operations, autograd keeps or makes a tensor of
the output's size for each of them. Here the small products add into the large one in place, in both
directions, and the down projection of a gated unit keeps gate and up alone: their product is made
again in the backward pass.

PEFT's layers stay what they are (:class:`AdaptedLinear` is one of them); whatever this does not cover
goes through PEFT's own forward pass: DoRA, a base in NF4, dropout in training, an adapter that is off or
merged.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional


class AdaptedLinear(Linear):  # type: ignore[misc]
    """PEFT's LoRA of an ``nn.Linear``, forward and backward in one piece where that is possible."""

    def forward(self, hidden: Tensor, *arguments: Any, **named: Any) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        parts = None if arguments or named else self._parts()
        if parts is None:
            return cast(Tensor, super().forward(hidden, *arguments, **named))
        product: Tensor = _AdaptedProduct.apply(hidden, None, *parts)  # type: ignore[no-untyped-call]
        return product

    def gated(self, gate: Tensor, up: Tensor) -> Tensor | None:
        """The projection of silu(gate) * up, both [..., inputs]; None if PEFT's forward pass is needed."""
        parts = self._parts()
        if parts is None:
            return None
        product: Tensor = _AdaptedProduct.apply(gate, up, *parts)  # type: ignore[no-untyped-call]
        return product

    def _parts(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor, float] | None:
        """Weight, bias, A, B and the factor; None where the composed forward pass is needed."""
        active = self.active_adapters
        if self.disable_adapters or self.merged or len(active) != 1 or active[0] not in self.lora_A:
            return None
        (name,) = active
        base, dropout = self.base_layer, self.lora_dropout[name]
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        plain = not self.lora_variant and self.lora_B[name].bias is None and down.dtype == base.weight.dtype
        frozen = not base.weight.requires_grad and (base.bias is None or not base.bias.requires_grad)
        dropping = not isinstance(dropout, nn.Identity) and self.training and dropout.p > 0
        if dropping or not frozen or not plain:
            return None
        return base.weight, base.bias, down, up, float(self.scaling[name])


class MaskedLinear(Linear):  # type: ignore[misc]
    """PEFT's LoRA of a linear layer, plain or in NF4, that changes ``places`` [outputs, inputs] alone."""

    places: Tensor

    def forward(self, hidden: Tensor, *arguments: Any, **named: Any) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        if self.disable_adapters or self.merged or arguments or named:
            return cast(Tensor, super().forward(hidden, *arguments, **named))
        (name,) = self.active_adapters
        dropout = self.lora_dropout[name]
        change = self._change(name)
        base = self.get_base_layer()
        if isinstance(dropout, nn.Identity) or not self.training:
            return functional.linear(hidden, base.weight + change.to(base.weight.dtype), base.bias)
        return cast(Tensor, base(hidden) + functional.linear(dropout(hidden), change.to(hidden.dtype)))

    def _change(self, name: str) -> Tensor:
        product = self.lora_B[name].weight @ self.lora_A[name].weight
        return cast(Tensor, product * self.places * self.scaling[name])

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging adds to the weight."""
        return cast(Tensor, super().get_delta_weight(adapter)) * self.places


class _AdaptedProduct(torch.autograd.Function):
    """Projects ``first`` [..., inputs], or silu(first) * second where there is a ``second``."""

    @staticmethod
    def forward(
        ctx: Any,
        first: Tensor,
        second: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
    ) -> Tensor:
        hidden = first if second is None else functional.silu(first).mul_(second)
        rows = hidden.reshape(-1, hidden.shape[-1])  # [rows, inputs]
        low = rows @ down.T  # [rows, rank]
        product = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
        product.addmm_(low, up.T, alpha=scale)
        ctx.save_for_backward(first, second, weight, down, up, low)
        ctx.scale = scale
        return product.view(*hidden.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        first, second, weight, down, up, low = ctx.saved_tensors
        outer = gradient.reshape(-1, gradient.shape[-1])  # [rows, outputs]
        to_low = (outer @ up).mul_(ctx.scale)  # [rows, rank]
        silu = None if second is None else functional.silu(first)
        hidden = first if silu is None else silu * second
        to_down = to_low.T @ hidden.reshape(-1, hidden.shape[-1])
        to_up = (outer.T @ low).mul_(ctx.scale)
        to_first = to_second = None
        if ctx.needs_input_grad[0]:
            to_hidden = (outer @ weight).addmm_(to_low, down).view(first.shape)
            if silu is None:
                to_first = to_hidden
            else:
                to_second = silu.mul_(to_hidden)
                to_first = torch.ops.aten.silu_backward(to_hidden.mul_(second), first)
        return to_first, to_second, None, None, to_down, to_up, None
