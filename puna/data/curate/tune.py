"""Bounds of gates from what a pool stores: the mean and some standard deviations (S50, arXiv:2309.02033).

Data-Juicer's tool rewrites every bound of a recipe so, whatever the signal is like. A signal that is skewed
gets a least value that nothing has, a negative length for instance: look at the distribution first
(``puna data analyze``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy
from numpy.typing import NDArray

from puna.core.errors import PunaError
from puna.data.curate.gates import Gate, reduced
from puna.data.curate.pool import Pool

_LOWER, _UPPER = ("minimum", "above"), ("maximum", "below")


def sigma_bounds(gate: Gate, values: NDArray[numpy.float64], sigmas: float) -> dict[str, float]:
    """The bounds that a gate has, moved to the mean of ``values`` less or plus ``sigmas`` deviations.

    Null values do not count; the deviation is that of a sample. Nothing, if there are fewer than two.
    """
    known = values[~numpy.isnan(values)]
    if len(known) < 2:
        return {}
    mean, deviation = float(known.mean()), float(known.std(ddof=1))
    given = gate.given()
    bounds = {key: mean - sigmas * deviation for key in _LOWER if key in given}
    return bounds | {key: mean + sigmas * deviation for key in _UPPER if key in given}


def tuned_gates(pool: Pool, sigmas: float = 3.0) -> dict[str, dict[str, float]]:
    """By gate, its bounds anew, for the parameter ``gates`` of the stage ``curate``.

    Gates by quantiles, and those whose bounds say yes or no (both 0 or 1), are left alone.
    """
    if not sigmas > 0 or not math.isfinite(sigmas):
        raise PunaError("sigmas is a number above 0", found=sigmas)
    if not pool.everything:
        raise PunaError(
            "the pool has signals only of documents that came to their gates",
            where=pool.path,
            fix="make it with short_circuit=false",
        )
    tuned: dict[str, dict[str, float]] = {}
    shards = pool.shards()
    for gate in pool.pipeline.gates():
        if gate.needs_all or set(gate.given().values()) <= {0.0, 1.0}:
            continue
        bounds = sigma_bounds(gate, _stored(pool, gate, shards), sigmas)
        if bounds:
            tuned[gate.name] = bounds
    return tuned


def _stored(pool: Pool, gate: Gate, shards: Sequence[str]) -> NDArray[numpy.float64]:
    parts = []
    for shard in shards:
        signals = {name: pool.signal(shard, name) for name in gate.signals()}
        parts.append(reduced(gate, signals, pool.count(shard)))
    return numpy.concatenate(parts) if parts else numpy.zeros(0)


def as_yaml(tuned: Mapping[str, Mapping[str, float]]) -> str:
    """The bounds as a part of a recipe."""
    lines = ["gates:"]
    for name, bounds in tuned.items():
        inside = ", ".join(f"{key}: {value:.6g}" for key, value in bounds.items())
        lines.append(f"  {name}: {{{inside}}}")
    return "\n".join(lines) + "\n"
