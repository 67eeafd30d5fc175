"""The grid that a matrix's weights lie on after quantisation: steps and zero points, by groups of inputs.

weight = (level - zero) * step, with whole levels from 0 to 2^bits - 1, a step in half precision and a whole
zero point for each output and group. A decoder remembers the grids of its matrices (``Llama.grids``), so that
engine and files pack the levels themselves and round nothing a second time; the levels are found again from
the weights, even from weights that were rounded to bfloat16. Weights that have changed since lie on no grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from puna.core.errors import PunaError

_PACKED_GROUP = 32  # inputs that share a step in the engine and in the smaller GGUF types


@dataclass(frozen=True)
class UniformGrid:
    """Steps [outputs, groups] in half precision and zero points [outputs, groups] uint8 of one matrix.

    ``group`` inputs share a step, the last group may be shorter. ``activation_bits`` is what the inputs of
    the matrix are meant to be rounded to, token by token, by whoever runs it; None: they are not.
    """

    bits: int
    group: int
    symmetric: bool
    step: Tensor
    zero: Tensor
    activation_bits: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8 or self.group < 1 or self.step.shape != self.zero.shape:
            raise PunaError(
                "a uniform grid has 1 to 8 bits, groups, and a zero point for each step",
                found=f"{self.bits} bits, groups of {self.group}, {tuple(self.step.shape)} steps",
            )

    @property
    def by_row(self) -> bool:
        """Whether all inputs of an output share one step."""
        return self.step.shape[1] == 1

    def decode(self, levels: Tensor) -> Tensor:
        """Weights [outputs, inputs], float32, of levels."""
        step, zero = self._by_input(self.step.float(), levels), self._by_input(self.zero, levels)
        return (levels.int() - zero.int()).float() * step

    def levels(self, weight: Tensor) -> Tensor | None:
        """Levels uint8 [outputs, inputs] of weights on this grid; None if they do not lie on it.

        Decoded and rounded to the dtype of ``weight`` the levels must give its very bits.
        """
        if weight.dim() != 2 or self.step.shape != (len(weight), -(-weight.shape[1] // self.group)):
            return None
        weight = weight.detach()
        step = self._by_input(self.step.float(), weight)
        zero = self._by_input(self.zero, weight).float()
        found = (weight.float() / torch.where(step > 0, step, 1.0) + zero).round_()
        found = found.clamp_(0, 2**self.bits - 1).to(torch.uint8)
        return found if torch.equal(self.decode(found).to(weight.dtype), weight) else None

    def packed(self, inputs: int) -> tuple[Tensor, Tensor] | None:
        """Step and smallest weight, float32 [outputs, groups of 32]; None where they have no such form.

        The smallest weight, -zero * step, must be a number of half precision, and no group of 32 may lie in
        two groups of this grid.
        """
        groups = -(-inputs // _PACKED_GROUP)
        if self.group % _PACKED_GROUP and self.group < inputs:
            return None
        place = torch.arange(groups) * _PACKED_GROUP // self.group
        step = self.step.float()[:, place]
        low = -self.zero.float()[:, place] * step
        return (step, low) if torch.equal(low.half().float(), low) else None

    def _by_input(self, values: Tensor, weight: Tensor) -> Tensor:
        return values.repeat_interleave(self.group, dim=1)[:, : weight.shape[1]]


def short_step(step: Tensor, bits: int) -> Tensor:
    """The next larger numbers of which every multiple up to 2^bits - 1 is exact in half precision.

    Half precision has 11 significant bits; a step with 11 - ``bits`` of them leaves room for the zero point.
    """
    mantissa, exponent = torch.frexp(step.float())
    width = 2 ** (11 - bits)
    rounded = torch.ldexp((mantissa * width).ceil() / width, exponent)
    return rounded.clamp(min=2.0**-14).half()
