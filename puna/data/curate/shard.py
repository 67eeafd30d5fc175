"""The units of work on a pool: read a part of the sources, take a shard through a phase, write survivors.

A unit leaves whole files or none, and none that is there already is made again: whoever runs it may be
killed anywhere and run it again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pyarrow
import pyarrow.compute
from numpy.typing import NDArray

from puna.core.files import write_json
from puna.core.hardware import release_memory
from puna.core.stage import Parameters, validate
from puna.data.curate.execute import FAILED, Count, Done, Pages, Stored, execute, joined_spans
from puna.data.curate.gates import passes
from puna.data.curate.guard import Guard, Range
from puna.data.curate.layout import (
    DOCUMENTS,
    at_rows,
    column_of,
    of_rows,
    read_table,
    strings,
    write_table,
)
from puna.data.curate.operator import Spans
from puna.data.curate.pipeline import Phase, Step
from puna.data.curate.pool import Documents, Pool
from puna.data.curate.records import Limits, Record
from puna.data.curate.sketches import write_sketch
from puna.data.curate.sources import PoolSource, reader_of
from puna.data.curate.texts import Texts
from puna.data.kinds import UNDETERMINED

_SLOWEST = 5  # by the clock, times the processor time that a step may take


class _Source(Parameters):
    source: PoolSource


class Unit(NamedTuple):
    """A unit of work: ``read`` a part, ``plan`` a phase, a ``phase`` of a shard, or its ``survivors``."""

    task: str
    phase: int
    name: str

    @property
    def file(self) -> str:
        """A name for files that are about this unit."""
        return f"{self.task}-{self.phase}-{self.name}"


@lru_cache(maxsize=2)
def _pool(path: str, stamp: int) -> Pool:
    return Pool.open(path)


def work(path: str, unit: Unit, deadly: Sequence[Range] = ()) -> None:
    """Do a unit of work on the pool at ``path``; ``deadly`` documents are not tried again.

    What is being done is told in ``now/UNIT`` while it is done.
    """
    pool = _pool(path, (Path(path) / "pool.json").stat().st_mtime_ns)
    if unit.task == "read":
        _read(pool, int(unit.name))
        return
    now = Path(path) / "now" / unit.file
    now.parent.mkdir(exist_ok=True)
    descriptor = os.open(now, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)

    def tell(range_: Range, seconds: float) -> None:
        line = f"{range_.first} {range_.last} {time.time() + _SLOWEST * seconds:.3f} {range_.label}"
        os.pwrite(descriptor, line.encode().ljust(256), 0)

    guard = Guard(pool.meta["batch_seconds"], frozenset(deadly), tell)
    try:
        if unit.task == "phase":
            _phase(pool, unit.phase, unit.name, guard)
        elif unit.task == "plan":
            _measure(pool, pool.phases[unit.phase], unit.name, guard)
        else:
            _survivors(pool, unit.name)
    finally:
        os.close(descriptor)
        pyarrow.default_memory_pool().release_unused()
        release_memory()
    now.unlink(missing_ok=True)


def told_of(path: Path, unit: Unit) -> tuple[Range, float] | None:
    """What a unit is at, and when that should be over; None if it has told nothing."""
    try:
        line = (path / "now" / unit.file).read_text(encoding="utf-8").rstrip()
        first, last, until, label = line.split(" ", 3)
        return Range(label, int(first), int(last)), float(until)
    except (OSError, ValueError):
        return None


def _read(pool: Pool, number: int) -> None:
    """Read a part of the sources into shards; the part's own file is written when all are there."""
    done = pool.part_file(number)
    if done.exists():
        return
    part = pool.meta["parts"][number]
    described = pool.meta["sources"][part["source"]]
    settings = validate(_Source, {"source": described}, where="sources").source
    limits = Limits(**pool.meta["limits"])
    reader = reader_of(settings)
    piece = reader.parts(settings)[part["index"]]
    shards: list[str] = []
    counts = {"came": 0, "failed": 0, "bytes": 0}
    started = time.perf_counter()
    for records in _cut(reader.read(settings, piece, limits), pool.meta["shard_bytes"], settings.limit):
        name = f"{number:06d}-{len(shards):05d}"
        table = _table(records, settings.title)
        file = pool.path / "documents" / f"{name}.parquet"
        if not file.exists():  # A part is read the same each time: what a killed run has written holds.
            write_table(file, table)
        shards.append(name)
        counts["came"] += len(table)
        counts["failed"] += sum(bool(record.failed) for record in records)
        counts["bytes"] += int(pyarrow.compute.sum(table["bytes"]).as_py())
    seconds = time.perf_counter() - started
    write_json(done, {"shards": shards, "counts": {**counts, "seconds": seconds}})


