"""Roundings that make good what they leave: GPTQ, and LDLQ, its twin that looks back.

System S18. GPTQ (2210.17323): with U the upper Cholesky factor of the inverse Hessian, column i is rounded
and its error over U_ii, times U_ij, is taken from each later column j. LDLQ (2307.13304): with H = (U + I) D
(U + I)^T, U strictly upper, column k is rounded after the errors of the columns before it, times U_jk, were
added to it. Without groups the two give the same weights.

Weights stand transposed, [columns, rows]. All matrices that read the same input go through together, rows
below rows: the loop over columns is the cost, and its width costs little. Columns go in blocks of 32; what
lies behind a block is updated once for all of its errors.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from puna.core.errors import PunaError
from puna.edit.quantize.grids import Fitted

_BLOCK = 32


class Planner(Protocol):
    """Fits grids group by group, on weights as they stand when their turn comes."""

    def bounds(self, columns: int) -> list[int]:
        """Where groups begin, 0 first; groups lie in whole blocks unless there is one."""

    def begin(self, start: int, values: Tensor) -> Fitted:
        """The grid of the group that begins with column ``start``, whose weights are ``values``."""


class Moments:
    """X X^T of what enters some matrices, [columns, columns] float32, and what roundings make of it.

    A dead input was 0 in all of the calibration text. Its diagonal becomes the mean, so that the matrix can
    be inverted, and weights on it are rounded from 0. ``damping`` means of the diagonal are added to it.
    """

    def __init__(self, sums: Tensor, damping: float = 0.01) -> None:
        self.sums = sums
        settled = sums.clone()
        diagonal = settled.diagonal()
        self.dead = diagonal <= 0
        mean = diagonal.mean()
        diagonal[self.dead] = mean if mean > 0 else 1.0
        diagonal += damping * mean
        self.settled = settled

    @classmethod
    def of_settled(cls, settled: Tensor) -> Moments:
        """Of moments that are damped already."""
        return cls(settled, damping=0.0)

    @functools.cached_property
    def factor(self) -> Tensor:
        """Upper Cholesky factor of the inverse."""
        for more in (0.0, 0.1, 1.0):
            tried = self.settled.clone()
            tried.diagonal().add_(more * self.settled.diagonal().mean())
            lower, failed = torch.linalg.cholesky_ex(tried)
            if int(failed):
                continue
            found = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            upper: Tensor = found.L
            if not int(found.info):
                return upper
        diagonal = self.settled.diagonal()
        raise PunaError(
            "the second moments of the activations cannot be inverted",
            found=f"a diagonal from {diagonal.min():g} to {diagonal.max():g}",
            fix="use more calibration text, or a larger damping",
        )

    @functools.cached_property
    def feedback(self) -> Tensor:
        """U + I of H = (U + I) D (U + I)^T: the Cholesky factorisation of H read from its end."""
        upper: Tensor = torch.linalg.cholesky(self.settled.flip(0, 1)).flip(0, 1)
        return upper / upper.diagonal()

    @functools.cached_property
    def inverse_diagonal(self) -> Tensor:
        """The diagonal of the inverse, [columns]."""
        return self.factor.square().sum(dim=0)

    def salience(self, weights: Tensor) -> Tensor:
        """How much depends on each weight [columns, rows]: w^2 / [H^-1]_jj^2, as S18's papers have it."""
        return weights.square() / self.inverse_diagonal.square()[:, None]

    def error(self, left: Tensor) -> Tensor:
        """Squared error of the outputs, summed over the calibration text, of errors [columns, rows]:
        [rows].
        """
        return (left * (self.sums @ left)).sum(dim=0)


