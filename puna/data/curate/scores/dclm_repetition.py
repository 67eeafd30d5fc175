"""Repetition as DCLM counts it: every copy of what occurs more than once (arXiv:2406.11794).

The shares are Gopher's (arXiv:2112.11446) with the first occurrence counted among the copies: of lines and
paragraphs without white space around them, and of words by Unicode's boundaries that begin with a letter
or digit, with characters between words left out of account. A word in several copied runs counts once.
Copies after the first alone: ``gopher.repetition``.
"""

from __future__ import annotations

import numpy
from numpy.typing import NDArray

from puna.data.curate import boundaries, repetition  # noqa: F401  (boundaries registers kinds of words)
from puna.data.curate.operator import NoSettings, Signals, score
from puna.data.curate.segments import Segments, ratio
from puna.data.curate.texts import Texts, lines

TOP = (2, 3, 4)
COPIED = (5, 6, 7, 8, 9, 10)
_WORDS = "unicode"


@score(
    "dclm.repetition",
    signals={
        "duplicate_line_share": "share of lines that occur more than once; null without lines",
        "duplicate_line_characters": "share of the lines' characters in such lines; null without lines",
        "duplicate_paragraph_share": "share of paragraphs that occur more than once; null without any",
        "duplicate_paragraph_characters": "share of their characters in such paragraphs; null without any",
        **{f"top_{n}gram_characters": f"of the words', share in the most frequent {n} words" for n in TOP},
        **{f"duplicate_{n}gram_characters": f"of the words', share in copied runs of {n}" for n in COPIED},
    },
    source="arXiv:2406.11794",
)
def copies(texts: Texts, settings: NoSettings) -> Signals:
    """Shares of lines, paragraphs and runs of words that occur more than once."""
    signals: dict[str, NDArray[numpy.float64]] = {}
    for name, kind in (("line", "filled"), ("paragraph", "filled_paragraph")):
        segments = texts.lines(kind)
        several = segments.counts_of() > 1
        letters = segments.total(segments.lengths)
        signals[f"duplicate_{name}_share"] = segments.mean(several)
        signals[f"duplicate_{name}_characters"] = ratio(segments.total(segments.lengths * several), letters)
    words = texts.words(_WORDS)
    # A page without words has no n-gram either, and passes.
    letters = numpy.maximum(words.total(words.lengths), 1)
    for n in TOP:
        signals[f"top_{n}gram_characters"] = ratio(repetition.longest_top(words, _WORDS, n), letters)
    for n in COPIED:
        signals[f"duplicate_{n}gram_characters"] = ratio(repetition.covered(words, _WORDS, n), letters)
    return signals


@lines("filled_paragraph")
def _filled_paragraph(texts: Texts) -> Segments:
    """Paragraphs without white space around them, those with nothing else left out."""
    found = texts.lines("paragraph").stripped()
    return found.where(found.lengths > 0)