def _cut(records: Iterator[Record], size: int, limit: int | None) -> Iterator[list[Record]]:
    """Records in lists of about ``size`` bytes; no more than ``limit`` of them."""
    held: list[Record] = []
    total = 0
    for number, record in enumerate(records):
        if limit is not None and number >= limit:
            break
        held.append(record)
        total += len(record.text or "") + len(record.content or b"") + len(record.meta) + 200
        if total >= size:
            yield held
            held, total = [], 0
    if held:
        yield held


def _table(records: Sequence[Record], source: str) -> pyarrow.Table:
    columns = {
        "id": [f"{source}/{record.key}" for record in records],
        "text": [None if record.failed else record.text for record in records],
        "content": [record.content for record in records],
        "media": [record.media for record in records],
        "url": [record.url for record in records],
        "source": [source] * len(records),
        "language": [record.language for record in records],
        "meta": [record.meta for record in records],
        "failed": [record.failed or None for record in records],
    }
    arrays = {name: pyarrow.array(values, DOCUMENTS.field(name).type) for name, values in columns.items()}
    sizes = pyarrow.compute.fill_null(pyarrow.compute.binary_length(arrays["text"]), 0)
    arrays["bytes"] = sizes.cast(pyarrow.int64())
    return pyarrow.Table.from_arrays([arrays[name] for name in DOCUMENTS.names], schema=DOCUMENTS)


def _phase(pool: Pool, index: int, shard: str, guard: Guard) -> None:
    """Take a shard through a phase: signals, decisions, and the sketch for what comes next."""
    phase = pool.phases[index]
    signals, decisions = (pool.file(kind, index, shard) for kind in ("signals", "decisions"))
    if not signals.exists():
        _execute(pool, phase, shard, guard)
    elif not decisions.exists():
        _decide(pool, phase, shard)
    if phase.closing is not None and phase.closing.kind == "global":
        sketch = pool.file("sketch", index, shard)
        if not sketch.exists():
            documents = pool.documents(shard, index + 1, cut=False)
            ranges = list(batches(documents.texts.lengths, pool.meta["batch_characters"]))
            write_sketch(sketch, phase.closing, documents, ranges)


def ordered(phase: Phase, order: Sequence[str] | None) -> list[Step]:
    """The steps of a phase as they are run: the gate at its entry first, then as the plan says."""
    entry = [phase.entry] if phase.entry is not None and phase.entry.gate is not None else []
    if order is None:
        return [*entry, *phase.steps]
    by_label = {step.label: step for step in phase.steps}
    return [*entry, *(by_label[label] for label in order)]


def _execute(pool: Pool, phase: Phase, shard: str, guard: Guard) -> None:
    documents = pool.documents(shard, phase.index)
    orders = pool.meta.get("order") or {}
    steps = ordered(phase, orders.get(str(phase.index)))
    parts = list(_batches_done(pool, phase, shard, documents, steps, guard))
    _store(pool, phase, shard, documents, parts)


def _measure(pool: Pool, phase: Phase, shard: str, guard: Guard) -> None:
    """What each step costs and drops over the first batch of a shard, worked out for all its documents."""
    documents = pool.documents(shard, phase.index)
    done = _batches_done(pool, phase, shard, documents, ordered(phase, None), guard, everything=True)
    counts = next((done.counts for _, _, done in done), {})
    write_json(pool.plan_file(phase.index), {label: asdict(count) for label, count in counts.items()})


