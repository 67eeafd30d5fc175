"""Setu's cleaning: code cut out, lines kept by rules (S60, arXiv:2403.06350).

Definitions are those of AI4Bharat/setu's ``filters.py``. Its code spans are cut one after another though
they may overlap, so that text between them comes twice; here they are united first. Its pattern of CSS
begins at any full stop before a brace, and so does it here: leave ``css`` out where texts hold braces.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

import numpy
import pydantic
from numpy.typing import NDArray

from puna.core.stage import Parameters
from puna.data.curate import special  # noqa: F401  (registers classes of characters)
from puna.data.curate.operator import Mapped, NoSettings, mapper
from puna.data.curate.segments import Segments, ratio
from puna.data.curate.texts import Texts

SOURCE = "arXiv:2403.06350, AI4Bharat/setu"
_CLOSING = re.compile(r"</(?=[^>])")
_BREAK = re.compile(r"\n")
_SCRIPT = re.compile(r"function\s*\(")
_TERMINALS = ".!?।:,;)\"'؟۔"
_UNFINISHED = ("...", "####")
Code = Literal["html", "javascript", "css"]


class CodeSettings(Parameters):
    """Which code."""

    kinds: list[Code] = pydantic.Field(["html", "javascript", "css"], min_length=1)
    """html: elements on one line; javascript: functions; css: from a full stop to a block in braces."""


class LineSettings(Parameters):
    """Rules that a line has to keep to."""

    terminal: bool = True
    """A line ends with one of . ! ? । : , ; ) quotation marks ؟ ۔, and neither with ... nor with ####."""
    number_share: float | None = pydantic.Field(None, gt=0, le=1)
    """A line whose share of characters that are neither letters nor spaces is at least this goes, and one
    that is a number; Setu's value is 0.4. Null: no such rule."""
    once: bool = False
    """A line that occurs more than once in its document goes, all of its copies."""
    several_words: bool = False
    """A line with a single word goes."""


@mapper(
    "setu.remove_code",
    settings=CodeSettings,
    signals={"removed": "characters cut out"},
    source=SOURCE,
)
def remove_code(texts: Texts, settings: CodeSettings) -> Mapped:
    """Cuts out what looks like HTML, JavaScript or CSS."""
    made = [_without_code(text, settings.kinds) for text in texts.texts]
    removed = texts.lengths - numpy.fromiter(map(len, made), numpy.int64, texts.count)
    changed = [new if cut else None for new, cut in zip(made, removed.tolist(), strict=True)]
    return Mapped(changed, {"removed": removed})


def _without_code(text: str, kinds: list[Code]) -> str:
    spans = sorted(span for kind in kinds for span in _spans(text, kind))
    if not spans:
        return text
    parts, done = [], 0
    for start, end in spans:
        parts.append(text[done : max(start, done)])
        done = max(done, end)
    return "".join([*parts, text[done:]])


def _spans(text: str, kind: Code) -> Iterator[tuple[int, int]]:
    """Spans of code, each found by going forward only, so that time grows with the text's length."""
    if kind == "html":
        yield from _elements(text)
    elif kind == "javascript":
        yield from _functions(text)
    else:
        place = text.find(".")
        while place >= 0:
            brace = text.find("{", place)
            close = text.find("}", brace) if brace >= 0 else -1
            if close < 0:
                return
            yield place, close + 1
            place = text.find(".", close + 1)


def _elements(text: str) -> Iterator[tuple[int, int]]:
    r"""What ``<[^>]+?>.+?</[^>]+?>`` finds: a tag, at least one character of its line, and a closing tag."""
    closing = [match.start() for match in _CLOSING.finditer(text)]
    breaks = [match.start() for match in _BREAK.finditer(text)] if closing else []
    place = text.find("<") if closing else -1
    while place >= 0:
        tag_end = text.find(">", place + 1)
        after = bisect_left(closing, tag_end + 2)
        if tag_end < 0 or after == len(closing):
            return
        end = text.find(">", closing[after] + 2)
        if end < 0:
            return
        next_break = bisect_left(breaks, tag_end + 1)
        same_line = next_break == len(breaks) or breaks[next_break] > closing[after]
        if tag_end > place + 1 and same_line:
            yield place, end + 1
            place = text.find("<", end + 1)
        else:
            place = text.find("<", place + 1)


