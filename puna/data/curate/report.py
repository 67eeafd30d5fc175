"""What a run's report shows of a curation: what each step removed, examples of it, and what failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy

from puna.data.curate.account import READ, WRITE
from puna.data.curate.curation import failures
from puna.data.curate.execute import FAILED, Count
from puna.data.curate.gates import Gate, bounds_for, passes, reduced
from puna.data.curate.layout import read_table
from puna.data.curate.operator import Spans
from puna.data.curate.pool import Pool
from puna.data.curate.seen import as_seen
from puna.data.curate.shard import ordered

_EXAMPLES = 2
_SHOWN_CHARACTERS = 160
_FAILURES_SHOWN = 20


@dataclass(frozen=True)
class Example:
    """A document that a gate dropped: what it was judged by, and how it begins."""

    gate: str
    id: str
    value: float
    bounds: str
    text: str


def report_of(
    pool: Pool,
    counts: Mapping[str, Count],
    report: dict[str, Any],
    *,
    each: int = _EXAMPLES,
    characters: int = _SHOWN_CHARACTERS,
) -> dict[str, float]:
    """Add the tables of a pool to a stage's ``report``; returns its metrics.

    ``each`` is how many examples there are of each gate, ``characters`` how much of one is shown.
    """
    shown = [[e.gate, e.id, e.value, e.bounds, e.text] for e in examples(pool, each, characters)]
    tables = report.setdefault("tables", [])
    tables.append(removals_table(pool, counts))
    if shown:
        tables.append(
            {
                "title": "Examples of what gates dropped",
                "columns": ["gate", "document", "value", "what passes", "its text begins"],
                "rows": shown,
                "note": "Texts as they came to the gate. puna data trace POOL DOCUMENT tells all of one.",
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
        "bytes.read": float(_text_bytes(counts)),
        "bytes.kept": float(kept.bytes),
        "kept": kept.kept / read.came if read.came else 0.0,
    }
    for label, count in counts.items():
        if count.dropped:
            metrics[f"dropped.{label.replace(' ', '_').replace('.', '_')}"] = count.dropped / count.came
    return metrics


def _text_bytes(counts: Mapping[str, Count]) -> int:
    """Bytes of text that were read or extracted from raw pages: what the first step with any has kept."""
    return next((count.bytes for count in counts.values() if count.bytes), 0)


def removals_table(pool: Pool, counts: Mapping[str, Count]) -> dict[str, Any]:
    """What came to each step, in the order in which steps were run, and what became of it."""
    rows = []
    for label, count in counts.items():
        # Gates compare a number each: what they cost is mostly not worth a figure.
        speed = count.came / count.seconds if count.seconds >= 0.001 else ""
        share = count.dropped / count.came if count.came else 0.0
        told = (label, count.came, count.dropped, f"{share:.1%}", count.failed, count.kept)
        seconds = f"{count.seconds:.3f}" if count.seconds >= 0.001 else ""
        rows.append([*told, count.bytes / 1e6, seconds, speed])
    columns = ["step", "came", "dropped", "of what came", "failed", "kept"]
    columns += ["MB kept", "seconds", "documents/s"]
    note = "Seconds are those of the work itself, added over all processes."
    if not pool.everything:
        note += " A document that fails several gates is counted at the first that was run."
    return {"title": f"Steps of {pool.pipeline.name}", "columns": columns, "rows": rows, "note": note}


def examples(pool: Pool, each: int = _EXAMPLES, characters: int = _SHOWN_CHARACTERS) -> list[Example]:
    """The first documents that each gate dropped, with the beginnings of their texts as the gate saw them."""
    wanted = {gate.name: each for gate in pool.pipeline.gates()}
    found: dict[str, list[Example]] = {name: [] for name in wanted}
    for phase in pool.phases:
        gates = {step.gate.name: step.gate for step in ordered(phase, None) if step.gate is not None}
        for shard in pool.shards():
            open_ = {name for name in gates if wanted[name]}
            if not open_:
                break
            reasons = read_table(pool.file("decisions", phase.index, shard), ["dropped_by"])["dropped_by"]
            chosen: dict[str, list[int]] = {}
            for row, reason in enumerate(reasons.to_pylist()):
                if reason in open_ and wanted[reason]:
                    wanted[reason] -= 1
                    chosen.setdefault(reason, []).append(row)
            for name, rows in chosen.items():
                found[name] += _examples(pool, phase.index, shard, rows, gates[name], characters)
    return [example for listed in found.values() for example in listed]


def _examples(
    pool: Pool, phase: int, shard: str, rows: Sequence[int], gate: Gate, characters: int
) -> list[Example]:
    documents, texts = as_seen(pool, shard, phase, rows, gate.name)
    signals = {signal: pool.signal(shard, signal) for signal in gate.signals()}
    values = reduced(gate, signals, documents.count)
    made = []
    for place, row in enumerate(rows):
        bounds = bounds_for(gate, documents.texts.languages[place], pool.found(phase).get(gate.name))
        text = " ".join(texts[place][: 4 * characters].split())
        shown = text[:characters] + (" …" if len(text) > characters else "")
        made.append(
            Example(
                gate.name,
                documents.ids[place].as_py(),
                float(values[row]),
                bounds_text(bounds, gate.null),
                shown,
            )
        )
    return made


def bounds_text(bounds: Mapping[str, float], null: str = "drop") -> str:
    """Bounds in words: ``at least 50, at most 100000``; and that a signal that is null passes, if it does."""
    words = {"minimum": "at least", "maximum": "at most", "above": "more than", "below": "less than"}
    return ", ".join(f"{words[key]} {value:g}" for key, value in bounds.items()) + (
        " (or null)" if null == "keep" else ""
    )


@dataclass(frozen=True)
class Judged:
    """What a gate makes of one document.

    ``result`` is ``passed``, ``fails`` (another gate had dropped the document), ``dropped``, or ``not come
    to``: an earlier one had dropped it, and the signal was not worked out any more.
    """

    gate: str
    signal: str
    value: float
    bounds: str
    result: Literal["passed", "fails", "dropped", "not come to"]


@dataclass(frozen=True)
class Traced:
    """One document's way: its row in a shard, why it is not kept ("" if it is), signals and gates.

    ``text`` is what came to the gate that dropped it, or what is kept of it.
    """

    id: str
    shard: str
    row: int
    reason: str
    text: str
    signals: dict[str, float | list[tuple[int, int, float]]]
    gates: list[Judged]


def trace(pool: Pool, identity: str) -> Traced | None:
    """Why a document was kept or dropped: every signal stored, every gate with its bounds."""
    place = _find(pool, identity)
    if place is None:
        return None
    shard, row = place
    reason = str(pool.reasons(shard, len(pool.phases))[row])
    reached = _reached(pool, shard, row)
    if reason and not reason.startswith(FAILED):
        documents, texts = as_seen(pool, shard, reached, [row], reason)
    else:
        documents = pool.documents(shard, min(reached + 1, len(pool.phases)), rows=[row])
        texts = documents.texts.texts
    language = documents.texts.languages[0]
    gates = _judged(pool, shard, row, language, reason)
    return Traced(documents.ids[0].as_py(), shard, row, reason, texts[0], _signals(pool, shard, row), gates)


def _signals(pool: Pool, shard: str, row: int) -> dict[str, float | list[tuple[int, int, float]]]:
    signals: dict[str, float | list[tuple[int, int, float]]] = {}
    for name in pool.pipeline.signals():
        stored = pool.signal(shard, name)
        if isinstance(stored, Spans):
            mine = stored.document == row
            columns = (stored.starts[mine], stored.ends[mine], stored.values[mine])
            signals[name] = list(zip(*(column.tolist() for column in columns), strict=True))
        else:
            signals[name] = float(stored[row])
    return signals


def _judged(pool: Pool, shard: str, row: int, language: str, reason: str) -> list[Judged]:
    """All gates as the pipeline has them; whether one was come to depends on the order they were run in."""
    orders, count = pool.meta.get("order") or {}, pool.count(shard)
    reached = _reached(pool, shard, row)
    judged, dropped = [], reason.startswith(FAILED) and reached == 0
    for phase in pool.phases:
        done: dict[str, Judged] = {}
        for step in ordered(phase, orders.get(str(phase.index))):
            gate = step.gate
            if gate is None:
                dropped = dropped or reason.startswith(f"{FAILED}{step.label}: ")
                continue
            read = {name: pool.signal(shard, name) for name in gate.signals()}
            value = float(reduced(gate, read, count)[row])
            found = pool.found(phase.index).get(gate.name)
            passed = bool(passes(gate, read, [language] * count, found)[row])
            result: Literal["passed", "fails", "dropped", "not come to"] = "passed" if passed else "fails"
            if dropped and numpy.isnan(value) and not (pool.everything and phase.index <= reached):
                result = "not come to"
            if gate.name == reason:
                result, dropped = "dropped", True
            bounds = bounds_text(bounds_for(gate, language, found), gate.null)
            done[gate.name] = Judged(gate.name, gate.signal, value, bounds, result)
        judged += [done[step.label] for step in ordered(phase, None) if step.label in done]
    return judged


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
        ids = read_table(pool.documents_file(shard), ["id"])["id"]
        row = pyarrow.compute.index(ids, identity).as_py()
        if row >= 0:
            return shard, row
    return None
