"""Which elements of a delta are kept: the first half of TIES, DARE, breadcrumbs and DELLA.

Pure functions of one part of a tensor and of a few numbers; what those need to be told about the whole
tensor, or the whole model, is found before by passes over its parts, none of which is held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn import functional

from puna.core.seeds import numpy_generator

Passes = Callable[[], Iterable[Tensor]]
"""Starts a pass over the parts of what is looked at."""
_PARTITIONED = 1 << 25  # elements: 128 MB
_COARSE, _FINE = 16, 15  # bits of a magnitude looked at by the first pass, and by the second


def largest(count: int, density: float) -> int:
    """How many of ``count`` elements a density keeps: rounded down, but at least one if it is above 0."""
    return min(count, max(1, int(density * count))) if density > 0 else 0


def magnitude_of_rank(passes: Passes, rank: int, count: int) -> float:
    """The magnitude with ``rank`` (from 1) when all ``count`` elements are sorted falling; exact.

    Few elements are partitioned in memory. Of more a magnitude's bits rise with it, so that counting them
    by their upper half and then, within the bin that holds the rank, by their lower half finds it in two
    passes; memory is a count for each bin. Infinity for rank 0.
    """
    if rank < 1:
        return math.inf
    if count <= _PARTITIONED:
        every = torch.cat([part.reshape(-1).abs() for part in passes()]).numpy()
        return float(numpy.partition(every, count - rank)[count - rank])
    counts = torch.zeros(1 << _COARSE, dtype=torch.int64)
    for part in passes():
        counts += torch.bincount(_bits(part) >> _FINE, minlength=1 << _COARSE)
    coarse, above = _bin_of(counts, rank)
    counts = torch.zeros(1 << _FINE, dtype=torch.int64)
    for part in passes():
        bits = _bits(part)
        inside = bits[bits >> _FINE == coarse]
        counts += torch.bincount(inside & ((1 << _FINE) - 1), minlength=1 << _FINE)
    fine, _ = _bin_of(counts, rank - above)
    return float(torch.tensor([coarse << _FINE | fine], dtype=torch.int32).view(torch.float32))


def _bits(part: Tensor) -> Tensor:
    """The magnitudes of float32 elements as the integers that their bits are."""
    return part.reshape(-1).abs().view(torch.int32)


def _bin_of(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the ``rank``-th element from above, and how many lie in bins above it."""
    falling = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(falling, rank))
    above = int(falling[place - 1]) if place else 0
    return len(counts) - 1 - place, above


def keep_from(delta: Tensor, threshold: float) -> Tensor:
    """Zero what is smaller than ``threshold`` (above 0); of equal magnitudes at it all are kept."""
    # hardshrink keeps what is larger than its limit, and a choice by a mask takes forty times as long.
    below = torch.nextafter(torch.tensor(threshold), torch.tensor(0.0))
    return functional.hardshrink(delta, float(below))


def keep_between(delta: Tensor, least: float, beyond: float) -> Tensor:
    """Zero what is smaller than ``least``, and what is as large as ``beyond`` or larger; least <= beyond."""
    return keep_from(delta, least) - keep_from(delta, beyond)


Draws = numpy.ndarray[Any, numpy.dtype[numpy.uint32]]


def draws(seed: int, label: object, name: str, number: int, count: int) -> Draws:
    """``count`` draws for part ``number`` of the tensor ``name`` of one model: whole numbers below 2^32.

    They depend on these names alone, not on the order in which tensors are worked through.
    """
    generator = numpy_generator(seed, "merge", label, name, number)
    return generator.bit_generator.random_raw(-(-count // 2)).view(numpy.uint32)[:count]


def drop(delta: Tensor, density: float, drawn: Draws, *, rescale: bool = True) -> Tensor:
    """DARE: keep each element with probability ``density``; what is kept is divided by it to ``rescale``.

    ``drawn`` are :func:`draws` for the part. Density 1 keeps every bit, density 0 nothing.
    """
    if density >= 1:
        return delta
    steps = round(density * (1 << 32))
    kept = torch.from_numpy((drawn < steps).astype(numpy.float32)).view(delta.shape)
    return delta * (kept.mul_((1 << 32) / steps) if rescale and steps else kept)


def magnitude_prune(
    delta: Tensor, density: float, epsilon: float, drawn: Draws, *, rescale: bool = True
) -> Tensor:
    """DELLA's MAGPRUNE of whole rows [rows, width]: the larger in its row an element, the likelier it stays.

    Probabilities rise evenly with the rank from density - epsilon to density + epsilon: the paper's epsilon
    is twice this one, which is mergekit's. What is kept is divided by its own probability to ``rescale``.
    Density 1 keeps every bit, density 0 nothing.
    """
    if density >= 1:
        return delta
    if density <= 0:
        return torch.zeros_like(delta)
    width = delta.shape[-1]
    order = delta.abs().argsort(dim=-1, stable=True)
    steps = torch.arange(width, dtype=torch.float32) / max(1, width - 1)
    rising = density - epsilon + 2 * epsilon * steps
    chances = torch.empty_like(delta).scatter_(-1, order, rising.expand_as(delta))
    limits = chances.double().mul_(1 << 32).numpy()
    kept = torch.from_numpy((drawn.reshape(limits.shape) < limits).astype(numpy.float32))
    return delta * (kept.div_(chances) if rescale else kept)
