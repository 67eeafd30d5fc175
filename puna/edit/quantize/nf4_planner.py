"""NF4 with shifted blocks: QLoRA's grid (2305.14314) and the calibration of IR-QLoRA (2402.05445). System
S18.

Blocks are 64 inputs of one output, all fitted before anything is rounded, because the scales of 256 blocks
are held in 8 bits together. Without a shift and to the nearest level the weights are those of
:mod:`puna.model.nf4` where rows are whole blocks; a last shorter block of a row is a block of its own here.

Shift: tau = median + f * (largest magnitude) for 2n + 1 values of f about 0, and 0 itself, the one whose 16
codes carry most entropy. tau is held in 8 bits, 256 blocks sharing a size, without a mean, so that 0 stays 0.
Where rounding tau has lost the gain, the block is not shifted: no block's codes carry less entropy than
NF4's. What differs from the reference: it searches about the median alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from puna.edit.quantize.grids import Fitted
from puna.edit.quantize.settings import Nf4
from puna.edit.quantize.storage import Storage
from puna.model import nf4
from puna.model.nf4_layout import BLOCK, SCALE_BLOCK
from puna.model.uniform_grid import UniformGrid

_REACH = 0.1 / 1.8482  # the largest f of the reference: a tenth over the normal quantile at 0.9677
_BLOCKS_AT_ONCE = 1 << 12


@dataclass(frozen=True)
class Nf4Levels:
    """level * ``stored`` + ``shift``, all [rows]; the code is that of (w - shift) / ``exact``."""

    exact: Tensor
    stored: Tensor
    shift: Tensor

    def nearest(self, values: Tensor, column: int | None = None) -> Tensor:
        """See :class:`puna.edit.quantize.grids.Fitted`."""
        scale = torch.where(self.exact > 0, self.exact, 1.0)
        codes = torch.bucketize((values - self.shift) / scale, _middles())
        return nf4.levels()[codes] * self.stored + self.shift


def _middles() -> Tensor:
    return (nf4.levels()[:-1] + nf4.levels()[1:]) / 2


class Nf4Planner:
    """Scales, and shifts if they are asked for, of all blocks of a matrix [columns, rows]."""

    def __init__(self, grid: Nf4, weights: Tensor) -> None:
        self.columns, self.rows = weights.shape
        self._shifted = grid.shift
        padded = functional.pad(weights.T, (0, -self.columns % BLOCK))
        blocks = padded.reshape(-1, BLOCK)  # [rows * groups, 64], as in the file
        counts = torch.full((len(blocks),), BLOCK)
        if self.columns % BLOCK:
            counts.view(self.rows, -1)[:, -1] = self.columns % BLOCK
        self.shift = shifts(blocks, counts, grid.points) if grid.shift else torch.zeros(len(blocks))
        inside = torch.arange(BLOCK) < counts[:, None]
        self.exact = ((blocks - self.shift[:, None]).abs() * inside).amax(dim=1)
        codes, sizes, mean = nf4.encode_scales(self.exact)
        self.stored = nf4.decode_scales(codes, sizes, mean)

    def bounds(self, columns: int) -> list[int]:
        """See :class:`puna.edit.quantize.rounding.Planner`."""
        return list(range(0, columns, BLOCK))

    def begin(self, start: int, values: Tensor) -> Fitted:
        """See :class:`puna.edit.quantize.rounding.Planner`."""
        place = start // BLOCK
        parts = (
            each.view(self.rows, -1)[:, place].contiguous() for each in (self.exact, self.stored, self.shift)
        )
        return Nf4Levels(*parts)

    def storage(self) -> Storage:
        """4 bits a weight, 8 a block and 32 for 256 blocks; the same again for shifts, less the mean of
        scales.
        """
        weights, blocks = self.columns * self.rows, len(self.exact)
        once = 8 * blocks + 32 * -(-blocks // SCALE_BLOCK)
        return Storage(weights, 4 * weights, once * (2 if self._shifted else 1) + 32)

    def grids(self) -> UniformGrid | None:
        """None: the levels are not evenly spaced."""
        return None


def entropy(blocks: Tensor, counts: Tensor, shift: Tensor) -> Tensor:
    """Entropy in bits of the 16 codes of each block [blocks, 64] after ``shift`` [blocks]; the first
    ``counts``.
    """
    inside = torch.arange(BLOCK) < counts[:, None]
    moved = (blocks - shift[:, None]) * inside
    scale = moved.abs().amax(dim=1)
    codes = torch.bucketize(moved / torch.where(scale > 0, scale, 1.0)[:, None], _middles())
    tally = torch.zeros(len(blocks), 16).scatter_add_(1, codes, inside.float())
    share = tally / counts[:, None]
    nats: Tensor = -torch.special.xlogy(share, share).sum(dim=1)
    return nats / math.log(2)


def shifts(blocks: Tensor, counts: Tensor, points: int) -> Tensor:
    """The shift of each block as it is stored, float32 [blocks]."""
    parts = zip(torch.split(blocks, _BLOCKS_AT_ONCE), torch.split(counts, _BLOCKS_AT_ONCE), strict=True)
    exact = torch.cat([_search(part, count, points) for part, count in parts])
    stored = _in_8_bits(exact)
    plain = entropy(blocks, counts, torch.zeros(len(blocks)))
    return torch.where(entropy(blocks, counts, stored) > plain, stored, 0.0)


def _search(blocks: Tensor, counts: Tensor, points: int) -> Tensor:
    inside = torch.arange(BLOCK) < counts[:, None]
    middle = torch.where(inside, blocks, torch.nan).nanmedian(dim=1).values
    largest = (blocks.abs() * inside).amax(dim=1)
    chosen = torch.zeros(len(blocks))
    best = entropy(blocks, counts, chosen)
    for factor in torch.linspace(-_REACH, _REACH, 2 * points + 1).tolist():
        tried = middle + factor * largest
        found = entropy(blocks, counts, tried)
        better = found > best
        best, chosen = torch.where(better, found, best), torch.where(better, tried, chosen)
    return chosen


def _in_8_bits(values: Tensor) -> Tensor:
    """Values as the dynamic 8-bit map and a size for each 256 of them leave them."""
    rows = functional.pad(values, (0, -len(values) % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
    sizes = rows.abs().amax(dim=1, keepdim=True)
    table = nf4.dynamic_map()
    codes = torch.bucketize(rows / torch.where(sizes > 0, sizes, 1.0), (table[:-1] + table[1:]) / 2)
    return (table[codes] * sizes).flatten()[: len(values)]
