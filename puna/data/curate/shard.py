"""The units of work on a pool: read a part of the sources, take a shard through a phase, write survivors.

A unit leaves whole files or none, and none that is there already is made again: whoever runs it may be
killed anywhere and run it again. What follows at once on what is in memory is done at once: shards go
through the first phase as they are read, and the last phase writes the survivors.
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
from puna.data.curate.documents import Documents
from puna.data.curate.execute import FAILED, Count, Done, Pages, Stored, execute, joined_spans
from puna.data.curate.gates import passes
from puna.data.curate.guard import Guard, Range
from puna.data.curate.layout import (
    at_rows,
    column_of,
    of_rows,
    read_table,
    strings,
    write_table,
)
from puna.data.curate.operator import Spans
from puna.data.curate.pipeline import Phase, Step
from puna.data.curate.pool import Pool
from puna.data.curate.reading import first_documents, read_part
from puna.data.curate.sketches import write_sketch
from puna.data.curate.texts import Texts
from puna.data.kinds import UNDETERMINED

_SLOWEST = 5  # by the clock, times the processor time that a step may take
_RELEASE_AFTER = 64 << 20  # bytes of text that are worked on
_worked = 0


class Unit(NamedTuple):
    """A unit of work: ``read`` a part; ``begin`` with one: read it and take its shards through the first
    phase; ``plan`` a phase by a shard (the first by what is read first); a ``phase`` of a shard; or its
    ``survivors``."""

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
    now = Path(path) / "now" / unit.file
    now.parent.mkdir(exist_ok=True)
    descriptor = os.open(now, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)

    def tell(range_: Range | None, seconds: float) -> None:
        line = ""
        if range_ is not None:
            line = f"{range_.first} {range_.last} {time.time() + _SLOWEST * seconds:.3f} {range_.label}"
        os.pwrite(descriptor, line.encode().ljust(256), 0)

    guard = Guard(pool.meta["batch_seconds"], frozenset(deadly), tell)
    try:
        if unit.task in ("read", "begin"):
            _begin(pool, int(unit.name), guard, onward=unit.task == "begin")
        elif unit.task == "phase":
            _phase(pool, unit.phase, unit.name, guard)
        elif unit.task == "plan":
            _measure(pool, pool.phases[unit.phase], unit.name, guard)
        else:
            _survivors(pool, unit.name)
    finally:
        os.close(descriptor)
    now.unlink(missing_ok=True)


def idle_file(path: Path) -> Path:
    """The file that is there while workers wait: who has read a shard leaves what follows to them."""
    return path / "now" / "idle"


def _begin(pool: Pool, number: int, guard: Guard, *, onward: bool) -> None:
    """Read a part; ``onward``: its shards go through the first phase, as long as nobody is idle."""
    idle = idle_file(pool.path)
    for shard, table in read_part(pool, number):
        if onward and not idle.exists():
            rows = numpy.flatnonzero(table["failed"].is_null())
            _phase(pool, 0, shard, guard, Documents.of_table(table, rows, raw=True))
            guard.tell(None, 0)  # Reading takes as long as it takes.


def told_of(path: Path, unit: Unit) -> tuple[Range, float] | None:
    """What a unit is at, and when that should be over; None if it has told nothing."""
    try:
        line = (path / "now" / unit.file).read_text(encoding="utf-8").rstrip()
        first, last, until, label = line.split(" ", 3)
        return Range(label, int(first), int(last)), float(until)
    except (OSError, ValueError):
        return None


def _phase(pool: Pool, index: int, shard: str, guard: Guard, documents: Documents | None = None) -> None:
    """Take a shard through a phase: signals, decisions, and the sketch for what comes next, or survivors.

    ``documents`` are those that come to the phase, if they are at hand.
    """
    phase = pool.phases[index]
    signals, decisions = (pool.file(kind, index, shard) for kind in ("signals", "decisions"))
    kept: Documents | None = None
    if not signals.exists():
        kept = _execute(pool, phase, shard, guard, documents or pool.documents(shard, index))
    elif not decisions.exists():
        _decide(pool, phase, shard)
    if phase.closing is not None and phase.closing.kind == "global":
        sketch = pool.file("sketch", index, shard)
        if not sketch.exists():
            kept = kept or pool.documents(shard, index + 1, cut=False)
            ranges = list(batches(kept.texts.lengths, pool.meta["batch_characters"]))
            write_sketch(sketch, phase.closing, kept, ranges)
    if index + 1 == len(pool.phases):
        _survivors(pool, shard, kept)
    _release(int(kept.sizes.sum()) if kept is not None else 0)


def _release(size: int) -> None:
    """Give memory back after some work: each time would cost as much as the work."""
    global _worked
    _worked += size
    if _worked > _RELEASE_AFTER:
        _worked = 0
        pyarrow.default_memory_pool().release_unused()
        release_memory()


def ordered(phase: Phase, order: Sequence[str] | None) -> list[Step]:
    """The steps of a phase as they are run: the gate at its entry first, then as the plan says."""
    entry = [phase.entry] if phase.entry is not None and phase.entry.gate is not None else []
    if order is None:
        return [*entry, *phase.steps]
    by_label = {step.label: step for step in phase.steps}
    return [*entry, *(by_label[label] for label in order)]


def _execute(pool: Pool, phase: Phase, shard: str, guard: Guard, documents: Documents) -> Documents:
    """Run a phase over a shard and store what comes of it; the documents that are kept."""
    orders = pool.meta.get("order") or {}
    steps = ordered(phase, orders.get(str(phase.index)))
    parts = list(_batches_done(pool, phase, shard, documents, steps, guard))
    _store(pool, phase, shard, documents, parts)
    reasons = [reason for _, _, done in parts for reason in done.dropped]
    return documents.kept(
        numpy.array([bool(reason) for reason in reasons], dtype=bool),
        [text for _, _, done in parts for text in done.texts],
        [tag for _, _, done in parts for tag in done.languages],
        numpy.concatenate([numpy.zeros(0, numpy.int64), *(done.sizes for _, _, done in parts)]),
    )


def _measure(pool: Pool, phase: Phase, shard: str, guard: Guard) -> None:
    """What each step costs and drops over the first batch of a shard, worked out for all its documents.

    Without a shard it is the first batch of what is read.
    """
    if shard:
        documents = pool.documents(shard, phase.index)
    else:
        table = first_documents(pool)
        rows = numpy.flatnonzero(table["failed"].is_null())
        documents = Documents.of_table(table, rows, raw=True)
    made = _batches_done(pool, phase, shard, documents, ordered(phase, None), guard, everything=True)
    counts = next((done.counts for _, _, done in made), {})
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
    file = pool.file("signals", phase.index, shard)
    write_table(file, pyarrow.table(columns), {"counts": split[0]}, few=("language", "failed"))
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
    table = pyarrow.table({"dropped_by": pyarrow.array(dropped, pyarrow.string())})
    file = pool.file("decisions", phase.index, shard)
    write_table(file, table, {"counts": counts}, few=("dropped_by",))


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
        words[start:stop] = part.total(part.first_of_runs(~part.is_class("white_space")))
        part.forget()
    return words


def _survivors(pool: Pool, shard: str, documents: Documents | None = None) -> None:
    """Write what is kept of a shard after all phases as rows of a corpus of documents."""
    file = pool.survivors_file(shard)
    if file.exists():
        return
    if documents is None:
        documents = pool.documents(shard, len(pool.phases))
    texts = documents.texts
    words = _words(texts, pool.meta["batch_characters"])
    filled = words > 0
    languages = numpy.array([tag or UNDETERMINED for tag in texts.languages], dtype=object)
    sources = numpy.array(documents.sources.to_pylist(), dtype=object)
    counts: dict[str, dict[str, int]] = {}
    for key, told in (("{}/", sources), ("/{}", languages)):
        for value in dict.fromkeys(told[filled].tolist()):
            counts[key.format(value)] = _counted(filled & (told == value), words, documents.sizes)
    if filled.any():
        counts["/"] = _counted(filled, words, documents.sizes)
    columns = {
        "id": documents.ids,
        "text": pyarrow.array(texts.texts, pyarrow.string()),
        "source": documents.sources,
        "language": pyarrow.array(languages, pyarrow.string()),
    }
    table = pyarrow.table(columns)
    if not filled.all():
        table = table.filter(pyarrow.array(filled))
    told_with = {"counts": counts, "empty": int((~filled).sum())}
    write_table(file, table, told_with, few=("source", "language"))


def _counted(
    mask: NDArray[numpy.bool_], words: NDArray[numpy.int64], sizes: NDArray[numpy.int64]
) -> dict[str, int]:
    return {"rows": int(mask.sum()), "words": int(words[mask].sum()), "bytes": int(sizes[mask].sum())}
