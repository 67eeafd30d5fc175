"""How the deltas of several models become one: the second half of the merge methods.

Pure functions over the stack of one part's deltas, a list of float32 tensors of one shape, or, for
:func:`mixture` and :func:`arc`, over the weights themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_SINGULAR = 1e-6


def weighted_sum(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_k w_k delta_k; a weight of 0 leaves its delta out."""
    pairs = [(delta, weight) for delta, weight in zip(deltas, weights, strict=True) if weight]
    if not pairs:
        return torch.zeros_like(deltas[0])
    (delta, weight), *others = pairs
    total = delta * weight  # not added to zeros, which would be one more pass over memory
    for delta, weight in others:
        total.add_(delta, alpha=weight)
    return total


def divisor(weights: Sequence[float]) -> float:
    """What a normalised sum is divided by: the weights' sum, or 1 where that is as good as zero."""
    total = math.fsum(weights)
    return 1.0 if abs(total) < 1e-8 else total


def mixture(models: Sequence[Tensor], weights: Sequence[float], *, normalize: bool) -> Tensor:
    """sum_k w_k theta_k, the weights divided by their sum to ``normalize`` (model soups, 2203.05482)."""
    by = math.fsum(weights) if normalize else 1.0
    return weighted_sum(models, [weight / by for weight in weights])


def disjoint_mean(
    deltas: Sequence[Tensor], weights: Sequence[float], *, normalize: bool, elect: str = "sum"
) -> Tensor:
    """TIES after trimming: elect a sign for each element, and combine the deltas that have it (2306.01708).

    The sign is that of the weighted sum, or with ``elect`` "count" of the number of models on each side; a
    draw counts as positive. ``normalize`` divides by the weights of those that agree. Zeros agree with none.
    """
    # Sums of what is above zero and of what is below; no masks, with which torch takes ten times as long.
    above, below = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    takes_above, takes_below, count = (torch.zeros_like(deltas[0]) for _ in range(3))
    for delta, weight in zip(deltas, weights, strict=True):
        if not weight:
            continue
        value = delta * weight
        above.add_(value.clamp_min(0))
        below.add_(value.clamp_max(0))
        if normalize or elect == "count":
            sign = value.sign_()
            count.add_(sign)
            takes_above.add_(sign.clamp_min(0), alpha=weight)
            takes_below.add_(sign.clamp_max(0), alpha=-weight)
    negative = (count if elect == "count" else above + below).sign_().clamp_max_(0).neg_()  # 1 or 0
    positive = 1 - negative
    merged = above.mul_(positive).add_(below.mul_(negative))
    if not normalize:
        return merged
    by = takes_above.mul_(positive).add_(takes_below.mul_(negative))
    return merged.div_(by.add_(1 - by.sign().abs_()))  # by 1 where nobody agrees


def weighted_by(deltas: Sequence[Tensor], importance: Sequence[Tensor]) -> Tensor:
    """sum_k F_k delta_k / sum_k F_k element by element: Fisher merging, seen from the base (2111.09832)."""
    total, by = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, importance, strict=True):
        total.addcmul_(delta, weight)
        by.add_(weight)
    return total.div_(torch.where(by == 0, 1.0, by))


def regression_mean(deltas: Sequence[Tensor], grams: Sequence[Tensor], off_diagonal: float = 1.0) -> Tensor:
    """(sum_k D_k G_k)(sum_k G_k)^-1 of deltas D [out, in] and Gram matrices G [in, in] (RegMean, 2212.09849).

    The merge whose outputs are nearest to each model's own on its own inputs; float64, and the pseudo-inverse
    where the inputs do not span the space. Zeros where no model had an input. What stands off the diagonals
    is multiplied by ``off_diagonal``, the paper's regularisation.
    """
    sum_of_grams, right = torch.zeros(()), torch.zeros(())
    for delta, gram in zip(deltas, grams, strict=True):
        eased = gram.double() * off_diagonal
        eased.diagonal().copy_(gram.diagonal())
        sum_of_grams, right = sum_of_grams + eased, right + delta.double() @ eased
    scale = sum_of_grams.diagonal().mean()
    if not scale > 0:
        return torch.zeros_like(deltas[0])
    # The system is symmetric: X S = R is S X^T = R^T.
    try:
        factor = torch.linalg.cholesky(sum_of_grams)
        merged: Tensor = torch.cholesky_solve(right.T, factor).T
    except RuntimeError:  # not positive definite
        merged = right @ torch.linalg.pinv(sum_of_grams, hermitian=True)
    return merged.to(deltas[0].dtype)


def stock_ratio(products: Tensor) -> Tensor:
    """Model Stock's t = N cos / (1 + (N-1) cos) out of the deltas' inner products [N, N, ...] (2403.19522).

    cos is the mean over pairs. No ratio exists where the denominator vanishes, and there t is 0: the base.
    """
    count = products.shape[0]
    norms = products.diagonal(dim1=0, dim2=1).sqrt()  # [..., N]
    norms = norms.movedim(-1, 0) if norms.dim() > 1 else norms
    pairs = [
        (products[a, b] / (norms[a] * norms[b]).clamp(min=1e-30)).clamp(-1, 1)
        for a in range(count)
        for b in range(a + 1, count)
    ]
    cosine = torch.stack(pairs).mean(0)
    below = 1 + (count - 1) * cosine
    singular = below.abs() < _SINGULAR
    return torch.where(singular, 0.0, count * cosine / torch.where(singular, 1.0, below))


def arc_weights(t: float, first: float, second: float, product: float) -> tuple[float, float]:
    """The weights that SLERP gives two vectors with these squared norms and this inner product.

    sin((1-t) a) / sin a and sin(t a) / sin a for the angle a between them, with the norms left as they are.
    Vectors on one line, or of which one is zero, are mixed linearly: 1 - t and t.
    """
    norms = math.sqrt(first) * math.sqrt(second)
    if not norms:
        return 1 - t, t
    cosine = max(-1.0, min(1.0, product / norms))
    sine = math.sqrt((1 - cosine) * (1 + cosine))
    if sine < 1e-4:  # both formulas agree here to the rounding of float32, or no arc is the shortest
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / sine, math.sin(t * angle) / sine
