"""Grids: what levels a group of weights may take, fitted to it, and the nearest level of a weight.

Weights stand transposed here, [columns, rows]: a column of the matrix (one input) is a row of memory, and
GPTQ walks over columns. A fitted grid has a set of levels for every row. Sources: NF4 2305.14314; binary
1603.05279; residual binary 2402.04291 (S18, BiLLM); dual binary 2402.11960 (S18, DB-LLM); the shift of NF4
2402.05445 (S18, IR-QLoRA); steps that keep salient weights apart 2405.14917 (S18, SliM-LLM).

Steps and magnitudes are rounded to half precision before they are used, as they are stored. A step of an
asymmetric grid of at most 4 bits is rounded up to so few digits that its product with the zero point is exact
in half precision, which engine and GGUF need. Simplified: s of the dual grid is the best of 20 multiples of
the largest magnitude, of either sign, by squared error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from puna.edit.quantize.settings import Binary, DualBinary, ResidualBinary, Uniform
from puna.model.uniform_grid import short_step

_SMALLEST_STEP = 2.0**-14
_SHRINKS = torch.linspace(1.0, 0.6, 9)


class Fitted(Protocol):
    """Levels for each row of a group of columns."""

    def nearest(self, values: Tensor, column: int | None = None) -> Tensor:
        """The nearest level of each value: of all the group's columns [columns, rows], or of one [rows]."""


@dataclass(frozen=True)
class UniformLevels:
    """(level - zero) * step, level from 0 to ``top``; step and zero are [rows]."""

    step: Tensor
    zero: Tensor
    top: int
    inverse: Tensor

    def nearest(self, values: Tensor, column: int | None = None) -> Tensor:
        """See :class:`Fitted`."""
        levels = torch.addcmul(self.zero, values, self.inverse).round_().clamp_(0, self.top)
        return levels.sub_(self.zero).mul_(self.step)


@dataclass(frozen=True)
class Signed:
    """``magnitude`` [rows] with either sign."""

    magnitude: Tensor

    def nearest(self, values: Tensor, column: int | None = None) -> Tensor:
        """See :class:`Fitted`."""
        return torch.where(values < 0, -self.magnitude, self.magnitude)


@dataclass(frozen=True)
class Table:
    """Any levels, ascending: [levels, rows]."""

    levels: Tensor

    def nearest(self, values: Tensor, column: int | None = None) -> Tensor:
        """See :class:`Fitted`."""
        middles = (self.levels[:-1] + self.levels[1:]) / 2
        found = self.levels[0].expand_as(values)
        for middle, level in zip(middles, self.levels[1:], strict=True):
            found = torch.where(values > middle, level, found)
        return found


@dataclass(frozen=True)
class Parts:
    """Several grids in one group: ``of`` [columns, rows] says which of ``grids`` each weight belongs to."""

    grids: tuple[Fitted, ...]
    of: Tensor

    def nearest(self, values: Tensor, column: int | None = None) -> Tensor:
        """See :class:`Fitted`."""
        of = self.of if column is None else self.of[column]
        found = self.grids[0].nearest(values)
        for number, grid in enumerate(self.grids[1:], start=1):
            found = torch.where(of == number, grid.nearest(values), found)
        return found


def _half(values: Tensor) -> Tensor:
    return values.half().float()


def fit_uniform(
    values: Tensor, grid: Uniform, *, bits: int | None = None, shrink: Tensor | float = 1.0
) -> UniformLevels:
    """By the smallest and the largest of ``values`` [columns, rows], zero always among the levels.

    ``shrink`` (a number or [rows]) narrows the range. Where all values are 0 the step is the least one.
    """
    bits = grid.bits if bits is None else bits
    top = 2**bits - 1
    low, high = values.aminmax(dim=0)
    low, high = low.clamp(max=0) * shrink, high.clamp(min=0) * shrink
    if grid.symmetric:
        step = _half((torch.maximum(-low, high) / (top / 2)).clamp(min=_SMALLEST_STEP))
        zero = torch.full_like(step, 2 ** (bits - 1))
    else:
        step = ((high - low) / top).clamp(min=_SMALLEST_STEP)
        step = short_step(step, bits).float() if bits <= 4 else _half(step)
        zero = (-low / step).round().clamp(0, top)
    return UniformLevels(step, zero, top, 1 / step)


