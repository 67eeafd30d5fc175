"""Planners: which grid a group of columns gets when a rounding comes to it, and what its storage takes.

The plain one fits the grid of the settings. Three mixes of system S18 give parts of a matrix more bits:

* bits by group (SliM-LLM, 2405.14917): the most salient groups get a bit more, as many of the least salient a
  bit less; how many is searched for. Simplified: by the squared error of the outputs under nearest rounding,
  not by the divergence of their distributions; groups are column groups of one width, a shorter last one
  keeps its bits.
* salient weights (PB-LLM, 2310.00034): a share of the weights, by magnitude or by the Hessian, is kept in 8
  bits with a step for each row; the others get the grid of the settings. The training that the paper adds is
  left out.
* salient columns (BiLLM, 2402.04291): of each block of columns the most salient get a residual binary grid,
  the others are split by magnitude in two parts with a magnitude each for every row; number and break are
  searched for by squared error. Simplified: errors are made good inside blocks too, not only between them,
  and the break is one of 16 shares of the block's largest magnitude.
"""

from __future__ import annotations

import torch
from torch import Tensor

from puna.edit.quantize.grids import (
    Fitted,
    Parts,
    UniformLevels,
    fit,
    fit_binary,
    fit_by_deviation,
    fit_residual_binary,
    fit_salient_uniform,
    fit_uniform,
)
from puna.edit.quantize.rounding import Moments
from puna.edit.quantize.settings import (
    Binary,
    BitsByGroup,
    DualBinary,
    ResidualBinary,
    SalientColumns,
    SalientWeights,
    Uniform,
)
from puna.edit.quantize.storage import Storage
from puna.model.uniform_grid import UniformGrid

HALF = 16  # bits of a step or a magnitude
SALIENT = Uniform(bits=8, group=None)


def group_starts(columns: int, group: int | None) -> list[int]:
    """Where groups of columns begin."""
    return list(range(0, columns, group or columns))


class PlainPlanner:
    """Fits the grid of the settings to each group; ``fitted`` are those so far."""

    def __init__(self, grid: Uniform | Binary | DualBinary | ResidualBinary, weights: Tensor) -> None:
        self.grid = grid
        self._whole = weights if isinstance(grid, Uniform) and grid.deviations else None
        self.columns, self.rows = weights.shape
        self.fitted: list[Fitted] = []

    def bounds(self, columns: int) -> list[int]:
        """See :class:`puna.edit.quantize.rounding.Planner`."""
        return [0] if self._whole is not None else group_starts(columns, self.grid.group)

    def begin(self, start: int, values: Tensor) -> Fitted:
        """See :class:`puna.edit.quantize.rounding.Planner`."""
        if self._whole is not None:
            assert isinstance(self.grid, Uniform)
            found: Fitted = fit_by_deviation(values, self.grid, self._whole)
        else:
            found = fit(values, self.grid)
        self.fitted.append(found)
        return found

    def storage(self) -> Storage:
        """Levels at the width of the grid, and what each row's grid takes for each group."""
        weights = self.columns * self.rows
        groups = len(self.bounds(self.columns)) * self.rows
        if isinstance(self.grid, Uniform):
            if self._whole is not None:
                return Storage(weights, weights * self.grid.bits, HALF)
            zero = 0 if self.grid.symmetric else self.grid.bits
            return Storage(weights, weights * self.grid.bits, groups * (HALF + zero))
        if isinstance(self.grid, Binary):
            return Storage(weights, weights, groups * HALF)
        return Storage(weights, 2 * weights, groups * 2 * HALF)

    def grids(self) -> UniformGrid | None:
        """The uniform grid of all rows, if that is what they lie on: a step and a zero point for each
        group.
        """
        levels = [found for found in self.fitted if isinstance(found, UniformLevels)]
        if not isinstance(self.grid, Uniform) or self._whole is not None or len(levels) < len(self.fitted):
            return None
        step = torch.stack([found.step for found in levels], dim=1).half()  # [rows, groups]
        zero = torch.stack([found.zero for found in levels], dim=1).to(torch.uint8)
        return UniformGrid(self.grid.bits, self.grid.group or self.columns, self.grid.symmetric, step, zero)