def _batches_done(
    pool: Pool,
    phase: Phase,
    shard: str,
    documents: Documents,
    steps: Sequence[Step],
    guard: Guard,
    *,
    everything: bool = False,
) -> Iterator[tuple[int, int, Done]]:
    """Run steps over the documents of a shard, batch by batch: the range of each and what came of it."""
    found = pool.found(phase.index)
    earlier = _earlier(pool, phase, shard, documents)
    for start, stop in batches(documents.texts.lengths, pool.meta["batch_characters"]):
        places = numpy.arange(start, stop)
        whole = stop - start == len(documents.rows)
        texts = documents.texts if whole else documents.texts.take(places)
        contents = documents.contents[start:stop]
        raw = any(content is not None for content in contents)
        done = execute(
            steps,
            texts,
            sizes=documents.sizes[start:stop],
            pages=Pages(contents, documents.media[start:stop]) if raw else None,
            earlier={name: of_rows(values, places, len(documents.rows)) for name, values in earlier.items()},
            found=found,
            everything=pool.everything or everything,
            guard=guard,
            first=start,
        )
        for batch in (texts, done.current):  # What operators shared of the batch is not needed any more.
            batch.forget()
        done.current = Texts([])
        yield start, stop, done


def batches(lengths: NDArray[numpy.int64], characters: int) -> Iterator[tuple[int, int]]:
    """Ranges of documents of about so many characters together."""
    start, total = 0, 0
    for place, length in enumerate(lengths.tolist()):
        if total and total + length > characters:
            yield start, place
            start, total = place, 0
        total += length
    if start < len(lengths):
        yield start, len(lengths)


def _earlier(pool: Pool, phase: Phase, shard: str, documents: Documents) -> Stored:
    """Signals that gates of this phase read and earlier phases have stored, of these documents."""
    own = {name for step in phase.steps for name in step.columns()}
    gates = [step.gate for step in ordered(phase, None) if step.gate is not None]
    wanted = {name for gate in gates for name in gate.signals()} - own
    stored = {name: pool.signal(shard, name) for name in sorted(wanted)}
    return {name: of_rows(values, documents.rows, documents.count) for name, values in stored.items()}


def _store(
    pool: Pool, phase: Phase, shard: str, documents: Documents, parts: Sequence[tuple[int, int, Done]]
) -> None:
    """Write what the batches of a shard have come to: decisions last, as they say that all is there."""
    count, rows = documents.count, documents.rows
    texts: list[str | None] = [None] * count
    languages: list[str | None] = [None] * count
    dropped: list[str | None] = [None] * count
    counts = {step.label: Count() for step in ordered(phase, None)}
    failed: list[str | None] = [None] * count
    for start, stop, done in parts:
        for place, row in enumerate(rows[start:stop].tolist()):
            kept = not done.dropped[place]
            texts[row] = done.texts[place] if kept or pool.everything else None
            languages[row] = done.languages[place]
            dropped[row] = done.dropped[place] or None
        for place, reason in done.failed.items():
            failed[int(rows[start + place])] = reason
        for label, came in done.counts.items():
            counts[label].add(came)
    columns = {"text": pyarrow.array(texts, pyarrow.string())}
    columns["language"] = pyarrow.array(languages, pyarrow.string())
    columns["failed"] = pyarrow.array(failed, pyarrow.string())
    for name, spans in ((n, s) for step in phase.steps for n, s in step.columns().items()):
        values = _joined([(start, stop, done.signals[name]) for start, stop, done in parts], spans, rows)
        columns[name] = column_of(at_rows(values, rows, count), count)
    gates = {step.label for step in ordered(phase, None) if step.gate is not None}
    split: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for label, tally in counts.items():
        split[label in gates][label] = asdict(tally)
    write_table(pool.file("signals", phase.index, shard), pyarrow.table(columns), {"counts": split[0]})
    _write_decisions(pool, phase, shard, dropped, split[1])


