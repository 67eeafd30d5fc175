"""What a run's report shows of a curation: what each step removed, examples of it, and what failed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy

from puna.data.curate.account import READ, WRITE
from puna.data.curate.curation import failures
from puna.data.curate.execute import Count
from puna.data.curate.gates import Found, Gate, bounds_for, passes, reduced
from puna.data.curate.layout import read_table
from puna.data.curate.pool import Pool
from puna.data.curate.shard import ordered

_EXAMPLES = 3
_SHOWN_CHARACTERS = 240
_FAILURES_SHOWN = 20


@dataclass(frozen=True)
class Example:
    """A document that a gate dropped: what it was judged by, and how it begins."""

    gate: str
    id: str
    value: float
    bounds: str
    text: str


def report_of(pool: Pool, counts: Mapping[str, Count], report: dict[str, Any]) -> dict[str, float]:
    """Add the tables of a pool to a stage's ``report``; returns its metrics."""
    shown = [[e.gate, e.id, e.value, e.bounds, e.text] for e in examples(pool)]
    tables = report.setdefault("tables", [])
    tables.append(removals_table(pool, counts))
    if shown:
        tables.append(
            {
                "title": "Examples of what gates dropped",
                "columns": ["gate", "document", "value", "passes", "begins"],
                "rows": shown,
            }
        )
    failed = failures(pool, pool.shards())
    if failed:
        tables.append(
            {
                "title": f"Documents that failed: {len(failed):,}",
                "columns": ["document", "reason"],
                "rows": [list(pair) for pair in failed[:_FAILURES_SHOWN]],
            }
        )
    return metrics_of(counts, len(failed))


def metrics_of(counts: Mapping[str, Count], failed: int) -> dict[str, float]:
    """Documents read, kept and failed, and the share dropped by each gate of what came to it."""
    read, kept = counts[READ], counts[WRITE]
    metrics = {
        "documents.read": float(read.came),
        "documents.kept": float(kept.kept),
        "documents.failed": float(failed),
        "documents.dropped": float(sum(count.dropped for count in counts.values())),
        "bytes.read": float(read.bytes),
        "bytes.kept": float(kept.bytes),
        "kept": kept.kept / read.came if read.came else 0.0,
    }
    for label, count in counts.items():
        if count.dropped:
            metrics[f"dropped.{label.replace(' ', '_').replace('.', '_')}"] = count.dropped / count.came
    return metrics


def removals_table(pool: Pool, counts: Mapping[str, Count]) -> dict[str, Any]:
    """What came to each step, in the order in which steps were run, and what became of it."""
    rows = []
    for label, count in counts.items():
        speed = count.came / count.seconds if count.seconds else None
        share = count.dropped / count.came if count.came else 0.0
        told = (label, count.came, count.dropped, f"{share:.1%}", count.failed, count.kept)
        rows.append([*told, count.bytes / 1e6, count.seconds, speed])
    columns = ["step", "came", "dropped", "of what came", "failed", "kept"]
    columns += ["MB kept", "seconds", "documents/s"]
    note = "Seconds are those of the work itself, added over all processes."
    if not pool.everything:
        note += " A document that fails several gates is counted at the first that was run."
    return {"title": f"Steps of {pool.pipeline.name}", "columns": columns, "rows": rows, "note": note}


def examples(pool: Pool, *, each: int = _EXAMPLES) -> list[Example]:
    """The first documents that each gate dropped."""
    wanted = {gate.name: each for gate in pool.pipeline.gates()}
    found: dict[str, list[Example]] = {name: [] for name in wanted}
    for phase in pool.phases:
        gates = {step.gate.name: step.gate for step in ordered(phase, None) if step.gate is not None}
        for shard in pool.shards():
            open_ = {name for name in gates if wanted[name]}
            if not open_:
                break
            reasons = read_table(pool.file("decisions", phase.index, shard), ["dropped_by"])["dropped_by"]
            rows: dict[int, str] = {}
            for row, reason in enumerate(reasons.to_pylist()):
                if reason in open_ and wanted[reason]:
                    wanted[reason] -= 1
                    rows[row] = reason
            for example in _examples(pool, phase.index, shard, rows):
                found[example.gate].append(example)
    return [example for listed in found.values() for example in listed]


