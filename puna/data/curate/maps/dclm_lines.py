"""DCLM's line modifiers: lines and phrases of a page's furniture are taken out (arXiv:2406.11794).

In the order of its released pipeline: lines of capitals, lines of digits, counters ("3 likes"), lines of
fewer than two words, and out of short lines the phrases "items in cart", "Read more..." at the end and
"Sign-in" at the start. White space around the page goes with each step but that of the short lines. A page
that lost more than 5% of its words this way is dropped by a gate over ``removed_share``.

One thing is different: the released pipeline reads "Read more..." as a regular expression, whose points
stand for any character; here they are points. A page of which nothing is left stays as an empty text with
a removed share of 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy
from numpy.typing import NDArray

from puna.core.stage import Parameters
from puna.data.curate.line_rules import counters, digit_share, joined_lines, line_words, upper_share
from puna.data.curate.operator import Mapped, mapper
from puna.data.curate.scores.dclm_quality import word_count
from puna.data.curate.segments import Segments, ratio
from puna.data.curate.texts import Texts


class LineSettings(Parameters):
    """Bounds of lines that stay, and phrases that are cut."""

    upper_maximum: float = 0.5
    """Largest share of capitals among a line's characters."""
    digit_maximum: float = 0.999999
    """Largest share of digits among a line's characters."""
    counters: bool = True
    """Whether lines such as "3 likes" are taken out."""
    min_words: int = 2
    """Fewest words of a line that is not empty."""
    short_line: int = 10
    """Most words of a line out of which phrases are cut."""
    anywhere: tuple[str, ...] = ("items in cart",)
    """Phrases cut wherever they stand, in any case, with one white space before them."""
    at_end: tuple[str, ...] = ("Read more...",)
    """Phrases cut at the end of a line, in any case, with one white space before them."""
    at_start: tuple[str, ...] = ("Sign-in",)
    """Phrases cut at the start of a line, in any case, with one white space behind them."""


@mapper(
    "dclm.modify_lines",
    settings=LineSettings,
    signals={
        "words_before": "fastText's words that begin with a letter or digit, before",
        "words_after": "the same afterwards",
        "removed_share": "share of these words that was removed; null for a page without words",
    },
    source="arXiv:2406.11794",
)
def modify_lines(texts: Texts, settings: LineSettings) -> Mapped:
    """Lines of capitals, digits, counters and single words, and three phrases, are taken out."""
    made = _with_phrases_cut(texts, _with_lines_kept(texts, settings), settings)
    before = word_count(texts)
    changed = numpy.array([text is not None for text in made], dtype=bool)
    after = before.copy()
    after[changed] = word_count(Texts([text for text in made if text is not None]))
    removed = ratio(before - after, before)
    return Mapped(made, {"words_before": before, "words_after": after, "removed_share": removed})


def _with_lines_kept(texts: Texts, settings: LineSettings) -> list[str | None]:
    """The pages without the lines that the rules take out; None where nothing changes."""
    lines = texts.lines("newline")
    page = _Page(lines)
    page.take_out(lambda now: upper_share(now) > settings.upper_maximum)
    page.strip()
    page.take_out(lambda now: digit_share(now) > settings.digit_maximum)
    page.strip()
    if settings.counters:
        page.take_out(counters)
        page.strip()
    page.take_out(lambda now: (line_words(now) < settings.min_words) & (now.lengths > 0))
    page.strip()
    return joined_lines(page.left(), page.changed())


class _Page:
    """The lines of a batch while rules go over them: which are left, and from where to where each goes."""

    def __init__(self, lines: Segments) -> None:
        self.lines = lines
        self.inner = lines.stripped()
        self.kept = numpy.ones(lines.count, dtype=bool)
        self.starts, self.ends = lines.starts.copy(), lines.ends.copy()

    def left(self) -> Segments:
        """The lines that are left."""
        kept = self.kept
        return Segments(self.lines.texts, self.starts[kept], self.ends[kept], self.lines.document[kept])

    def take_out(self, rule: Callable[[Segments], NDArray[numpy.bool_]]) -> None:
        """Take out the lines of which a rule holds."""
        self.kept[numpy.flatnonzero(self.kept)[rule(self.left())]] = False

    def strip(self) -> None:
        """Cut white space off both ends of every page, whole lines of it too."""
        solid = numpy.flatnonzero(self.kept & (self.inner.lengths > 0))
        document = self.lines.document[solid]
        count = self.lines.texts.count
        first = numpy.full(count, self.lines.count, dtype=numpy.int64)
        last = numpy.full(count, -1, dtype=numpy.int64)
        first[document[::-1]] = solid[::-1]
        last[document] = solid
        place = numpy.arange(self.lines.count)
        self.kept &= (place >= first[self.lines.document]) & (place <= last[self.lines.document])
        have = last >= 0
        self.starts[first[have]] = self.inner.starts[first[have]]
        self.ends[last[have]] = self.inner.ends[last[have]]

    def changed(self) -> NDArray[numpy.bool_]:
        """[documents] whether a page is no longer what it was."""
        moved = ~self.kept | (self.starts != self.lines.starts) | (self.ends != self.lines.ends)
        return self.lines.total(moved) > 0


def _with_phrases_cut(texts: Texts, made: list[str | None], settings: LineSettings) -> list[str | None]:
    """``made`` without the phrases; only pages that hold one are looked through."""
    cuts = [
        *(re.compile(rf"\s?{re.escape(phrase)}", re.I) for phrase in settings.anywhere),
        *(re.compile(rf"\s?{re.escape(phrase)}$", re.I) for phrase in settings.at_end),
        *(re.compile(rf"^{re.escape(phrase)}\s?", re.I) for phrase in settings.at_start),
    ]
    phrases = [phrase.lower() for phrase in (*settings.anywhere, *settings.at_end, *settings.at_start)]
    result = list(made)
    for place, (old, new) in enumerate(zip(texts.texts, made, strict=True)):
        text = old if new is None else new
        lower = text.lower()
        if any(phrase in lower for phrase in phrases):
            for cut in cuts:
                text = _cut(text, cut, settings.short_line)
            result[place] = text
    return result


def _cut(text: str, pattern: re.Pattern[str], short_line: int) -> str:
    lines = []
    for line in text.split("\n"):
        if len(line.split()) <= short_line:
            shorter = pattern.sub("", line)
            if line and not shorter.strip():
                continue
            line = shorter
        lines.append(line)
    return "\n".join(lines).strip()
