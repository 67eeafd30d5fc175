"""The steps of a phase over one batch of documents: signals, edited texts, and which gate drops what.

Every document keeps its row, whatever happens to it. Once a gate has dropped more than half of what is
worked on, the rest is gathered into a smaller batch (unless all signals are wanted of all documents): what
operators share of a batch is worked out anew then, which pays only for many.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
from numpy.typing import NDArray

from puna.core.errors import PunaError
from puna.data.curate.gates import Found, characters_of, passes
from puna.data.curate.guard import Guard
from puna.data.curate.operator import BadDocument, Mapped, Spans, apply_map, apply_score
from puna.data.curate.pipeline import Step
from puna.data.curate.texts import Texts

FAILED = "failed: "
_GATHER_BELOW = 0.5
_MOST_MAY_FAIL = 16  # documents of a batch, before it is the step that is told to be at fault
Stored = dict[str, "NDArray[numpy.float64] | Spans"]


@dataclass
class Count:
    """What came to a step and what became of it, in documents; ``bytes`` are those of what is kept."""

    came: int = 0
    kept: int = 0
    dropped: int = 0
    failed: int = 0
    seconds: float = 0.0
    bytes: int = 0

    def add(self, other: Count) -> None:
        """Add the counts of other documents at the same step."""
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass
class Pages:
    """Raw pages of a batch: ``contents`` by row (None: the document came as text) and their ``media``."""

    contents: Sequence[bytes | None]
    media: Sequence[str]


@dataclass
class Done:
    """What steps made of a batch, by row.

    ``texts`` and ``languages`` hold None where nothing changed. ``dropped`` holds why a document is not
    kept: the name of a gate, or "failed: " with step and reason; "" if it is. ``failed`` holds what failed
    at which step by row, of documents that a gate had dropped before, too, if they were worked on.
    ``counts`` are those of each step by its label.
    """

    texts: list[str | None]
    languages: list[str | None]
    signals: Stored
    dropped: list[str]
    failed: dict[int, str]
    counts: dict[str, Count]
    current: Texts
    rows: NDArray[numpy.int64]
    """The documents that are kept, as they are now, and their rows."""
    sizes: NDArray[numpy.int64]
    """Bytes of every document's text as it is now."""


@dataclass
class _Work:
    """A batch on its way: ``texts`` are the documents at ``rows``, of which those ``alive`` are kept."""

    count: int
    texts: Texts
    rows: NDArray[numpy.int64]
    alive: NDArray[numpy.bool_]
    sizes: NDArray[numpy.int64]
    signals: Stored
    edited: list[str | None]
    languages: list[str | None]
    dropped: list[str]
    first: int
    everything: bool
    failed: dict[int, str] = field(default_factory=dict)
    counts: dict[str, Count] = field(default_factory=dict)

    def gather(self) -> None:
        """Leave documents behind that are not kept, unless all are worked on."""
        if not self.everything and not self.alive.all():
            whole = self.texts
            self.texts = whole.take(self.alive)
            whole.forget()
            self.rows = self.rows[self.alive]
            self.alive = numpy.ones(len(self.rows), dtype=bool)

    def fail(self, failed: Mapping[int, str], label: str) -> None:
        for place, reason in failed.items():
            row = int(self.rows[place])
            self.failed.setdefault(row, f"{label}: {reason}")
            if self.alive[place]:
                self.alive[place] = False
                self.dropped[row] = f"{FAILED}{self.failed[row]}"

    def store(self, name: str, values: NDArray[numpy.float64] | Spans, rows: NDArray[numpy.int64]) -> None:
        """Keep a signal of the documents at ``rows``."""
        if isinstance(values, Spans):
            self.signals[name] = Spans(rows[values.document], values.starts, values.ends, values.values)
        else:
            column = numpy.full(self.count, numpy.nan)
            column[rows] = values
            self.signals[name] = column

    def put(self, mapped: Mapped, label: str) -> None:
        """Take edited texts over, and leave behind what is not kept: a new batch is made in any case."""
        for place, tag in enumerate(mapped.languages or ()):
            if tag is not None:
                self.languages[self.rows[place]] = tag
                self.texts.languages[place] = tag
        changed = [place for place, text in enumerate(mapped.texts) if text is not None]
        for place in changed:
            text = mapped.texts[place]
            assert text is not None
            if not (self.alive[place] or self.everything):
                continue
            try:
                self.sizes[self.rows[place]] = len(text.encode("utf-8"))
            except UnicodeEncodeError:
                self.fail({place: "the text holds half a surrogate pair"}, label)
                continue
            self.edited[self.rows[place]] = text
        if changed:
            whole = self.texts
            self.texts = whole.replaced(mapped.texts)
            whole.forget()
            self.gather()


