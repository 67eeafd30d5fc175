"""Gopher's quality signals: words, symbols, lines (arXiv:2112.11446, appendix A.1).

The paper says what is measured and not how; where that leaves a choice, these are the choices of
datatrove's GopherQualityFilter, but for its words: here words stand between white space, there spaCy's
tokenizer cuts punctuation off. DCLM's choices are ``dclm.words`` and ``dclm.lines``.
"""

from __future__ import annotations

import numpy

from puna.core.stage import Parameters
from puna.data.curate import boundaries, matching  # noqa: F401  (boundaries registers kinds of words)
from puna.data.curate.characters import Table, character_class, table_from
from puna.data.curate.operator import NoSettings, Signals, score
from puna.data.curate.segments import Segments, ratio
from puna.data.curate.texts import Texts, between
from puna.data.curate.texts import lines as lines_of_kind

SOURCE = "arXiv:2112.11446"
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
BULLETS = ("•", "-")
ELLIPSES = ("...", "…")


class WordSettings(Parameters):
    """What counts as a word."""

    words: str = "white_space"
    """Kind of words: white_space, unicode (UAX #29), word_punct or another registered one."""
    stop_words: tuple[str, ...] = STOP_WORDS
    """Words of which a text in the language uses some, written as they must stand in the text."""


@score(
    "gopher.words",
    settings=WordSettings,
    signals={
        "word_count": "words",
        "mean_word_length": "characters of a word; null without words",
        "text_word_count": "words with a letter or digit in them",
        "mean_text_word_length": "characters of a word with a letter or digit in it; null without such words",
        "alphabetic_share": "share of words with a letter in them; null without words",
        "hash_ratio": "signs # per word; null without words",
        "ellipsis_ratio": "ellipses (... and …) per word; null without words",
        "stop_words": "how many different ones of the stop words occur",
    },
    source=SOURCE,
)
def words(texts: Texts, settings: WordSettings) -> Signals:
    """Words, their lengths, symbols per word, and stop words."""
    found = texts.words(settings.words)
    alphabetic = matching.any_in(found, texts.is_class("alphabetic"))
    textual = matching.any_in(found, texts.is_class("alphanumeric"))
    text_words = found.total(textual)
    return {
        "word_count": found.counts,
        "mean_word_length": found.mean(found.lengths),
        "text_word_count": text_words,
        "mean_text_word_length": ratio(found.total(found.lengths * textual), text_words),
        "alphabetic_share": ratio(found.total(alphabetic), found.counts),
        "hash_ratio": ratio(matching.occurrences(texts, "#"), found.counts),
        "ellipsis_ratio": ratio(matching.occurrences(texts, *ELLIPSES), found.counts),
        "stop_words": matching.kinds_of(found, settings.stop_words),
    }


@score(
    "gopher.lines",
    signals={
        "bullet_share": "share of lines that begin with • or -; null without lines",
        "ellipsis_share": "share of lines that end with ... or …; null without lines",
    },
    source=SOURCE,
)
def lines(texts: Texts, settings: NoSettings) -> Signals:
    """Lines that begin with a bullet or end with an ellipsis, of all lines, empty ones too."""
    found = texts.lines("split")
    inner = found.stripped()
    return {
        "bullet_share": found.mean(matching.begins_with(inner, BULLETS)),
        "ellipsis_share": found.mean(matching.ends_with(inner, ELLIPSES)),
    }


@character_class("line_end")
def _line_end() -> Table:
    """What ``str.splitlines`` splits at."""
    return table_from("\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029")


@lines_of_kind("split")
def _split(texts: Texts) -> Segments:
    """What ``str.splitlines()`` gives."""
    ends = numpy.flatnonzero(texts.is_class("line_end"))
    # A carriage return with a line feed behind it, in the same document, is one end with it.
    second = (texts.codes[ends] == 0x0A) & (ends > 0) & ~numpy.isin(ends, texts.bounds)
    second[second] = texts.codes[ends[second] - 1] == 0x0D
    followed = numpy.append(second[1:], False)[: len(second)]
    found = between(texts, ends[~second], ends[~second] + 1 + followed[~second])
    last = numpy.zeros(found.count, dtype=bool)
    last[found.bounds[1:] - 1] = True
    return found.where(~last | (found.lengths > 0))
