"""More nonlinearity in a layer: a series of activations on SwiGLU's gate, and shortcuts around attention.

System S82, PanGu-pi (2312.17276). The series is ``silu(a_1 g + b_1) + ... + silu(a_n g + b_n)`` with a scale
and a bias for each channel and term. The augmented attention is ``MSA(z) + z + Up(gelu(Down(z)))``. Readings
where the paper is silent: the series takes the place of SiLU on the gate; one shortcut a layer; Down reads
what the attention reads, the stream behind its norm; no biases in Down and Up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Iterator


class _SeriesUnit(torch.autograd.Function):
    """The series of a gate times up; only its inputs are kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight, bias)
        return _series(gate, weight, bias).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        gate, up, weight, bias = ctx.saved_tensors
        to_series, to_gate = gradient * up, torch.zeros_like(gate)
        to_weight, to_bias = torch.empty_like(weight), torch.empty_like(bias)
        everywhere = tuple(range(gate.dim() - 1))
        for term, (scale, shift) in enumerate(zip(weight.unbind(1), bias.unbind(1), strict=True)):
            inner = torch.ops.aten.silu_backward(to_series, gate * scale + shift)
            to_bias[:, term] = inner.sum(everywhere)
            to_weight[:, term] = (inner * gate).sum(everywhere)
            to_gate.addcmul_(inner, scale)
        return to_gate, _series(gate, weight, bias).mul_(gradient), to_weight, to_bias


def _series(gate: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Sum over the terms of silu(weight * gate + bias): [..., width] of ``weight`` [width, terms]."""
    terms = (
        functional.silu(gate * scale + shift, inplace=True)
        for scale, shift in zip(weight.unbind(1), bias.unbind(1), strict=True)
    )
    total = next(terms)
    for term in terms:
        total = total.add_(term)
    return total


class SeriesActivation(nn.Module):
    """``terms`` SiLUs of one number, each scaled and shifted by channel: 2 * terms * width weights.

    ``weight`` and ``bias`` are vectors [width * terms], a channel's terms side by side: vectors, since an
    optimiser decays matrices, and a scale that shrank would take its term away.
    """

    def __init__(self, width: int, terms: int) -> None:
        super().__init__()
        self.terms = terms
        self.weight = nn.Parameter(torch.empty(width * terms))
        self.bias = nn.Parameter(torch.empty(width * terms))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None, deviation: float) -> None:
        """First terms plain, the later ones' scales drawn near 0, no shift; without a generator all 0.

        Drawn scales tell the later terms apart: equal ones would get equal gradients and stay equal.
        """
        weight = torch.zeros(len(self.weight) // self.terms, self.terms)
        if generator is not None:
            weight = weight.to(generator.device).normal_(0, deviation, generator=generator)
        weight[:, 0] = 1.0
        self.weight.copy_(weight.flatten())
        self.bias.zero_()

    def by_term(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Scale and shift of each term, [width] each."""
        shape = (-1, self.terms)
        yield from zip(self.weight.view(shape).unbind(1), self.bias.view(shape).unbind(1), strict=True)

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """The series of ``gate`` times ``up``, [..., width] each."""
        shape = (-1, self.terms)
        unit = _SeriesUnit.apply(gate, up, self.weight.view(shape), self.bias.view(shape))  # type: ignore[no-untyped-call]
        return cast(Tensor, unit)


def shortcut(hidden: Tensor, squeeze: nn.Module, expand: nn.Module) -> Tensor:
    """What the augmented shortcut adds for ``hidden`` [..., hidden]: expand(gelu(squeeze(hidden)))."""
    return cast(Tensor, expand(functional.gelu(squeeze(hidden))))