def gptq(weights: Tensor, moments: Moments, planner: Planner) -> Tensor:
    """Rounded weights [columns, rows], columns in the order they stand in.

    The grid of a group is fitted when its first column's turn comes, on weights that were updated until then.
    """
    found = weights.clone()
    found[moments.dead] = 0
    starts = planner.bounds(len(found))
    fitted: Fitted | None = None
    group = 0
    for start, stop in _blocks(len(found), starts):
        if start in starts:
            fitted, group = planner.begin(start, found[start : _next(starts, start, len(found))]), start
        assert fitted is not None
        _round_block(found, start, stop, moments.factor, [(fitted, at - group) for at in range(start, stop)])
    return found


def gptq_by_activation(weights: Tensor, moments: Moments, planner: Planner) -> Tensor:
    """Rounded weights [columns, rows], the inputs of largest second moment first (act-order).

    All groups are fitted beforehand, on the weights as they were (static groups).
    """
    exact = weights.clone()
    exact[moments.dead] = 0
    starts = planner.bounds(len(exact))
    fitted = [
        (grid, column)
        for start in starts
        for end in [_next(starts, start, len(exact))]
        for grid in [planner.begin(start, exact[start:end])]
        for column in range(end - start)
    ]
    order = moments.settled.diagonal().argsort(descending=True)
    turned = Moments.of_settled(moments.settled[order][:, order])
    found = exact[order]
    for start, stop in _blocks(len(found), [0]):
        places = order[start:stop].tolist()
        _round_block(found, start, stop, turned.factor, [fitted[place] for place in places])
    exact[order] = found
    return exact


def _round_block(
    found: Tensor, start: int, stop: int, factor: Tensor, grids: Sequence[tuple[Fitted, int]]
) -> None:
    """Round columns ``start`` to ``stop`` in place and make their errors good in those that follow.

    ``grids`` has for each column its grid and its place in the grid's group.
    """
    errors = torch.empty(stop - start, found.shape[1])
    for column in range(start, stop):
        now = found[column]
        grid, place = grids[column - start]
        rounded = grid.nearest(now, place)
        error = torch.sub(now, rounded, out=errors[column - start]).div_(factor[column, column])
        now.copy_(rounded)
        if column + 1 < stop:
            found[column + 1 : stop].addr_(factor[column, column + 1 : stop], error, alpha=-1)
    if stop < len(found):
        found[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)


def ldlq(weights: Tensor, moments: Moments, planner: Planner) -> Tensor:
    """Rounded weights [columns, rows] by linear feedback; arguments as of :func:`gptq`.

    Grids are fitted on the weights with the feedback that is known when their group begins.
    """
    feedback = moments.feedback
    exact = weights.clone()
    exact[moments.dead] = 0
    found = torch.empty_like(exact)
    errors = torch.zeros_like(exact)
    starts = planner.bounds(len(found))
    fitted: Fitted | None = None
    group = 0
    for start, stop in _blocks(len(found), starts):
        if start in starts:
            group = start
            end = _next(starts, start, len(found))
            known = exact[start:end] + feedback[:start, start:end].T @ errors[:start]
            fitted = planner.begin(start, known)
        assert fitted is not None
        known = exact[start:stop] + feedback[:start, start:stop].T @ errors[:start]
        for column in range(start, stop):
            inside = feedback[start:column, column] @ errors[start:column] if column > start else 0.0
            found[column] = fitted.nearest(known[column - start] + inside, column - group)
            errors[column] = exact[column] - found[column]
    return found


def nearest(weights: Tensor, planner: Planner) -> Tensor:
    """Each weight to its nearest level."""
    starts = planner.bounds(len(weights))
    parts = []
    for start in starts:
        group = weights[start : _next(starts, start, len(weights))]
        parts.append(planner.begin(start, group).nearest(group))
    return torch.cat(parts)


def _next(starts: list[int], start: int, columns: int) -> int:
    place = starts.index(start)
    return starts[place + 1] if place + 1 < len(starts) else columns


def _blocks(columns: int, starts: list[int]) -> list[tuple[int, int]]:
    """Blocks of at most 32 columns of which none lies in two groups."""
    edges = sorted({*starts, *range(0, columns, _BLOCK), columns})
    return list(itertools.pairwise(edges))
