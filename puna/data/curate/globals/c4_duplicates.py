"""C4's duplicates: spans of three sentences, or lines, all but the first of which go (arXiv:1910.10683).

The paper discards all but one of any span of three sentences that occurs more than once in the data set;
the code that made C4 does so with lines, in lower case. They are two operators. Both cut texts and drop
nothing: gates over what is left (C4's own is three sentences) come behind them, as they did there.

Simplified: sentences end as in ``c4.lines`` and never run over a line's end. Where two copies overlap
("A. B. A. B. A."), the later span is cut whole, though its beginning belongs to the one that stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import pydantic
from numpy.typing import NDArray

from puna.core.stage import Parameters
from puna.data.curate.globals.data_juicer_lines import cut_lines
from puna.data.curate.maps.c4_lines import sentence_ends
from puna.data.curate.operator import NoSettings, Resolved, Sketch, SketchColumns, Spans, global_operator
from puna.data.curate.segments import Segments, ratio
from puna.data.curate.texts import Texts

_SOURCE = "arXiv:1910.10683"


class SpanSettings(Parameters):
    """What is compared."""

    sentences: pydantic.PositiveInt = 3
    """Sentences of a span."""


@global_operator(
    "c4.duplicate_spans",
    settings=SpanSettings,
    signals={"share": "share of the document's characters that were cut; null for an empty text"},
    source=_SOURCE,
)
class DuplicateSpans:
    """Cuts spans of three sentences that came before, in this document or another one.

    Sentences are compared letter by letter; white space between them does not count, nor do lines' ends.
    On disk 24 bytes per sentence. Memory: 24 bytes per sentence of all shards.
    """

    def sketch(self, texts: Texts, settings: SpanSettings) -> SketchColumns:
        """Hashes of spans, and where they lie."""
        spans = sentences_of(texts).ngrams(settings.sentences)
        return {"hashes": (spans.hashes, spans.bounds), **_places(spans)}

    def resolve(self, sketches: Sequence[Sketch], settings: SpanSettings, work: Path) -> Iterator[Resolved]:
        """What is cut, shard by shard."""
        for sketch, again in zip(sketches, _came_before(sketches), strict=True):
            document, starts, ends = _read(sketch)
            cut = Spans(document[again], starts[again], ends[again], numpy.ones(int(again.sum())))
            # Spans overlap, and both their starts and their ends grow: what is cut counts once.
            before = numpy.concatenate([[0], cut.ends])[:-1]
            same = numpy.diff(cut.document, prepend=-1) == 0
            fresh = cut.ends - numpy.maximum(cut.starts, numpy.where(same, before, 0))
            lost = numpy.bincount(cut.document, fresh, minlength=sketch.count)
            yield Resolved({"share": ratio(lost, sketch.read("length"))}, cut if again.any() else None)


@global_operator(
    "c4.duplicate_lines",
    settings=NoSettings,
    signals={"share": "share of the document's lines with text that were cut; null without any"},
    source=f"{_SOURCE}; the code that made C4, in TensorFlow Datasets",
)
class DuplicateLines:
    """Cuts lines that came before, in this document or another one, in lower case and stripped.

    On disk 24 bytes per line. Memory: 24 bytes per line of all shards.
    """

    def sketch(self, texts: Texts, settings: NoSettings) -> SketchColumns:
        """Hashes of lines (0: an empty one, which stays), and where they lie."""
        lines = texts.lines("newline")
        stripped = texts.lower.lines("newline").stripped()
        hashes = numpy.where(stripped.lengths > 0, stripped.hashes, numpy.uint64(0))
        return {"hashes": (hashes, lines.bounds), **_places(lines)}

    def resolve(self, sketches: Sequence[Sketch], settings: NoSettings, work: Path) -> Iterator[Resolved]:
        """What is cut, shard by shard."""
        for sketch, again in zip(sketches, _came_before(sketches), strict=True):
            hashes = sketch.ragged("hashes")[0]
            out = again & (hashes != 0)
            document, starts, ends = _read(sketch)
            lost = numpy.bincount(document[out], minlength=sketch.count)
            filled = numpy.bincount(document[hashes != 0], minlength=sketch.count)
            yield Resolved(
                {"share": ratio(lost, filled)}, cut_lines(document, starts, ends, out) if out.any() else None
            )


def sentences_of(texts: Texts) -> Segments:
    """Sentences without white space around them: they end at marks, or where their line ends."""
    lines = texts.lines("filled")
    line, ends = sentence_ends(lines)
    # A line's last sentence ends where it does, whatever it ends in.
    line = numpy.concatenate([line, numpy.arange(lines.count)])
    ends = numpy.concatenate([ends, lines.ends])
    order = numpy.lexsort((ends, line))
    line, ends = line[order], ends[order]
    starts = numpy.concatenate([[0], ends[:-1]])
    begins = numpy.concatenate([[True], line[1:] != line[:-1]])[: len(line)]
    starts = numpy.where(begins, lines.starts[line], starts[: len(line)])
    found = Segments(texts, starts, ends, lines.document[line]).stripped()
    return found.where(found.lengths > 0)


def _places(segments: Segments) -> dict[str, Any]:
    origin = segments.texts.bounds[segments.document]
    return {
        "starts": (segments.starts - origin, segments.bounds),
        "ends": (segments.ends - origin, segments.bounds),
        "length": segments.texts.lengths,
    }


def _read(sketch: Sketch) -> tuple[NDArray[numpy.int64], NDArray[numpy.int64], NDArray[numpy.int64]]:
    """Document, start and end of what was compared, in order."""
    starts, bounds = sketch.ragged("starts")
    return numpy.repeat(numpy.arange(sketch.count), numpy.diff(bounds)), starts, sketch.ragged("ends")[0]


def _came_before(sketches: Sequence[Sketch]) -> Iterator[NDArray[numpy.bool_]]:
    """Per shard, whether an equal hash came before, in it or in an earlier one."""
    parts = [sketch.ragged("hashes")[0] for sketch in sketches]
    again = numpy.ones(sum(map(len, parts)), dtype=bool)
    if len(again):
        again[numpy.unique(numpy.concatenate(parts), return_index=True)[1]] = False
    start = 0
    for part in parts:
        yield again[start : start + len(part)]
        start += len(part)
