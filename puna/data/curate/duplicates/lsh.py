"""Locality-sensitive hashing in bands: how many bands of how many rows for a similarity, and what they find.

Two documents whose signatures agree in each row with probability J share a band of r rows with
probability J^r, and at least one of b bands with 1 - (1 - J^r)^b. The solver takes the pair (b, r) with
b r <= permutations that has the smallest sum of false positives (below the threshold) and false negatives
(above it), both as integrals over J, as datasketch, RedPajama-V2 (arXiv:2411.12372) and Data-Juicer
(arXiv:2309.02033) do; here by Gauss and Legendre's rule at 64 points. 128 permutations give 1 x 128, 5 x 25,
9 x 13, 14 x 9 for J = 1.0, .9, .8, .7; 256 give 25 x 10 for .7.
"""

from __future__ import annotations

from functools import lru_cache

import numpy
from numpy.typing import NDArray

from puna.core.errors import PunaError

_POINTS = 64


def found(similarity: float, bands: int, rows: int) -> float:
    """The probability that two documents of that Jaccard similarity share at least one band."""
    return float(1.0 - (1.0 - similarity**rows) ** bands)


@lru_cache(maxsize=64)
def bands_and_rows(threshold: float, permutations: int) -> tuple[int, int]:
    """The (bands, rows) with bands x rows <= permutations whose errors around ``threshold`` are smallest.

    False positives and false negatives weigh the same. Of equally good ones the first with fewer bands, then
    fewer rows.
    """
    if not 0.0 < threshold <= 1.0:
        raise PunaError(
            "a threshold of similarity lies above 0 and at most at 1", where="threshold", found=threshold
        )
    if permutations < 1:
        raise PunaError("at least one permutation is needed", where="permutations", found=permutations)
    best, error = (1, 1), float("inf")
    for bands in range(1, permutations + 1):
        rows = numpy.arange(1, permutations // bands + 1)
        errors = _below(threshold, bands, rows) + _above(threshold, bands, rows)
        place = int(numpy.argmin(errors))
        if errors[place] < error:
            best, error = (bands, int(rows[place])), float(errors[place])
    return best


def _below(threshold: float, bands: int, rows: NDArray[numpy.int64]) -> NDArray[numpy.float64]:
    """False positives: the integral of what is found from 0 to the threshold, for each number of rows."""
    return _integral(0.0, threshold, bands, rows)


def _above(threshold: float, bands: int, rows: NDArray[numpy.int64]) -> NDArray[numpy.float64]:
    """False negatives: the integral of what is missed from the threshold to 1, for each number of rows."""
    return (1.0 - threshold) - _integral(threshold, 1.0, bands, rows)


def _integral(low: float, high: float, bands: int, rows: NDArray[numpy.int64]) -> NDArray[numpy.float64]:
    nodes, weights = _gauss()
    middle, half = (high + low) / 2, (high - low) / 2
    at = middle + half * nodes  # [points]
    values = 1.0 - (1.0 - at[None, :] ** rows[:, None]) ** bands  # [rows, points]
    return half * (values @ weights)


@lru_cache(maxsize=1)
def _gauss() -> tuple[NDArray[numpy.float64], NDArray[numpy.float64]]:
    nodes, weights = numpy.polynomial.legendre.leggauss(_POINTS)
    return nodes, weights
