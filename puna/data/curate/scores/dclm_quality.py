"""DCLM's quality filters as signals: words, symbols, lines (arXiv:2406.11794, its RefinedWeb heuristics).

Two kinds of words are used, as in DCLM's released pipeline: its length of a page counts fastText's words
that begin with a letter or digit, everything else counts words between white space.
"""

from __future__ import annotations

import numpy
from numpy.typing import NDArray

from puna.data.curate import boundaries, matching  # noqa: F401  (boundaries registers kinds of words)
from puna.data.curate.operator import NoSettings, Signals, score
from puna.data.curate.segments import ratio
from puna.data.curate.texts import Texts

SOURCE = "arXiv:2406.11794"
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
SYMBOLS = ("#", "...", ". . .", "…")
BULLETS = ("●", "•", "*", "-")
ELLIPSES = ("...", ". . .", "…")


@score(
    "dclm.words",
    signals={
        "word_count": "fastText's words that begin with a letter or digit",
        "mean_word_length": "characters of a word between white space; null without words",
        "symbol_ratio": "signs #, ..., . . . and … per word between white space; null without words",
        "not_alphabetic_share": "share of words between white space without a letter; null without words",
        "stop_words": "how often a stop word occurs, in any case",
    },
    source=SOURCE,
)
def words(texts: Texts, settings: NoSettings) -> Signals:
    """Words, their lengths, symbols per word, and occurrences of stop words."""
    found = texts.words("white_space")
    alphabetic = matching.any_in(found, texts.is_class("alphabetic"))
    stop_words = matching.among_few(found, matching.hashes_in_any_case(STOP_WORDS))
    return {
        "word_count": word_count(texts),
        "mean_word_length": found.mean(found.lengths),
        "symbol_ratio": ratio(matching.occurrences(texts, *SYMBOLS), found.counts),
        "not_alphabetic_share": found.mean(~alphabetic),
        "stop_words": found.total(stop_words),
    }


def word_count(texts: Texts) -> NDArray[numpy.int64]:
    """[count] fastText's words that begin with a letter or digit."""
    begins = numpy.ones(len(texts.codes), dtype=bool)
    begins[1:] = texts.is_class("fasttext_space")[:-1]
    begins[texts.bounds[:-1][texts.lengths > 0]] = True
    return texts.total(begins & texts.is_class("alphanumeric"))


@score(
    "dclm.lines",
    signals={
        "bullet_share": "share of lines that begin with ●, •, * or -; null without lines",
        "ellipsis_share": "share of lines that end with ..., . . . or …; null without lines",
    },
    source=SOURCE,
)
def lines(texts: Texts, settings: NoSettings) -> Signals:
    """Lines that begin with a bullet or end with an ellipsis, of those that hold more than white space."""
    found = texts.lines("filled")
    return {
        "bullet_share": found.mean(matching.begins_with(found, BULLETS)),
        "ellipsis_share": found.mean(matching.ends_with(found, ELLIPSES)),
    }
