"""A cheap guess of what a child would measure: ridge regression on its one-hot genes.

System S29, the predictors of LINAS (Cummings and others 2022): one for each objective,
fitted anew whenever children were measured. Strength of the penalty: the one of a few whose leave-one-out
error is the smallest, which ridge gives in closed form (Allen's PRESS). In numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[numpy.float64]

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Penalties that are tried, for features of 0 and 1."""


@dataclass(frozen=True)
class Ridge:
    """``weights`` [features] and the means that they go from; ``penalty`` is the one that was chosen."""

    weights: Floats
    feature_means: Floats
    mean: float
    penalty: float

    @classmethod
    def fit(cls, features: Floats, values: Floats, penalties: Sequence[float] = PENALTIES) -> Ridge:
        """Fit ``values`` [rows] on ``features`` [rows, features]; the mean is not penalised."""
        means, mean = features.mean(0), float(values.mean())
        centred, wanted = features - means, values - mean
        left, sizes, right = numpy.linalg.svd(centred, full_matrices=False)
        along = left.T @ wanted  # [rank]
        best: tuple[float, float] | None = None
        for penalty in penalties:
            shrink = sizes**2 / (sizes**2 + penalty)
            leverage = (left**2) @ shrink + 1 / len(values)  # the mean is fitted too
            missed = wanted - left @ (shrink * along)
            error = float(numpy.mean((missed / numpy.maximum(1 - leverage, 1e-9)) ** 2))
            if best is None or error < best[0]:
                best = (error, penalty)
        assert best is not None
        weights = right.T @ (sizes / (sizes**2 + best[1]) * along)
        return cls(weights, means, mean, best[1])

    def __call__(self, features: Floats) -> Floats:
        """Guesses [rows] for ``features`` [rows, features]."""
        guesses: Floats = (features - self.feature_means) @ self.weights + self.mean
        return guesses


def rank_correlation(first: Sequence[float] | Floats, second: Sequence[float] | Floats) -> float:
    """Spearman's correlation of two lists, equal numbers sharing their mean rank; 0 if one is constant."""
    one, other = _ranks(numpy.asarray(first, dtype=float)), _ranks(numpy.asarray(second, dtype=float))
    one, other = one - one.mean(), other - other.mean()
    size = float(numpy.sqrt((one**2).sum() * (other**2).sum()))
    return float((one * other).sum()) / size if size else 0.0


def _ranks(values: Floats) -> Floats:
    _, places, counts = numpy.unique(values, return_inverse=True, return_counts=True)
    ends = numpy.cumsum(counts)
    ranks: Floats = ((ends - counts + ends - 1) / 2)[places]
    return ranks
