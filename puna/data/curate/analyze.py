"""What a pool's page shows: how signals are distributed, what each step removed, and how documents flowed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy
from numpy.typing import NDArray

from puna.data.curate.account import READ, WRITE, account
from puna.data.curate.execute import Count
from puna.data.curate.gates import bounds_for, reduced
from puna.data.curate.operator import Spans
from puna.data.curate.pool import Pool
from puna.data.curate.report import report_of

_BINS = 48
_MOST = 2_000_000  # values of a signal that its distribution is drawn from
_TAIL = 0.005  # share at either end that a distribution's axis leaves out
_WIDE = 100.0  # a whole number's axis is logarithmic from here on
_EXAMPLES = 4
_SHOWN_CHARACTERS = 320


@dataclass(frozen=True)
class Distribution:
    """How a signal is distributed over the documents that have it.

    ``counts`` [bins] between ``edges`` [bins + 1]; the outermost bins hold what lies beyond them, too.
    ``bounds`` are those of the gates that read it, by the gate's name. ``logarithmic``: bins are equally
    wide in log(1 + x).
    """

    signal: str
    documents: int
    null: int
    quantiles: dict[str, float]
    edges: list[float]
    counts: list[int]
    bounds: dict[str, dict[str, float]] = field(default_factory=dict)
    logarithmic: bool = False


@dataclass(frozen=True)
class Analysis:
    """All that is known of a pool, for a page."""

    title: str
    source: str
    folder: str
    tables: list[dict[str, Any]]
    metrics: dict[str, float]
    distributions: list[Distribution]
    flow: list[tuple[str, int, int]]
    """Per step that removed something: its name, how many it removed, how many came to it."""
    kept: int


def analyze(pool: Pool) -> Analysis:
    """Read a pool once per signal."""
    counts = account(pool)
    report: dict[str, Any] = {}
    metrics = report_of(pool, counts, report, each=_EXAMPLES, characters=_SHOWN_CHARACTERS)
    return Analysis(
        pool.pipeline.name,
        pool.pipeline.source,
        str(pool.path),
        report["tables"],
        metrics,
        distributions(pool),
        flow_of(counts),
        counts[WRITE].kept,
    )


def flow_of(counts: Mapping[str, Count]) -> list[tuple[str, int, int]]:
    """Steps that removed documents, in the order in which they were run."""
    flow = [(label, count.dropped + count.failed, count.came) for label, count in counts.items()]
    return [("not readable" if label == READ else label, lost, came) for label, lost, came in flow if lost]


def distributions(pool: Pool) -> list[Distribution]:
    """One for every signal of numbers, and for every way in which a gate reduces spans."""
    wanted: dict[tuple[str, str | None], dict[str, dict[str, float]]] = {
        (name, None): {} for name, spans in pool.pipeline.signals().items() if not spans
    }
    for phase in pool.phases:
        for step in (*([phase.entry] if phase.entry is not None else []), *phase.steps):
            if step.gate is not None:
                found = pool.found(phase.index).get(step.label)
                bounds = bounds_for(step.gate, "", found)
                wanted.setdefault((step.gate.signal, step.gate.reduce), {})[step.label] = bounds
    return [_distribution(pool, *key, bounds) for key, bounds in wanted.items()]


def _distribution(
    pool: Pool, signal: str, reduce: str | None, bounds: dict[str, dict[str, float]]
) -> Distribution:
    values = _values(pool, signal, reduce)
    known = values[~numpy.isnan(values)]
    name = signal if reduce is None else f"{signal} ({reduce})"
    if not len(known):
        return Distribution(name, 0, len(values), {}, [], [], bounds)
    low, high = numpy.quantile(known, [_TAIL, 1 - _TAIL]).tolist()
    for given in (number for each in bounds.values() for number in each.values()):
        low, high = min(low, given), max(high, given)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    whole = bool((known == numpy.round(known)).all())
    logarithmic = whole and low >= 0 and high >= _WIDE
    counts, edges = _histogram(numpy.clip(known, low, high), low, high, whole, logarithmic)
    shares = {"p1": 0.01, "p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99}
    quantiles = {key: float(numpy.quantile(known, share)) for key, share in shares.items()}
    null = int(len(values) - len(known))
    return Distribution(name, len(known), null, quantiles, edges, counts, bounds, logarithmic)


def _histogram(
    values: NDArray[numpy.float64], low: float, high: float, whole: bool, logarithmic: bool
) -> tuple[list[int], list[float]]:
    """Counts [bins] and edges [bins + 1]; of few whole numbers each has its bin."""
    if logarithmic:
        steps = numpy.expm1(numpy.linspace(numpy.log1p(low), numpy.log1p(high), _BINS + 1))
        # Between whole numbers nothing lies: edges in between are their ends, each one once.
        edges = numpy.unique(numpy.concatenate([numpy.floor(steps[:-1]), [numpy.ceil(steps[-1])]]))
        counts, _ = numpy.histogram(values, edges)
        return counts.tolist(), edges.tolist()
    bins = int(min(_BINS, high - low + 1)) if whole else _BINS
    counts, edges = numpy.histogram(values, max(bins, 1), (low, high))
    return counts.tolist(), edges.tolist()


def _values(pool: Pool, signal: str, reduce: str | None) -> NDArray[numpy.float64]:
    """A signal of all documents, or of the first two million."""
    gate = next(
        (gate for gate in pool.pipeline.gates() if gate.signal == signal and gate.reduce == reduce), None
    )
    parts: list[NDArray[numpy.float64]] = []
    for shard in pool.shards():
        if gate is not None:
            signals = {name: pool.signal(shard, name) for name in gate.signals()}
            parts.append(reduced(gate, signals, pool.count(shard)))
        else:
            stored = pool.signal(shard, signal)
            assert not isinstance(stored, Spans)
            parts.append(stored)
        if sum(map(len, parts)) > _MOST:
            break
    return numpy.concatenate(parts)