def execute(
    steps: Sequence[Step],
    texts: Texts,
    *,
    sizes: NDArray[numpy.int64] | None = None,
    pages: Pages | None = None,
    earlier: Stored | None = None,
    found: Mapping[str, Found] | None = None,
    everything: bool = False,
    guard: Guard | None = None,
    first: int = 0,
) -> Done:
    """Run ``steps`` over a batch.

    ``sizes`` are the documents' bytes as UTF-8; ``earlier`` signals are those that steps before have
    stored, and ``found`` the bounds of gates by quantiles. With ``everything`` dropped documents are worked
    on like the others. ``first`` is the row in the shard of the batch's first document.
    """
    if sizes is None:
        sizes = numpy.array([len(text.encode("utf-8", "surrogatepass")) for text in texts.texts], numpy.int64)
    count = texts.count
    work = _Work(
        count,
        texts,
        numpy.arange(count),
        numpy.ones(count, dtype=bool),
        sizes.copy(),
        dict(earlier or {}),
        [None] * count,
        [None] * count,
        [""] * count,
        first,
        everything,
    )
    guard = guard or Guard()
    if pages is not None:
        _extract(work, [step for step in steps if step.kind == "extract"], pages, guard)
    remaining = sum(step.kind in ("score", "map") for step in steps)
    for step in steps:
        if step.kind == "extract":
            continue
        started = time.perf_counter()
        tally = work.counts[step.label] = Count(came=int(work.alive.sum()))
        if step.gate is not None:
            _gate(work, step, found or {})
        else:
            remaining -= 1
            _operate(work, step, guard)
        kept = int(work.alive.sum())
        lost = tally.came - kept
        tally.kept = kept
        tally.dropped, tally.failed = (lost, 0) if step.gate is not None else (0, lost)
        tally.bytes = int(work.sizes[work.rows[work.alive]].sum())
        tally.seconds = time.perf_counter() - started
        if not everything and remaining and kept < _GATHER_BELOW * len(work.rows):
            work.gather()
    work.everything = False
    work.gather()
    stored = {name: values for name, values in work.signals.items() if name not in (earlier or {})}
    return Done(
        work.edited,
        work.languages,
        stored,
        work.dropped,
        work.failed,
        work.counts,
        work.texts,
        work.rows,
        work.sizes,
    )


def _gate(work: _Work, step: Step, found: Mapping[str, Found]) -> None:
    gate = step.gate
    assert gate is not None
    languages = [""] * work.count
    if gate.by_language or gate.languages:
        for row, language in zip(work.rows.tolist(), work.texts.languages, strict=True):
            languages[row] = language
    passing = passes(gate, work.signals, languages, found.get(gate.name))[work.rows]
    for row in work.rows[work.alive & ~passing].tolist():
        work.dropped[row] = gate.name
    work.alive &= passing


