"""Rules about single lines of web pages: RefinedWeb's, as DCLM's released pipeline has them.

RefinedWeb (arXiv:2306.01116, appendix G.2) drops lines that are mainly capitals, only digits, a counter
such as "3 likes", or one word. The bounds are settings of those who use the rules: ``refinedweb.lines``
stores what the lines are like, ``dclm.modify_lines`` takes them out.
"""

from __future__ import annotations

import re

import numpy
from numpy.typing import NDArray

from puna.data.curate.segments import Segments, ratio
from puna.data.curate.texts import Texts

COUNTED = (
    *("likes", "shares", "comments", "retweets", "reposts", "quotes"),
    *("bookmarks", "upvotes", "downvotes", "downloads", "views", "followers"),
)
_COUNTER = re.compile(rf"^\W*\d(?:,|\.|\d)*[kmb]?\s+(?:{'|'.join(COUNTED)})\W*$")
_FEWEST_LETTERS = min(map(len, COUNTED))
_MOST_LETTERS = max(map(len, COUNTED)) + 1


def upper_share(lines: Segments) -> NDArray[numpy.float64]:
    """[n] share of capitals among the characters of a line; nan for an empty line."""
    return ratio(lines.count_in(lines.texts.is_class("upper")), lines.lengths)


def digit_share(lines: Segments) -> NDArray[numpy.float64]:
    """[n] share of digits among the characters of a line; nan for an empty line."""
    return ratio(lines.count_in(lines.texts.is_class("digit")), lines.lengths)


def line_words(lines: Segments) -> NDArray[numpy.int64]:
    """[n] words between white space."""
    return lines.count_in(lines.texts.shared("word starts", _word_starts))


def counters(lines: Segments) -> NDArray[numpy.bool_]:
    """[n] whether a line is nothing but a number and what it counts, such as "1.2K views"."""
    texts = lines.texts
    letters = lines.count_in(texts.is_class("alphabetic"))
    digits = lines.count_in(texts.is_class("digit"))
    likely = (letters >= _FEWEST_LETTERS) & (letters <= _MOST_LETTERS) & (digits > 0)
    result = numpy.zeros(lines.count, dtype=bool)
    # So few letters beside a digit are rare; those lines are read one by one.
    for place in numpy.flatnonzero(likely).tolist():
        line = texts.joined[lines.starts[place] : lines.ends[place]]
        result[place] = _COUNTER.search(line.lower()) is not None
    return result


def _word_starts(texts: Texts) -> NDArray[numpy.bool_]:
    """[characters] whether a word begins there."""
    marks = numpy.zeros(len(texts.codes), dtype=bool)
    marks[texts.words("white_space").starts] = True
    return marks


def joined_lines(lines: Segments, chosen: NDArray[numpy.bool_]) -> list[str | None]:
    """[documents] the lines of each ``chosen`` one, with line feeds between; None for the others."""
    kept = lines.where(chosen[lines.document])
    sizes = kept.lengths + 1  # a line feed behind each, of which the document's last one is cut off
    ends = numpy.cumsum(sizes)
    places = numpy.arange(int(ends[-1]) if len(ends) else 0)
    places += numpy.repeat(kept.starts - (ends - sizes), sizes)
    feeds = ends - 1
    places[feeds] = 0
    codes = lines.texts.codes[places]
    codes[feeds] = 0x0A
    joined = codes.astype("<u4", copy=False).tobytes().decode("utf-32-le", "surrogatepass")
    bounds = numpy.concatenate([[0], ends])[kept.bounds].tolist()
    return [
        joined[start : max(end - 1, start)] if change else None
        for start, end, change in zip(bounds, bounds[1:], chosen.tolist(), strict=False)
    ]
