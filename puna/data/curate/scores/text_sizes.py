"""Sizes of documents: the plainest score, and the example of one."""

from __future__ import annotations

import numpy
from numpy.typing import NDArray

from puna.data.curate.operator import NoSettings, Signals, Spans, score
from puna.data.curate.texts import Texts


@score(
    "text.sizes",
    signals={
        "characters": "code points",
        "words": "words between white space",
        "lines": "lines that hold more than white space",
    },
    spans={"line_words": "words of each such line"},
    source="plain counts",
)
def sizes(texts: Texts, settings: NoSettings) -> Signals:
    """Characters, words and lines of a document, and the words of each line."""
    words, lines = texts.words("white_space"), texts.lines("filled")
    begins = texts.shared("word starts", _word_starts)
    return {
        "characters": texts.lengths,
        "words": words.counts,
        "lines": lines.counts,
        "line_words": Spans.of(lines, lines.count_in(begins)),
    }


def _word_starts(texts: Texts) -> NDArray[numpy.bool_]:
    """[characters] whether a word begins there."""
    marks = numpy.zeros(len(texts.codes), dtype=bool)
    marks[texts.words("white_space").starts] = True
    return marks