def fit_by_deviation(values: Tensor, grid: Uniform, whole: Tensor) -> UniformLevels:
    """One step for the whole matrix: ``deviations`` root mean squares of ``whole`` to either side (QuIP).

    The levels lie evenly around 0, which is none of them.
    """
    assert grid.deviations is not None
    top = 2**grid.bits - 1
    reach = grid.deviations * whole.square().mean().sqrt()
    step = _half((2 * reach / top).clamp(min=_SMALLEST_STEP)).expand(values.shape[-1])
    return UniformLevels(step, torch.full_like(step, top / 2), top, 1 / step)


def fit_salient_uniform(values: Tensor, grid: Uniform, bits: int, salience: Tensor) -> UniformLevels:
    """The range, of nine, whose error is least when salient weights and others each count by their mean.

    Salient are weights whose salience [columns, rows] lies three deviations above the group's mean.
    """
    salient = (salience > salience.mean() + 3 * salience.std()).float()
    counts = salient.sum(dim=0).clamp(min=1), (1 - salient).sum(dim=0).clamp(min=1)
    best = torch.full_like(values[0], torch.inf)
    chosen = torch.ones_like(values[0])
    for shrink in _SHRINKS.tolist():
        error = (fit_uniform(values, grid, bits=bits, shrink=shrink).nearest(values) - values).square()
        both = (error * salient).sum(dim=0) / counts[0] + (error * (1 - salient)).sum(dim=0) / counts[1]
        better = both < best
        best, chosen = torch.where(better, both, best), torch.where(better, shrink, chosen)
    return fit_uniform(values, grid, bits=bits, shrink=chosen)


def mean_magnitude(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of |values| [columns, rows] over the columns, of ``mask`` only: [rows], half precision."""
    if mask is None:
        return _half(values.abs().mean(dim=0))
    return _half((values.abs() * mask).sum(dim=0) / mask.sum(dim=0).clamp(min=1))


def fit_binary(values: Tensor, mask: Tensor | None = None) -> Signed:
    """The magnitude that minimises the squared error."""
    return Signed(mean_magnitude(values, mask))


def fit_residual_binary(values: Tensor, mask: Tensor | None = None) -> Table:
    """The best magnitude, then the best one of what it leaves."""
    first = mean_magnitude(values, mask)
    left = values - torch.where(values < 0, -first, first)
    second = mean_magnitude(left, mask)
    return Table(
        torch.stack((-first - second, second - first, first - second, first + second)).sort(dim=0)[0]
    )


def dual_levels(first: Tensor, second: Tensor) -> Tensor:
    """The four levels of two numbers [rows], ascending: [4, rows]."""
    return torch.stack((torch.zeros_like(first), first, second, first + second)).sort(dim=0)[0]


def fit_dual(values: Tensor) -> tuple[Tensor, Tensor]:
    """a1 = 2s and a2 = -s, both [rows] in half precision, for the s of least squared error."""
    largest = values.abs().amax(dim=0)
    best, chosen = torch.full_like(largest, torch.inf), torch.zeros_like(largest)
    for share in torch.linspace(0.05, 1.0, 20).tolist():
        for sign in (1.0, -1.0):
            scale = _half(sign * share * largest)
            error = (Table(dual_levels(2 * scale, -scale)).nearest(values) - values).square().sum(dim=0)
            better = error < best
            best, chosen = torch.where(better, error, best), torch.where(better, scale, chosen)
    return 2 * chosen, -chosen


def fit(values: Tensor, grid: Uniform | Binary | DualBinary | ResidualBinary) -> Fitted:
    """The grid fitted to a group of columns, without regard to anything else."""
    if isinstance(grid, Uniform):
        return fit_uniform(values, grid)
    if isinstance(grid, Binary):
        return fit_binary(values)
    if isinstance(grid, ResidualBinary):
        return fit_residual_binary(values)
    return Table(dual_levels(*fit_dual(values)))