def _operate(work: _Work, step: Step, guard: Guard) -> None:
    operator, settings = step.operator, step.settings
    assert operator is not None and settings is not None
    whole, places = work.texts, numpy.arange(work.texts.count)
    if operator.apart and not work.everything and not work.alive.all():
        places = numpy.flatnonzero(work.alive)
        whole = whole.take(places)
    rows = work.rows[places]

    def run(start: int, stop: int) -> Mapped:
        part = whole if stop - start == whole.count else whole.take(numpy.arange(start, stop))
        if operator.kind == "map":
            return apply_map(operator, part, settings)
        return Mapped((), apply_score(operator, part, settings))

    parts, failed = guard.run(step.label, (rows + work.first).tolist(), run)
    if len(failed) > _MOST_MAY_FAIL and 2 * len(failed) > whole.count:
        reason = next(iter(failed.values()))
        raise PunaError(
            "this step fails on most documents",
            where=step.label,
            found=f"{len(failed)} of {whole.count} documents; the first: {reason}",
            fix="see whether its settings suit these documents",
        )
    mapped = _joined(parts, whole.count, step)
    for name, values in mapped.signals.items():
        work.store(f"{step.label}.{name}", values, rows)  # type: ignore[arg-type]
    if operator.spans:
        work.store(characters_of(step.label), whole.lengths.astype(numpy.float64), rows)
    work.fail({int(places[place]): reason for place, reason in failed.items()}, step.label)
    if operator.kind == "map":
        work.put(mapped, step.label)


def _joined(parts: Sequence[tuple[int, int, Mapped]], count: int, step: Step) -> Mapped:
    """The parts of a batch together; documents in none of them have null signals and their old text."""
    operator = step.operator
    assert operator is not None
    if len(parts) == 1 and parts[0][1] - parts[0][0] == count:
        return parts[0][2]
    texts: list[str | None] = [None] * count
    languages: list[str | None] = [None] * count
    signals: dict[str, Any] = {name: numpy.full(count, numpy.nan) for name in operator.signals}
    spans: dict[str, list[Spans]] = {name: [] for name in operator.spans}
    for start, stop, mapped in parts:
        texts[start:stop] = mapped.texts or [None] * (stop - start)
        languages[start:stop] = mapped.languages or [None] * (stop - start)
        for name, values in mapped.signals.items():
            if isinstance(values, Spans):
                spans[name].append(Spans(values.document + start, values.starts, values.ends, values.values))
            else:
                signals[name][start:stop] = values
    return Mapped(texts, signals | {name: joined_spans(found) for name, found in spans.items()}, languages)


def joined_spans(parts: Sequence[Spans]) -> Spans:
    """Spans of several batches one after another."""
    if not parts:
        return Spans.nothing()
    columns = ("document", "starts", "ends", "values")
    return Spans(*(numpy.concatenate([getattr(part, name) for part in parts]) for name in columns))


def _extract(work: _Work, steps: Sequence[Step], pages: Pages, guard: Guard) -> None:
    """Text out of raw pages, page by page."""
    by_media = {step.operator.media: step for step in steps if step.operator is not None}
    raw = [place for place, content in enumerate(pages.contents) if content is not None]
    unread = [place for place in raw if pages.media[place] not in by_media]
    if unread:
        media = pages.media[unread[0]]
        raise PunaError(
            f"the pipeline has no step that extracts text from {media}",
            where="steps",
            found=f"{len(unread)} such pages in the first batch",
            fix="begin it with a step such as {extract: html.resiliparse}",
        )
    made: list[str | None] = [None] * work.count
    for media, step in by_media.items():
        started = time.perf_counter()
        places = [place for place in raw if pages.media[place] == media]
        failed: dict[int, str] = {}
        for place in places:
            text, reason = _page(step, pages.contents[place] or b"", place + work.first, guard)
            made[place] = text
            if reason:
                failed[place] = reason
        work.fail(failed, step.label)
        kept = len(places) - len(failed)
        work.counts[step.label] = Count(len(places), kept, 0, len(failed), time.perf_counter() - started)
    if raw:
        work.put(Mapped(made), "extract")
    for step in steps:
        rows = [place for place in raw if made[place] is not None and by_media[pages.media[place]] is step]
        work.counts[step.label].bytes = int(work.sizes[rows].sum())


def _page(step: Step, content: bytes, row: int, guard: Guard) -> tuple[str | None, str]:
    """The text of one page, or why there is none."""
    operator = step.operator
    assert operator is not None

    def run(start: int, stop: int) -> str:
        text = operator.function(content, step.settings)
        if not isinstance(text, str):
            raise BadDocument("no text")
        text.encode("utf-8")
        return text

    parts, failed = guard.run(step.label, [row], run)
    return (parts[0][2], "") if parts else (None, failed[0])
