"""C4's line filters: lines that end like sentences stay (arXiv:1910.10683, section 2.2).

The rules and their order are those of the code that made C4: no overlong word; citations such as [12] cut
out; the line ends in . ? ! or " but not in an ellipsis; at least so many words; no "javascript"; none of
the phrases of privacy policies. Lines with "lorem ipsum" or an opening curly bracket that came so far are
counted, for gates to drop the page. The journal's text (2020) and that code ask for 5 words a line and 3
sentences a page, the preprint's first version and datatrove for 3 words and 5 sentences: both by settings.

Simplified: C4 counts sentences with NLTK's trained Punkt model. Here a sentence ends at marks . ? ! … with
white space or the line's end behind them and closing quotes or brackets, and a line is one sentence at
least; "e.g. this" counts as an end, which Punkt would know better.
"""

from __future__ import annotations

import re

import numpy
from numpy.typing import NDArray

from puna.core.stage import Parameters
from puna.data.curate import matching
from puna.data.curate.characters import Table, character_class, table_from
from puna.data.curate.line_rules import joined_lines, line_words
from puna.data.curate.operator import Mapped, mapper
from puna.data.curate.scores import gopher_quality  # noqa: F401  (registers lines of kind "split")
from puna.data.curate.segments import Segments
from puna.data.curate.texts import Texts

POLICIES = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
ENDS = (".", "?", "!", '"')
_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")


class LineSettings(Parameters):
    """Bounds of lines that stay."""

    min_words: int = 5
    """Fewest words of a line."""
    max_word_length: int = 1000
    """Most characters of a word."""
    citations: bool = True
    """Whether [12], [edit] and [citation needed] are cut out."""
    ends: tuple[str, ...] = ENDS
    """What a line ends in."""
    policies: tuple[str, ...] = POLICIES
    """Phrases, in lower case, of lines that are taken out."""


@mapper(
    "c4.lines",
    settings=LineSettings,
    signals={
        "lorem_ipsum": "lines that hold lorem ipsum, of those that passed the rules before",
        "curly_brackets": "lines that hold an opening curly bracket, of those that passed the rules before",
        "sentences": "sentences of the lines that are left",
        "kept_share": "share of lines that are left; 0 for an empty text",
    },
    source="arXiv:1910.10683",
)
def lines(texts: Texts, settings: LineSettings) -> Mapped:
    """Lines that do not end like a sentence are taken out, and short ones, and some by their words."""
    found = _without_citations(texts, settings)
    passing = ~_with_long_word(found, settings.max_word_length)
    passing &= matching.ends_with(found, settings.ends) & ~matching.ends_with(found, ("...",))
    passing &= line_words(found) >= settings.min_words
    filler = passing & matching.holds_any(found, ("lorem ipsum",))
    passing &= ~matching.holds_any(found, ("javascript",))
    brackets = passing & (found.count_in(found.texts.is_class("opening_curly_bracket")) > 0)
    passing &= ~matching.holds_any(found, settings.policies)
    kept = found.where(passing)
    made = joined_lines(kept, numpy.ones(texts.count, dtype=bool))
    stripped = ["" if text is None else text.strip() for text in made]
    return Mapped(
        [None if new == old else new for new, old in zip(stripped, texts.texts, strict=True)],
        {
            "lorem_ipsum": found.total(filler),
            "curly_brackets": found.total(brackets),
            "sentences": kept.total(sentences(kept)),
            "kept_share": kept.counts / numpy.maximum(texts.lines("split").counts, 1),
        },
    )


def _without_citations(texts: Texts, settings: LineSettings) -> Segments:
    """Lines without white space around them and without citations, of a batch that holds them so.

    What a citation leaves at a line's end, such as the space before it, stays, as it did in C4.
    """
    cited = [settings.citations and _CITATION.search(text) is not None for text in texts.texts]
    if not any(cited):
        return texts.lines("split").stripped()
    batch = texts.replaced(
        [
            "\n".join(_CITATION.sub("", line.strip()) for line in text.splitlines()) if change else None
            for text, change in zip(texts.texts, cited, strict=True)
        ]
    )
    raw = batch.lines("split")
    inner = raw.stripped()
    done = numpy.array(cited, dtype=bool)[raw.document]
    starts, ends = numpy.where(done, raw.starts, inner.starts), numpy.where(done, raw.ends, inner.ends)
    return Segments(batch, starts, ends, raw.document)


def _with_long_word(lines: Segments, most: int) -> NDArray[numpy.bool_]:
    """[n] whether a line holds a word of more than ``most`` characters."""
    words = lines.texts.words("white_space")
    marks = numpy.zeros(len(lines.texts.codes), dtype=bool)
    marks[words.starts[words.lengths > most]] = True
    return lines.count_in(marks) > 0


def sentences(lines: Segments) -> NDArray[numpy.int64]:
    """[n] sentences of lines that are not empty, by the rule in this module's header."""
    line, _ = sentence_ends(lines)
    return numpy.maximum(numpy.bincount(line, minlength=lines.count), 1)


def sentence_ends(lines: Segments) -> tuple[NDArray[numpy.int64], NDArray[numpy.int64]]:
    """Where sentences end, in order: the line's number, and the place behind marks and closing quotes."""
    texts = lines.texts
    marks = texts.runs(texts.is_class("sentence_mark"))
    places = marks.ends.copy()
    closers, spaces = texts.is_class("closer"), texts.is_class("white_space")
    last = len(texts.codes)
    for _ in range(2):
        inside = places < last
        inside[inside] = closers[places[inside]]
        places = places + inside
    line = numpy.searchsorted(lines.starts, marks.starts, side="right") - 1
    ends = lines.ends[numpy.maximum(line, 0)] if lines.count else numpy.zeros(0, dtype=numpy.int64)
    within = (line >= 0) & (marks.starts < ends) if lines.count else numpy.zeros(0, dtype=bool)
    line, places, ends = line[within], places[within], ends[within]
    stops = places >= ends
    stops[~stops] = spaces[places[~stops]]
    return line[stops], numpy.minimum(places, ends)[stops]


@character_class("opening_curly_bracket")
def _opening_curly_bracket() -> Table:
    return table_from("{")


@character_class("sentence_mark")
def _sentence_mark() -> Table:
    return table_from(".?!…")


@character_class("closer")
def _closer() -> Table:
    return table_from("\"'”’»)]")
