"""Rules about whole pages: C4's words that are not wanted (arXiv:1910.10683), mC4's long lines (2010.11934).

The list of words (LDNOOBW) is others' and not part of puna: a folder of ``LANGUAGE.txt`` files is given,
one word or phrase a line. A word counts where no word character stands beside it; in Japanese, Thai and
Chinese, which part no words, it counts wherever it stands.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import numpy

from puna.core.stage import Parameters
from puna.data.curate import matching
from puna.data.curate.operator import NoSettings, Signals, score
from puna.data.curate.scores.redpajama_content import words_of
from puna.data.curate.texts import Texts

_UNPARTED = ("ja", "th", "zh")


class BadWordSettings(Parameters):
    """The list, and what to do without a language."""

    words: Path
    """Folder of files LANGUAGE.txt, one word or phrase a line in lower case."""
    language: str = "en"
    """Language code of documents whose language is not known."""


@score(
    "c4.bad_words",
    settings=BadWordSettings,
    signals={"bad_words": "words and phrases of the list in the text; null without a list for its language"},
    source="arXiv:1910.10683",
)
def bad_words(texts: Texts, settings: BadWordSettings) -> Signals:
    """Words of a list that a user gives."""
    found = numpy.full(texts.count, numpy.nan)
    for place, (text, language) in enumerate(zip(texts.texts, texts.languages, strict=True)):
        pattern = _pattern(settings.words, language or settings.language)
        if pattern is not None:
            found[place] = len(pattern.findall(text.lower()))
    return {"bad_words": found}


@cache
def _pattern(folder: Path, language: str) -> re.Pattern[str] | None:
    entries = words_of(folder, language)
    if not entries:
        return None
    words = matching.either(entries)
    return re.compile(words if language in _UNPARTED else rf"(?<!\w)(?:{words})(?!\w)")


@score(
    "c4.long_lines",
    signals={"third_longest": "characters of the third longest line; null with fewer than three lines"},
    source="arXiv:2010.11934",
)
def long_lines(texts: Texts, settings: NoSettings) -> Signals:
    """The third longest line: mC4 keeps pages with three lines of at least 200 characters."""
    lines = texts.lines("newline")
    order = numpy.lexsort((lines.lengths, lines.document))
    third = numpy.full(texts.count, numpy.nan)
    enough = lines.counts >= 3
    third[enough] = lines.lengths[order][lines.bounds[1:][enough] - 3]
    return {"third_longest": third}