def _functions(text: str) -> Iterator[tuple[int, int]]:
    """The word, brackets, and what the first brace behind a closing bracket opens up to the next one."""
    done = 0
    for match in _SCRIPT.finditer(text):
        if match.start() < done:
            continue
        body = _BODY.search(text, match.end())
        close = text.find("}", body.end()) if body is not None else -1
        if close < 0:
            return
        yield match.start(), close + 1
        done = close + 1


_BODY = re.compile(r"\)\s*\{")


@mapper(
    "setu.lines",
    settings=LineSettings,
    signals={"kept": "share of lines that stay; null without lines"},
    source=SOURCE,
)
def clean_lines(texts: Texts, settings: LineSettings) -> Mapped:
    """Keeps the lines that keep to the rules."""
    found = texts.lines("newline")
    good = numpy.ones(found.count, dtype=bool)
    if settings.terminal:
        good &= ends_well(found)
    if settings.number_share is not None:
        good &= ~_numbers(found, settings.number_share)
    if settings.once:
        good &= found.counts_of() == 1
    if settings.several_words:
        spaces = texts.codes == ord(" ")
        good &= found.count_in(spaces) > 0
    return Mapped(kept_segments(found, good), {"kept": ratio(found.total(good), found.counts)})


def ends_well(found: Segments) -> NDArray[numpy.bool_]:
    """[n] whether each line ends with punctuation that ends sentences or parts of them."""
    well = numpy.isin(found.last, [ord(mark) for mark in _TERMINALS])
    codes = found.texts.codes
    for ending in _UNFINISHED:
        long_enough = found.lengths >= len(ending)
        same = long_enough.copy()
        for back, character in enumerate(reversed(ending), start=1):
            places = numpy.where(long_enough, found.ends - back, 0)
            same &= codes[places] == ord(character) if len(codes) else False
        well &= ~same
    return well


def _numbers(found: Segments, share: float) -> NDArray[numpy.bool_]:
    """[n] whether a line is a number, or its share of other characters than letters is too large."""
    texts = found.texts
    others = found.count_in(~texts.is_class("setu_letter"))
    digits = found.count_in(texts.is_class("numeric"))
    with numpy.errstate(invalid="ignore"):
        much = ratio(others, found.lengths) >= share
    bad: NDArray[numpy.bool_] = (much & (others > 0)) | ((digits == found.lengths) & (found.lengths > 0))
    return bad


def kept_segments(found: Segments, good: NDArray[numpy.bool_]) -> list[str | None]:
    """The texts of a batch of lines without those that are not ``good`` [n]; None where all are."""
    texts = found.texts
    bounds, changed = found.bounds.tolist(), found.total(~good).tolist()
    starts, ends, keep = found.starts.tolist(), found.ends.tolist(), good.tolist()
    result: list[str | None] = [None] * texts.count
    for place, (first, last) in enumerate(pairwise(bounds)):
        if changed[place]:
            origin, text = int(texts.bounds[place]), texts.texts[place]
            kept = (n for n in range(first, last) if keep[n])
            result[place] = "\n".join(text[starts[n] - origin : ends[n] - origin] for n in kept)
    return result


@mapper("setu.normalise", source=SOURCE)
def normalise(texts: Texts, settings: NoSettings) -> list[str | None]:
    """Unicode's form NFKC. Setu normalises letters with the Indic NLP library first, which puna does not."""
    made = [text if text.isascii() else unicodedata.normalize("NFKC", text) for text in texts.texts]
    return [new if new != old else None for new, old in zip(made, texts.texts, strict=True)]
