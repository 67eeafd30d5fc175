"""How much an ordinary training forgets by the time it has learnt as much as another way of training.

Two ways of training are compared where they have learnt the same, not after the same number of steps: the
versions that one leaves on its course span a curve of (bits per byte of what is learnt, bits per byte of what
is to be kept), and the other way's version is set beside the place of that curve at its own bits of what is
learnt. Between two versions the curve is a straight line; before the first one it starts at the baseline. A
version that has learnt more than the curve ever does, or less than the baseline knew, has no place on it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class EqualGain:
    """Rises of what is to be kept over the baseline, in bits per byte: the version's, and the curve's."""

    rise: float
    curve_rise: float

    @property
    def share(self) -> float:
        """The version's rise over the curve's; NaN where the curve has not risen."""
        return self.rise / self.curve_rise if self.curve_rise > 0 else float("nan")


Point = tuple[float, float]
"""Bits per byte of what is learnt, and of what is to be kept."""


def equal_gain(baseline: Point, curve: Sequence[Point], version: Point) -> EqualGain:
    """The version beside the first place of ``baseline`` and ``curve`` that has learnt as much.

    Figures are NaN where there is no such place.
    """
    learnt, kept = version
    rise, nowhere = kept - baseline[1], float("nan")
    points = [baseline, *curve]
    if learnt > baseline[0]:
        return EqualGain(rise, nowhere)
    for (before, kept_before), (after, kept_after) in itertools.pairwise(points):
        if before >= learnt >= after:
            way = (before - learnt) / (before - after) if before > after else 0.0
            return EqualGain(rise, kept_before + way * (kept_after - kept_before) - baseline[1])
    return EqualGain(rise, nowhere)
