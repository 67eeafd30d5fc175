"""S50: lines of many documents, which are furniture (``document_line_deduplicator``), arXiv:2309.02033.

Notices, menus and headers stand word for word in many pages. A line that more than ``documents`` different
documents have is taken out of all of them, the first one too. Left alone are lines that many texts share
by rights: very short ones, lone brackets, headings of Markdown, environments of LaTeX and lone tags.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy
import pydantic
from numpy.typing import NDArray

from puna.core.stage import Parameters
from puna.data.curate.characters import Table, character_class, table_from
from puna.data.curate.operator import Resolved, Sketch, SketchColumns, Spans, global_operator
from puna.data.curate.scores.data_juicer_characters import SOURCE
from puna.data.curate.segments import Segments, ratio
from puna.data.curate.texts import Texts

_TAG = re.compile(r"</?[a-z][a-z0-9]*[^>]*>?", re.IGNORECASE)
_ENVIRONMENT = re.compile(r"\\(begin|end)\{")
_SPECIAL = re.compile(rf"[^\S\n]+|\d+|[{re.escape(string.punctuation)}]")


class CommonLineSettings(Parameters):
    """Which lines are taken out."""

    documents: pydantic.PositiveInt = 6
    """Documents that may share a line; one of more of them is taken out."""
    lower: bool = False
    """Whether lines are compared in lower case."""
    ignore_special: bool = False
    """Whether lines are compared without white space, digits and ASCII's punctuation."""
    shortest: pydantic.NonNegativeInt = 2
    """Lines of fewer characters, white space around them left out, stay."""
    keep_brackets: bool = True
    """Whether lines of brackets and semicolons alone stay."""
    keep_headings: bool = True
    """Whether lines that begin with # stay."""
    keep_environments: bool = True
    r"""Whether lines that begin with \\begin{ or \\end{ stay."""
    keep_tags: bool = True
    """Whether lines that are one tag of HTML or XML stay."""


@global_operator(
    "data_juicer.common_lines",
    settings=CommonLineSettings,
    signals={"lines": "lines taken out", "share": "share of the document's lines; null for an empty text"},
    source=SOURCE,
)
class CommonLines:
    """Takes lines of many documents out of all of them (``document_line_deduplicator``).

    On disk 24 bytes per line. Memory: 24 bytes per line of all shards, each counted once per document.
    """

    def sketch(self, texts: Texts, settings: CommonLineSettings) -> SketchColumns:
        """Hashes of lines (0: it stays whatever others hold), and where they lie."""
        lines = texts.lines("newline")
        hashes = _compared(texts, settings).lines("newline").stripped().hashes.copy()
        hashes[_left_alone(lines.stripped(), settings)] = 0
        origin = texts.bounds[lines.document]
        places = {"starts": lines.starts - origin, "ends": lines.ends - origin}
        columns = {name: (values, lines.bounds) for name, values in places.items()}
        return {"hashes": (hashes, lines.bounds), **columns}

    def resolve(
        self, sketches: Sequence[Sketch], settings: CommonLineSettings, work: Path
    ) -> Iterator[Resolved]:
        """Lines taken out, shard by shard."""
        parts = [_once_per_document(*sketch.ragged("hashes")) for sketch in sketches]
        nothing = numpy.zeros(0, dtype=numpy.uint64)
        different, counts = numpy.unique(numpy.concatenate([*parts, nothing]), return_counts=True)
        common = different[(counts > settings.documents) & (different != 0)]
        for sketch in sketches:
            hashes, bounds = sketch.ragged("hashes")
            out = numpy.isin(hashes, common)
            document = numpy.repeat(numpy.arange(sketch.count), numpy.diff(bounds))
            starts, ends = sketch.ragged("starts")[0], sketch.ragged("ends")[0]
            lost = numpy.bincount(document[out], minlength=sketch.count)
            cut = cut_lines(document, starts, ends, out) if out.any() else None
            filled = numpy.bincount(document, ends - starts, minlength=sketch.count) > 0
            share = numpy.where(filled, ratio(lost, numpy.diff(bounds)), numpy.nan)
            yield Resolved({"lines": lost, "share": share}, cut)


def cut_lines(
    document: NDArray[numpy.int64],
    starts: NDArray[numpy.int64],
    ends: NDArray[numpy.int64],
    out: NDArray[numpy.bool_],
) -> Spans:
    r"""The characters that go with the lines ``out`` [lines]: what stays is joined by one ``\n``.

    The line break before a line stays if that line does, and one before it in the document.
    """
    kept_before: NDArray[numpy.int64] = numpy.cumsum(~out) - ~out
    first = numpy.flatnonzero(numpy.diff(document, prepend=-1))
    kept_before = kept_before - numpy.repeat(kept_before[first], numpy.diff(first, append=len(document)))
    is_first = numpy.zeros(len(document), dtype=bool)
    is_first[first] = True
    with_break = ~is_first & (out | (kept_before == 0))
    begins = numpy.where(with_break, starts - 1, starts)
    finishes = numpy.where(out, ends, starts)
    some = finishes > begins
    return Spans(document[some], begins[some], finishes[some], numpy.ones(int(some.sum())))


def _once_per_document(hashes: NDArray[numpy.uint64], bounds: NDArray[numpy.int64]) -> NDArray[numpy.uint64]:
    """Every hash of a document once, document by document."""
    document = numpy.repeat(numpy.arange(len(bounds) - 1), numpy.diff(bounds))
    order = numpy.lexsort((hashes, document))
    hashes, document = hashes[order], document[order]
    again = numpy.zeros(len(hashes), dtype=bool)
    again[1:] = (hashes[1:] == hashes[:-1]) & (document[1:] == document[:-1])
    return hashes[~again]


def _compared(texts: Texts, settings: CommonLineSettings) -> Texts:
    """The texts as they are compared; they have the same lines."""
    if settings.lower:
        texts = texts.lower
    return (
        texts.view("without special", lambda text: _SPECIAL.sub("", text))
        if settings.ignore_special
        else texts
    )


def _left_alone(lines: Segments, settings: CommonLineSettings) -> NDArray[numpy.bool_]:
    """[lines] whether a line, stripped, stays whatever others hold."""
    alone = lines.lengths < settings.shortest
    if settings.keep_brackets:
        alone |= lines.count_in(lines.texts.is_class("data_juicer_brackets")) == lines.lengths
    if settings.keep_headings:
        alone |= lines.first == ord("#")
    rules = [
        (settings.keep_tags, "<", _TAG.fullmatch),
        (settings.keep_environments, "\\", _ENVIRONMENT.match),
    ]
    for wanted, begin, rule in rules:
        if wanted:
            places = numpy.flatnonzero(lines.first == ord(begin))  # Few lines begin so.
            for place, line in zip(
                places.tolist(), lines.where(lines.first == ord(begin)).strings(), strict=True
            ):
                alone[place] |= rule(line) is not None
    return alone


@character_class("data_juicer_brackets")
def _brackets() -> Table:
    return table_from("{}[]();")
