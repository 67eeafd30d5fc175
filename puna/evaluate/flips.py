"""What an update of a model breaks and mends, item by item, beside what its mean score says (system S58).

Of two versions that answered the same items (MUSCLE, arXiv:2407.09435): the negative flip rate NFR is the
share that the first had right and the second has wrong, the positive one PFR the reverse, so that
``accuracy(v1) - accuracy(v2) = NFR - PFR``. NFR_mc counts every wrong answer of the second that is not the
first's answer: what a person who knew the first version would trip over. Of continuous scores S, where higher
is better, D = S(v2) - S(v1) takes the place: PFR = P(D > 0), NFR = P(D < 0), and how much is gained and lost
there on the mean. Every rate has a paired bootstrap interval over the items, and the difference of
accuracies the exact sign test over the flips, which is McNemar's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from puna.core.errors import PunaError
from puna.evaluate.statistics import Floats, Interval, ratio, sign_test


def share(flags: Floats, *, draws: int, seed: int) -> Interval:
    """The mean of ``flags`` [items] with its interval."""
    return ratio(flags, numpy.ones(len(flags)), draws=draws, seed=seed)


@dataclass(frozen=True)
class Flips:
    """Of answers: accuracies of both versions, their difference, flip rates; ``sign_p`` of the difference."""

    before: Interval
    after: Interval
    change: Interval  # after - before
    negative: Interval
    positive: Interval
    negative_mc: Interval
    sign_p: float
    items: int

    def metrics(self, name: str) -> dict[str, float]:
        """By flat dotted names that end in ``name``."""
        return {
            **self.change.metrics(f"accuracy_change.{name}"),
            **self.negative.metrics(f"nfr.{name}"),
            **self.positive.metrics(f"pfr.{name}"),
            **self.negative_mc.metrics(f"nfr_mc.{name}"),
            f"flips_p.{name}": self.sign_p,
        }


def flips(
    before: Sequence[int], after: Sequence[int], gold: Sequence[int], *, draws: int, seed: int
) -> Flips:
    """Compare the answers of two versions to the same items; equal numbers are equal answers."""
    if not len(before) == len(after) == len(gold):
        raise PunaError(
            "flips need the same items in both versions",
            found=f"{len(before)}, {len(after)} and {len(gold)} answers",
        )
    first, second, true = numpy.asarray(before), numpy.asarray(after), numpy.asarray(gold)
    was, now = first == true, second == true  # [items]

    def rate(flags: numpy.typing.NDArray[numpy.generic]) -> Interval:
        return share(flags.astype(numpy.float64), draws=draws, seed=seed)

    difference = now.astype(numpy.float64) - was.astype(numpy.float64)
    return Flips(
        before=rate(was),
        after=rate(now),
        change=rate(difference),
        negative=rate(was & ~now),
        positive=rate(~was & now),
        negative_mc=rate(~now & (first != second)),
        sign_p=sign_test(difference),
        items=len(true),
    )


@dataclass(frozen=True)
class Moves:
    """Of continuous scores: shares that rose and fell, and by how much on the mean of those (0 of none)."""

    positive: Interval
    negative: Interval
    gain: float
    regression: float

    def metrics(self, name: str) -> dict[str, float]:
        """By flat dotted names that end in ``name``."""
        return {
            **self.positive.metrics(f"risen.{name}"),
            **self.negative.metrics(f"fallen.{name}"),
            f"gain.{name}": self.gain,
            f"regression.{name}": self.regression,
        }


def moves(before: Floats, after: Floats, *, draws: int, seed: int) -> Moves:
    """Compare the scores [items] of two versions, higher being better."""
    change = after - before
    up, down = change > 0, change < 0
    return Moves(
        positive=share(up.astype(numpy.float64), draws=draws, seed=seed),
        negative=share(down.astype(numpy.float64), draws=draws, seed=seed),
        gain=float(change[up].mean()) if up.any() else 0.0,
        regression=float(-change[down].mean()) if down.any() else 0.0,
    )