def _examples(pool: Pool, phase: int, shard: str, rows: Mapping[int, str]) -> list[Example]:
    if not rows:
        return []
    documents = pool.documents(shard, phase, rows=list(rows))
    gates = {gate.name: gate for gate in pool.pipeline.gates()}
    made = []
    for place, (row, name) in enumerate(rows.items()):
        gate = gates[name]
        signals = {signal: pool.signal(shard, signal) for signal in gate.signals()}
        value = float(reduced(gate, signals, documents.count)[row])
        bounds = bounds_for(gate, documents.texts.languages[place], pool.found(phase).get(name))
        text = " ".join(documents.texts.texts[place][: 4 * _SHOWN_CHARACTERS].split())
        shown = text[:_SHOWN_CHARACTERS] + (" …" if len(text) > _SHOWN_CHARACTERS else "")
        made.append(Example(name, documents.ids[place], value, bounds_text(bounds), shown))
    return made


def bounds_text(bounds: Mapping[str, float]) -> str:
    """Bounds in words: ``at least 50, at most 100000``."""
    words = {"minimum": "at least", "maximum": "at most", "above": "more than", "below": "less than"}
    return ", ".join(f"{words[key]} {value:g}" for key, value in bounds.items())


@dataclass(frozen=True)
class Traced:
    """One document's way: its row in a shard, why it is not kept ("" if it is), signals and gates."""

    id: str
    shard: str
    row: int
    reason: str
    text: str
    signals: dict[str, float | list[tuple[int, int, float]]]
    gates: list[tuple[str, str, float, str, bool | None]]
    """Name, signal, value, bounds, and whether it passes (None: the signal was not worked out)."""


def trace(pool: Pool, identity: str) -> Traced | None:
    """Why a document was kept or dropped: every signal stored, every gate with its bounds."""
    place = _find(pool, identity)
    if place is None:
        return None
    shard, row = place
    count = pool.count(shard)
    reason = str(pool.reasons(shard, len(pool.phases))[row])
    reached = _reached(pool, shard, row)
    documents = pool.documents(shard, min(reached + 1, len(pool.phases)), rows=[row])
    signals: dict[str, float | list[tuple[int, int, float]]] = {}
    for name, spans in pool.pipeline.signals().items():
        stored = pool.signal(shard, name)
        if not spans:
            signals[name] = float(stored[row])  # type: ignore[index]
        else:
            mine = stored.document == row  # type: ignore[union-attr]
            columns = (stored.starts[mine], stored.ends[mine], stored.values[mine])  # type: ignore[union-attr]
            signals[name] = list(zip(*(column.tolist() for column in columns), strict=True))
    gates = []
    for phase in pool.phases:
        for step in ordered(phase, None):
            if step.gate is None:
                continue
            read = {name: pool.signal(shard, name) for name in step.gate.signals()}
            value = float(reduced(step.gate, read, count)[row])
            found = pool.found(phase.index).get(step.label)
            bounds = bounds_for(step.gate, documents.texts.languages[0], found)
            passed = _passed(step.gate, read, documents.texts.languages[0], count, row, found)
            if numpy.isnan(value) and reason:
                passed = None
            gates.append((step.label, step.gate.signal, value, bounds_text(bounds), passed))
    return Traced(documents.ids[0], shard, row, reason, documents.texts.texts[0], signals, gates)


def _passed(
    gate: Gate, signals: Mapping[str, Any], language: str, count: int, row: int, found: Found | None
) -> bool | None:
    """Whether the document at ``row`` passes a gate, whatever became of it at others."""
    return bool(passes(gate, signals, [language] * count, found)[row])


def _reached(pool: Pool, shard: str, row: int) -> int:
    """The last phase to which a document came."""
    for phase in range(len(pool.phases)):
        if pool.reasons(shard, phase + 1)[row]:
            return phase
    return len(pool.phases) - 1


def _find(pool: Pool, identity: str) -> tuple[str, int] | None:
    """Shard and row of the document with that id."""
    import pyarrow.compute

    for shard in pool.shards():
        ids = read_table(pool.path / "documents" / f"{shard}.parquet", ["id"])["id"]
        row = pyarrow.compute.index(ids, identity).as_py()
        if row >= 0:
            return shard, row
    return None
