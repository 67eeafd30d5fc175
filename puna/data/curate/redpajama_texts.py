"""The texts that RedPajama-V2's signals are counted over: raw lines, and lines in normalised form.

Normalised: without ASCII punctuation, in lower case, with single spaces between words, decomposed
(Unicode's NFD). A view holds every document's normalised lines; since white space parts words anyway, its
words are those of the normalised document.
"""

from __future__ import annotations

import unicodedata

import numpy
from numpy.typing import NDArray

from puna.data.curate.segments import Segments
from puna.data.curate.texts import Texts, lines, words

DECIMALS = 8
"""RedPajama rounds its scores to 8 decimals."""


@lines("with_ends")
def _with_ends(texts: Texts) -> Segments:
    """Lines with the line feed that ends them: together they are the whole text."""
    found = texts.lines("newline")
    last = numpy.zeros(found.count, dtype=bool)
    last[found.bounds[1:] - 1] = True
    whole = Segments(texts, found.starts, found.ends + ~last, found.document)
    return whole.where(whole.lengths > 0)


def normalised(texts: Texts) -> Texts:
    """The batch with every line in normalised form."""
    return texts.shared("redpajama normalised", _normalised)


def normalised_lines(texts: Texts) -> Segments:
    """Lines of the normalised batch, one for each line ``with_ends`` of the batch itself."""

    def make(batch: Texts) -> Segments:
        found = normalised(batch).lines("newline")
        # A text that ends with a line feed has no line behind it.
        raw = batch.lines("newline")
        last = numpy.zeros(raw.count, dtype=bool)
        last[raw.bounds[1:] - 1] = True
        return found.where(~(last & (raw.lengths == 0)))

    return texts.shared("redpajama normalised lines", make)


@words("normalised")
def normalised_words(texts: Texts) -> Segments:
    """Words of the normalised batch."""
    return normalised(texts).words("white_space")


def normalised_lengths(texts: Texts) -> NDArray[numpy.int64]:
    """[count] characters of a document in normalised form, in which one space stands between two words."""
    found = normalised_words(texts)
    return found.total(found.lengths) + numpy.maximum(found.counts - 1, 0)


def rounded(values: NDArray[numpy.float64]) -> NDArray[numpy.float64]:
    """``values`` rounded as RedPajama rounds them."""
    return numpy.round(values, DECIMALS)


def _normalised(texts: Texts) -> Texts:
    """All documents at once: a line feed is put behind each, and none is lost or made on the way."""
    kept = ~texts.is_class("punctuation")
    document = texts.document[kept]
    codes = texts.codes[kept]
    spaces = texts.is_class("white_space")[kept]
    feeds = codes == 0x0A
    # A run of white space within a line becomes one space, at a line's ends nothing.
    solid = numpy.flatnonzero(~spaces)
    lines_before = numpy.cumsum(feeds)
    apart = numpy.diff(solid) > 1
    same_line = (document[solid[1:]] == document[solid[:-1]]) & (
        lines_before[solid[1:]] == lines_before[solid[:-1]]
    )
    single = solid[:-1][apart & same_line] + 1
    stays = ~spaces | feeds
    stays[single] = True
    codes = numpy.where(spaces & ~feeds, numpy.uint32(0x20), codes)[stays]
    bounds = numpy.searchsorted(document[stays], numpy.arange(1, texts.count + 1))
    codes = numpy.insert(codes, bounds, 0x0A)
    joined = codes.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")
    joined = unicodedata.normalize("NFD", joined.lower())
    per_document = numpy.bincount(document[feeds], minlength=texts.count) + 1
    every = joined.split("\n")
    ends = numpy.cumsum(per_document)
    made = ["\n".join(every[end - count : end]) for end, count in zip(ends, per_document, strict=True)]
    return texts.replaced(made)
