"""Does what was drawn follow the law it should? Pearson's chi-square, cells too small for it pooled."""

from __future__ import annotations

import torch
from torch import Tensor

from puna.core.errors import PunaError

LEAST_EXPECTED = 5.0
"""Draws that a cell must expect; rarer ones are counted together."""


def chi_square(counts: Tensor, law: Tensor) -> tuple[float, float]:
    """Statistic and p-value of ``counts`` [n] under the probabilities ``law`` [n].

    Cells that expect fewer than five draws are one cell, and where that is still too little it joins
    the smallest of the others. A count where the law has no probability gives a p-value of 0.
    """
    counts, law = counts.double(), law.double()
    total = float(counts.sum())
    if total < 2 * LEAST_EXPECTED:
        raise PunaError(
            "too few draws to tell", found=int(total), expected=f"{int(2 * LEAST_EXPECTED)} or more"
        )
    if bool((counts[law <= 0] > 0).any()):
        return float("inf"), 0.0
    expected = total * law / law.sum()
    large = expected >= LEAST_EXPECTED
    seen = [*counts[large].tolist(), float(counts[~large].sum())]
    wanted = [*expected[large].tolist(), float(expected[~large].sum())]
    if wanted[-1] < LEAST_EXPECTED and len(wanted) > 1:
        rest, rest_wanted = seen.pop(), wanted.pop()
        smallest = wanted.index(min(wanted))
        seen[smallest] += rest
        wanted[smallest] += rest_wanted
    if len(wanted) < 2:
        return 0.0, 1.0  # one cell holds everything
    statistic = sum((one - other) ** 2 / other for one, other in zip(seen, wanted, strict=True))
    half = torch.tensor([(len(wanted) - 1) / 2, statistic / 2], dtype=torch.float64)
    return statistic, float(torch.special.gammaincc(half[0], half[1]))
