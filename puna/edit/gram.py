"""X^T X of rows that pass by: half of it is computed, the rest mirrored at the end; and what it tells."""

from __future__ import annotations

import torch
from torch import Tensor

_PANEL = 192  # columns of a product; narrower ones save more of the half, and run further below full speed


@torch.no_grad()
def add_gram(sums: Tensor, rows: Tensor) -> None:
    """Add X^T X of ``rows`` [rows, width] to the lower half of ``sums`` [width, width], in place.

    Some places above the diagonal are added to as well; what stands there means nothing until
    :func:`mirror`.
    """
    for start in range(0, len(sums), _PANEL):
        stop = min(start + _PANEL, len(sums))
        sums[start:stop, :stop].addmm_(rows[:, start:stop].T, rows[:, :stop])


@torch.no_grad()
def mirror(sums: Tensor) -> Tensor:
    """``sums`` [width, width] with the upper half that :func:`add_gram` left out put in its place."""
    return sums.copy_(sums.tril() + sums.tril(-1).T)


def relative_error(sums: Tensor, exact: Tensor, changed: Tensor) -> float:
    """Squared error of a matrix's outputs over the squared outputs, on the rows of ``sums`` [inputs, inputs].

    ``exact`` and ``changed`` are its weights [outputs, inputs].
    """
    left = changed - exact
    whole = float((exact * (exact @ sums)).sum())
    return float((left * (left @ sums)).sum()) / whole if whole > 0 else 0.0
