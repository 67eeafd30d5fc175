"""Data-Juicer's scores of characters and lines (S50, arXiv:2309.02033).

Definitions are those of modelscope/data-juicer's filters, its defaults those of the gates in the presets.
Where a document has nothing to divide by, its score is 0 there, and so here.
"""

from __future__ import annotations

import numpy
import pydantic
from numpy.typing import NDArray

from puna.core.stage import Parameters
from puna.data.curate import special  # noqa: F401  (registers classes of characters)
from puna.data.curate.counting import character_ngrams
from puna.data.curate.operator import NoSettings, Signals, score
from puna.data.curate.segments import Segments, ratio
from puna.data.curate.texts import Texts, lines

SOURCE = "arXiv:2309.02033, modelscope/data-juicer"


def or_zero(part: NDArray[numpy.generic], whole: NDArray[numpy.generic]) -> NDArray[numpy.float64]:
    """``part / whole``, and 0 where ``whole`` is 0."""
    return numpy.nan_to_num(ratio(part, whole))


@score("data_juicer.alphanumeric", signals={"ratio": "letters and digits by characters"}, source=SOURCE)
def alphanumeric(texts: Texts, settings: NoSettings) -> Signals:
    """Share of characters for which ``str.isalnum`` holds (``alphanumeric_filter``)."""
    return {"ratio": or_zero(texts.count_of("alphanumeric"), texts.lengths)}


@score("data_juicer.special_characters", signals={"ratio": "special characters by characters"}, source=SOURCE)
def special_characters(texts: Texts, settings: NoSettings) -> Signals:
    """Share of special characters: punctuation, digits, white space (the plain space too), symbols, emoji."""
    return {"ratio": or_zero(texts.count_of("data_juicer_special"), texts.lengths)}


@score("data_juicer.text_length", signals={"characters": "characters"}, source=SOURCE)
def text_length(texts: Texts, settings: NoSettings) -> Signals:
    """Characters of a document (``text_length_filter``)."""
    return {"characters": texts.lengths}


@lines("splitlines")
def split_lines(texts: Texts) -> Segments:
    r"""What ``str.splitlines`` gives: ``\r\n`` is one break, and none is behind the last one."""
    breaks = texts.is_class("line_break")
    places = numpy.flatnonzero(breaks)
    codes = texts.codes
    # A line feed behind a carriage return ends no line of its own, unless a document begins with it.
    after = places[1:][(codes[places[1:]] == 10) & (codes[places[:-1]] == 13) & (numpy.diff(places) == 1)]
    begins_document = numpy.isin(after, texts.bounds[:-1])
    swallowed = after[~begins_document]
    ends = places[~numpy.isin(places, swallowed)]
    following = ends + 1
    following[numpy.isin(following, swallowed)] += 1
    filled = texts.lengths > 0
    starts = numpy.union1d(texts.bounds[:-1][filled], following[~numpy.isin(following, texts.bounds)])
    starts = starts.astype(numpy.int64)
    # A line ends at the first break from its start on, or with its document.
    document_end = texts.bounds[numpy.searchsorted(texts.bounds, starts, side="right")]
    ended = numpy.append(ends, len(codes))[numpy.searchsorted(ends, starts)]
    stops = numpy.minimum(ended, document_end)
    document = numpy.searchsorted(texts.bounds, starts, side="right") - 1
    return Segments(texts, starts, stops, document)


@score("data_juicer.average_line_length", signals={"characters": "characters by lines"}, source=SOURCE)
def average_line_length(texts: Texts, settings: NoSettings) -> Signals:
    """Characters of a document, line breaks among them, by its lines (``average_line_length_filter``)."""
    return {"characters": or_zero(texts.lengths, texts.lines("splitlines").counts)}


@score(
    "data_juicer.maximum_line_length", signals={"characters": "characters of the longest line"}, source=SOURCE
)
def maximum_line_length(texts: Texts, settings: NoSettings) -> Signals:
    """Characters of the longest line (``maximum_line_length_filter``)."""
    found = texts.lines("splitlines")
    return {"characters": found.largest(found.lengths)}


class RepetitionSettings(Parameters):
    """Length of what is counted."""

    n: pydantic.PositiveInt = 10
    """Characters or words of an n-gram."""


@score(
    "data_juicer.character_repetition",
    settings=RepetitionSettings,
    signals={"ratio": "share of n-grams that are among the most frequent ones"},
    source=SOURCE,
)
def character_repetition(texts: Texts, settings: RepetitionSettings) -> Signals:
    """Share of a document's n-grams of characters that the k most frequent ones make up.

    k is the smaller of the square root of the number of different ones and the number of repeated ones.
    """
    found = character_ngrams(texts, settings.n)
    k = numpy.minimum(numpy.sqrt(found.distinct).astype(numpy.int64), found.repeated)
    return {"ratio": or_zero(found.in_top(k), found.total)}