def _joined(
    parts: Sequence[tuple[int, int, NDArray[numpy.float64] | Spans]], spans: bool, rows: NDArray[numpy.int64]
) -> NDArray[numpy.float64] | Spans:
    """A signal of all batches of a shard together."""
    if not spans:
        return numpy.concatenate([values for _, _, values in parts]) if parts else numpy.zeros(0)
    moved = [Spans(s.document + start, s.starts, s.ends, s.values) for start, _, s in parts]  # type: ignore[union-attr]
    return joined_spans(moved)


def _write_decisions(
    pool: Pool, phase: Phase, shard: str, dropped: Sequence[str | None], counts: Mapping[str, Any]
) -> None:
    column = pyarrow.array(dropped, pyarrow.string()).dictionary_encode().cast(pyarrow.string())
    table = pyarrow.table({"dropped_by": column})
    write_table(pool.file("decisions", phase.index, shard), table, {"counts": counts})


def _decide(pool: Pool, phase: Phase, shard: str) -> None:
    """Decide anew over stored signals: what a step failed on fails there again."""
    documents = pool.documents(shard, phase.index)
    rows, count = documents.rows, documents.count
    file = pool.file("signals", phase.index, shard)
    table = read_table(file, ["language", "failed"]).take(rows)
    old = documents.texts.languages
    languages = [new or tag for new, tag in zip(table["language"].to_pylist(), old, strict=True)]
    failed = strings(table["failed"])
    dropped = [""] * len(rows)
    counts: dict[str, Any] = {}
    for step in ordered(phase, None):
        alive = numpy.array([not reason for reason in dropped], dtype=bool)
        if step.gate is None:
            for place in numpy.flatnonzero(alive).tolist():
                if failed[place].startswith(f"{step.label}: "):
                    dropped[place] = f"{FAILED}{failed[place]}"
            continue
        started = time.perf_counter()
        gate = step.gate
        signals = {name: of_rows(pool.signal(shard, name), rows, count) for name in gate.signals()}
        passing = passes(gate, signals, languages, pool.found(phase.index).get(gate.name))
        for place in numpy.flatnonzero(alive & ~passing).tolist():
            dropped[place] = gate.name
        came, kept = int(alive.sum()), int((alive & passing).sum())
        seconds = time.perf_counter() - started
        size = int(documents.sizes[alive & passing].sum())
        counts[gate.name] = asdict(Count(came, kept, came - kept, 0, seconds, size))
    reasons: list[str | None] = [None] * count
    for row, reason in zip(rows.tolist(), dropped, strict=True):
        reasons[row] = reason or None
    _write_decisions(pool, phase, shard, reasons, counts)


def _words(texts: Texts, characters: int) -> NDArray[numpy.int64]:
    """[count] words between white space, counted batch by batch."""
    words = numpy.zeros(texts.count, dtype=numpy.int64)
    for start, stop in batches(texts.lengths, characters):
        part = texts.take(numpy.arange(start, stop))
        words[start:stop] = part.words("white_space").counts
        part.forget()
    return words


def _survivors(pool: Pool, shard: str) -> None:
    """Write what is kept of a shard after all phases as rows of a corpus of documents."""
    file = pool.survivors_file(shard)
    if file.exists():
        return
    documents = pool.documents(shard, len(pool.phases))
    texts = documents.texts
    words = _words(texts, pool.meta["batch_characters"])
    filled = words > 0
    counts: dict[str, dict[str, int]] = {}
    languages = [tag or UNDETERMINED for tag in texts.languages]
    for place in numpy.flatnonzero(filled).tolist():
        for key in ("/", f"{documents.sources[place]}/", f"/{languages[place]}"):
            total = counts.setdefault(key, {"rows": 0, "words": 0, "bytes": 0})
            total["rows"] += 1
            total["words"] += int(words[place])
            total["bytes"] += int(documents.sizes[place])
    columns = {
        "id": documents.ids,
        "text": texts.texts,
        "source": documents.sources,
        "language": languages,
    }
    table = pyarrow.table({name: pyarrow.array(column, pyarrow.string()) for name, column in columns.items()})
    told = {"counts": counts, "empty": int((~filled).sum())}
    write_table(file, table.filter(pyarrow.array(filled)), told)