class BitsByGroupPlanner:
    """A number of bits for each group of columns, one bit about the grid's."""

    def __init__(self, mix: BitsByGroup, grid: Uniform, weights: Tensor, moments: Moments) -> None:
        self.mix, self.grid = mix, grid
        self.columns, self.rows = weights.shape
        self._salience = moments.salience(weights)
        self.bits = self._search(weights, moments)

    def _search(self, weights: Tensor, moments: Moments) -> dict[int, int]:
        """Bits by where a group begins: the number of pairs whose outputs are nearest to the exact ones."""
        starts = self.bounds(self.columns)
        group = self.grid.group or self.columns
        whole = [start for start in starts if start + group <= self.columns]
        order = sorted(whole, key=lambda start: -float(self._salience[start : start + group].sum()))
        errors = {
            bits: torch.cat([self._left(weights[start : start + group], bits) for start in starts])
            for bits in (self.grid.bits - 1, self.grid.bits, self.grid.bits + 1)
        }
        best, chosen = torch.inf, dict.fromkeys(starts, self.grid.bits)
        for pairs in range(len(whole) // 2 + 1):
            bits = dict.fromkeys(starts, self.grid.bits)
            bits |= dict.fromkeys(order[:pairs], self.grid.bits + 1)
            bits |= dict.fromkeys(order[len(order) - pairs :], self.grid.bits - 1)
            left = torch.cat([errors[bits[start]][start : start + group] for start in starts])
            cost = float(moments.error(left).sum())
            if cost < best:
                best, chosen = cost, bits
        return chosen

    def _left(self, values: Tensor, bits: int) -> Tensor:
        return fit_uniform(values, self.grid, bits=bits).nearest(values) - values

    def bounds(self, columns: int) -> list[int]:
        """See :class:`puna.edit.quantize.rounding.Planner`."""
        return group_starts(columns, self.grid.group)

    def begin(self, start: int, values: Tensor) -> Fitted:
        """See :class:`puna.edit.quantize.rounding.Planner`."""
        bits = self.bits[start]
        if self.mix.fit_salient:
            salience = self._salience[start : start + len(values)]
            return fit_salient_uniform(values, self.grid, bits, salience)
        return fit_uniform(values, self.grid, bits=bits)

    def storage(self) -> Storage:
        """Two bits say of a group which of three widths it has."""
        group = self.grid.group or self.columns
        levels = steps = 0
        for start, bits in self.bits.items():
            levels += min(group, self.columns - start) * self.rows * bits
            steps += self.rows * (HALF + (0 if self.grid.symmetric else bits))
        return Storage(self.columns * self.rows, levels, steps, 2 * len(self.bits))

    def grids(self) -> UniformGrid | None:
        """None: widths differ."""
        return None


def salient_mask(weights: Tensor, share: float, by: str, moments: Moments | None) -> Tensor:
    """The ``share`` of the weights [columns, rows] whose loss costs most, as a bool mask."""
    if by == "hessian":
        assert moments is not None
        scores = moments.salience(weights)
    else:
        scores = weights.abs()
    count = round(share * weights.numel())
    mask = torch.zeros(weights.numel(), dtype=torch.bool)
    mask[scores.flatten().topk(count).indices] = True
    return mask.view(weights.shape)


class SalientWeightsPlanner:
    """8 bits for a share of the weights, the grid of the settings for the others."""

    def __init__(
        self, mix: SalientWeights, grid: Uniform | Binary, weights: Tensor, moments: Moments | None
    ) -> None:
        self.grid = grid
        self.columns, self.rows = weights.shape
        self.salient = salient_mask(weights, mix.share, mix.by, moments)
        self._precise = fit_uniform(weights * self.salient, SALIENT)

    def bounds(self, columns: int) -> list[int]:
        """See :class:`puna.edit.quantize.rounding.Planner`."""
        return group_starts(columns, self.grid.group)

    def begin(self, start: int, values: Tensor) -> Fitted:
        """See :class:`puna.edit.quantize.rounding.Planner`."""
        salient = self.salient[start : start + len(values)]
        if isinstance(self.grid, Binary):
            rest: Fitted = fit_binary(values, ~salient)
        else:
            rest = fit_uniform(values * ~salient, self.grid)
        return Parts((rest, self._precise), salient.to(torch.uint8))

    def storage(self) -> Storage:
        """8 bits for the salient weights, the grid's for the others, and a bit for each that says which
        it is.
        """
        weights, salient = self.columns * self.rows, int(self.salient.sum())
        bits = self.grid.bits if isinstance(self.grid, Uniform) else 1
        zero = self.grid.bits if isinstance(self.grid, Uniform) and not self.grid.symmetric else 0
        groups = len(self.bounds(self.columns)) * self.rows
        steps = groups * (HALF + zero) + self.rows * (HALF + SALIENT.bits)
        return Storage(weights, 8 * salient + bits * (weights - salient), steps, weights)

    def grids(self) -> UniformGrid | None:
        """None: there are two."""
        return None


class SalientColumnsPlanner:
    """Residual binary for the salient columns of a block, two binary parts for the others."""

    def __init__(self, mix: SalientColumns, weights: Tensor, moments: Moments) -> None:
        self.mix = mix
        self.columns, self.rows = weights.shape
        self._moments = moments
        self.salient = 0  # columns

    def bounds(self, columns: int) -> list[int]:
        """See :class:`puna.edit.quantize.rounding.Planner`."""
        return group_starts(columns, self.mix.block)

    def begin(self, start: int, values: Tensor) -> Fitted:
        """See :class:`puna.edit.quantize.rounding.Planner`."""
        columns = self._choose(start, values)
        self.salient += int(columns.sum())
        mask = columns[:, None].expand_as(values)
        dense = ~mask & (values.abs() <= self._break(values, ~mask))
        of = torch.where(mask, 2, torch.where(dense, 0, 1)).to(torch.uint8)
        parts = (
            fit_binary(values, dense),
            fit_binary(values, ~mask & ~dense),
            fit_residual_binary(values, mask),
        )
        return Parts(parts, of)

    def _choose(self, start: int, values: Tensor) -> Tensor:
        """The salient columns of a block, a bool mask [columns]: as many as give the least squared error."""
        place = slice(start, start + len(values))
        scores = values.square().sum(dim=1) / self._moments.inverse_diagonal[place].square()
        order = scores.argsort(descending=True)
        importance = 1 / self._moments.factor.diagonal()[place].square()  # errors weigh as GPTQ counts them
        best, chosen = torch.inf, torch.zeros(len(values), dtype=torch.bool)
        for count in range(min(self.mix.most, len(values) - 1) + 1):
            mask = torch.zeros(len(values), dtype=torch.bool)
            mask[order[:count]] = True
            wide = mask[:, None].expand_as(values)
            rounded = torch.where(
                wide,
                fit_residual_binary(values, wide).nearest(values),
                fit_binary(values, ~wide).nearest(values),
            )
            cost = float(((rounded - values).square().sum(dim=1) * importance).sum())
            if cost < best:
                best, chosen = cost, mask
        return chosen

    def _break(self, values: Tensor, rest: Tensor) -> Tensor:
        """The magnitude that parts the weights of ``rest``, with least squared error."""
        magnitudes = values.abs()
        largest = (magnitudes * rest).max()
        best, chosen = torch.inf, largest
        for share in torch.linspace(0, 1, self.mix.breaks + 1)[1:].tolist():
            low = rest & (magnitudes <= share * largest)
            high = rest & ~low
            error = torch.where(low, fit_binary(values, low).magnitude, fit_binary(values, high).magnitude)
            cost = float(((error - magnitudes) * rest).square().sum())
            if cost < best:
                best, chosen = cost, share * largest
        return chosen

    def storage(self) -> Storage:
        """Two bits in salient columns and one elsewhere; a bit for each weight of the others says which part.

        Which columns are salient takes a bit for each; a block has four magnitudes for each row.
        """
        weights = self.columns * self.rows
        salient = self.salient * self.rows
        steps = len(self.bounds(self.columns)) * self.rows * 4 * HALF
        return Storage(weights, weights + salient, steps, weights - salient + self.columns)

    def grids(self) -> UniformGrid | None:
        """None: there are three."""
        return None
