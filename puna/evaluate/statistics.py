"""Paired bootstrap intervals and an exact sign test over documents or sentences.

A score of a corpus is a ratio of sums (bits over bytes), so its uncertainty comes from which
documents happen to be in the corpus. The bootstrap (Efron, 1979; paired for two systems as in
Koehn, 2004) draws documents with replacement, the same draw for every model, and reports
percentiles. All draws of a call are one matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy
import numpy.typing

from puna.core.errors import PunaError
from puna.core.seeds import numpy_generator

Floats = numpy.typing.NDArray[numpy.float64]
_WEIGHTS_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A value with the ends of its interval at ``level``.

    ``low`` and ``high`` are NaN where a single document makes an interval meaningless.
    """

    value: float
    low: float
    high: float
    level: float = 0.95

    @property
    def known(self) -> bool:
        """Whether the interval could be computed."""
        return not (math.isnan(self.low) or math.isnan(self.high))

    def metrics(self, name: str) -> dict[str, float]:
        """The value under ``name`` and, where known, its ends under ``name.low`` and ``name.high``."""
        found = {name: self.value}
        if self.known:
            found |= {f"{name}.low": self.low, f"{name}.high": self.high}
        return found


def resamples(count: int, draws: int, seed: int) -> Iterator[Floats]:
    """Yield matrices of bootstrap weights ``[some draws, count]``; ``draws`` rows in all.

    Row d says how often draw d took each item; rows sum to ``count``. The same arguments give the
    same weights, which is what makes comparisons over one corpus paired.
    """
    generator = numpy_generator(seed, "bootstrap", count)
    step = max(1, _WEIGHTS_AT_ONCE // max(count, 1))
    shares = numpy.full(count, 1.0 / count)
    for start in range(0, draws, step):
        rows = min(step, draws - start)
        yield generator.multinomial(count, shares, size=rows).astype(numpy.float64)


def percentile_interval(value: float, drawn: Floats, level: float = 0.95) -> Interval:
    """The percentile interval of ``drawn`` around the observed ``value``."""
    low, high = numpy.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), level)


def ratio(
    numerators: Floats, denominators: Floats, *, draws: int, seed: int, level: float = 0.95
) -> Interval:
    """Interval of ``sum(numerators) / sum(denominators)`` over items, both ``[items]``."""
    _check(draws, level, numerators, denominators)
    value = float(numerators.sum() / denominators.sum())
    if len(numerators) < 2:
        return Interval(value, math.nan, math.nan, level)
    drawn = [
        (weights @ numerators) / (weights @ denominators)
        for weights in resamples(len(numerators), draws, seed)
    ]
    return percentile_interval(value, numpy.concatenate(drawn), level)


def relative_change(after: Floats, before: Floats, *, draws: int, seed: int, level: float = 0.95) -> Interval:
    """Paired interval of ``sum(after) / sum(before) - 1``, both ``[items]`` measured on the same items.

    With bits of the same documents this is the relative change in bits per byte: the bytes cancel.
    """
    paired = ratio(after, before, draws=draws, seed=seed, level=level)
    return Interval(paired.value - 1, paired.low - 1, paired.high - 1, level)


def sign_test(differences: Floats) -> float:
    """Exact two-sided p-value that positive and negative differences are equally likely.

    Zero differences carry no sign and are left out (Dixon and Mood, 1946); with none left p is 1.
    """
    positive = int((differences > 0).sum())
    negative = int((differences < 0).sum())
    total = positive + negative
    if total == 0:
        return 1.0
    tail = sum(math.comb(total, k) for k in range(min(positive, negative) + 1))
    return min(1.0, float(2 * tail / 2**total))


def _check(draws: int, level: float, first: Floats, second: Floats) -> None:
    if first.shape != second.shape or first.ndim != 1 or len(first) == 0:
        raise PunaError(
            "a paired comparison needs the same items on both sides",
            found=f"{first.shape} and {second.shape}",
            expected="two equally long lists of at least one number",
        )
    if draws < 1 or not 0 < level < 1:
        raise PunaError(
            "bootstrap settings out of range",
            found=f"draws={draws}, level={level}",
            expected="draws of at least 1 and a level between 0 and 1",
        )
