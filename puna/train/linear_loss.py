"""A loss at the head: logits, loss and gradients a chunk of positions at a time, never of a whole batch.

The gradients are made in the forward pass, when the logits are at hand, as fused linear
cross-entropy kernels do; the backward pass only scales them. Which loss it is, a function says that
turns the logits of a chunk into their gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from puna.train.arguments import precise

CHUNK = 2048
"""Positions whose logits exist at a time; of a trained head, whose gradient is summed over them."""

FROZEN_CHUNK = 256
"""The same where the head is frozen: their logits are memory that the allocator has at hand already."""

ROWS_IN_CACHE = 16
"""Positions whose float32 distributions fit a CPU core's cache at a 49k vocabulary."""

ToGradient = Callable[[Tensor, slice, Tensor], None]
"""``(logits, part, losses)``: turn the logits [n, vocabulary] of the positions ``part`` into their
gradient in place, and fill their ``losses`` [n]."""


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    places: Tensor,
    to_gradient_: ToGradient,
    *,
    dtype: torch.dtype = torch.float32,
    factors: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of the losses of ``hidden @ weight.T`` at some positions, and the losses themselves.

    ``hidden`` is [rows, width], ``weight`` [vocabulary, width] in the same dtype, ``places`` int64
    [positions]. ``factors`` [positions] weight the sum; the gradients that ``to_gradient_`` makes
    hold them already. The losses, [positions] in ``dtype``, are not differentiable.
    """
    total, losses = _LinearLoss.apply(  # type: ignore[no-untyped-call]
        hidden, weight, places, to_gradient_, dtype, factors, chunk_for(weight, chunk)
    )
    return total, losses


def chunk_for(weight: Tensor, chunk: int | None) -> int:
    """Positions to take at a time with the head ``weight``, unless ``chunk`` says so."""
    return chunk or (CHUNK if weight.requires_grad else FROZEN_CHUNK)


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        places: Tensor,
        to_gradient_: ToGradient,
        dtype: torch.dtype,
        factors: Tensor | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        rows = hidden[places]
        losses = torch.empty(len(places), dtype=dtype, device=hidden.device)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        row_gradient = torch.empty_like(rows) if needs_hidden else None
        weight_gradient = torch.zeros_like(weight) if needs_weight and not len(places) else None
        for start in range(0, len(places), chunk):
            part = slice(start, start + chunk)
            logits = rows[part] @ weight.T  # [chunk, vocabulary]
            to_gradient_(logits, part, losses[part])
            if row_gradient is not None:
                torch.mm(logits, weight, out=row_gradient[part])
            if needs_weight:
                weight_gradient = add_product(weight_gradient, logits.T @ rows[part])
        gradient = None
        if row_gradient is not None:
            gradient = torch.zeros_like(hidden)
            gradient[places] = row_gradient
        ctx.save_for_backward(gradient, weight_gradient)
        ctx.mark_non_differentiable(losses)
        return (losses if factors is None else losses * factors).sum(), losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        outer = gradients[0]
        hidden, weight = ctx.saved_tensors
        if outer.device.type != "cpu" or float(outer) != 1.0:  # the training loop's gradient is 1
            hidden = None if hidden is None else hidden * outer.to(hidden.dtype)
            weight = None if weight is None else weight * outer.to(weight.dtype)
        return hidden, weight, None, None, None, None, None


def add_product(so_far: Tensor | None, product: Tensor) -> Tensor:
    """Sum over chunks in float32 or wider; a single chunk stays what it is."""
    if so_far is None:
        return product
    # Adding bfloat16 to float32 in one operation is four times slower on a CPU.
    return precise(so_far).add_(precise(product))


def rows_at_a_time(logits: Tensor) -> range:
    """Starts of the runs of rows to work through, with the run as step: on a CPU a run stays in the cache."""
    step = ROWS_IN_CACHE if logits.device.type == "cpu" else max(len(logits), 1)
    return range(0, len(logits), step)
