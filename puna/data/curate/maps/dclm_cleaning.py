"""DCLM's edits of whole pages: URLs are taken out, and long runs of line ends are shortened.

URLs are what DCLM's two regular expressions match (arXiv:2406.11794, its released pipeline): a host name
that ends in a top-level domain of IANA's list (ASCII ones, as of 2026-11-17), and an IPv4 address, each
with up to ten white spaces before it and with the path behind it. Searching whole pages with them is slow,
so only runs of URL characters that hold such a point are searched.

One thing is different: the released code first asks whether the page *begins* with the name of a
top-level domain, and otherwise leaves its host names in. Here every page is searched.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import numpy
from numpy.typing import NDArray

from puna.core.stage import Parameters
from puna.data.curate import matching
from puna.data.curate.characters import Table, character_class, table_from
from puna.data.curate.operator import Mapped, NoSettings, mapper
from puna.data.curate.texts import Texts

_SOURCE = "arXiv:2406.11794"
_WORD = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
_TAIL = r"[-a-zA-Z0-9()@:%_+.~#?&/=]*"
_ADDRESS = re.compile(
    rf"\s{{0,10}}\b(?:(?:https?|ftp)://)?(?:[0-2]?[0-9]{{1,2}}\.){{3}}[0-2]?[0-9]{{1,2}}{_TAIL}"
)
_MOST_SPACES = 10


@cache
def top_level_domains() -> frozenset[str]:
    """IANA's top-level domains in ASCII letters, in lower case."""
    text = (Path(__file__).parent.parent / "top_level_domains.txt").read_text(encoding="ascii")
    return frozenset(text.split())


@character_class("url")
def _url() -> Table:
    """Characters that a URL may hold, as DCLM's expressions have them."""
    return table_from(_WORD + "-@:%._+~#=()?&/")


@mapper("dclm.remove_urls", signals={"removed_urls": "URLs that were taken out"}, source=_SOURCE)
def remove_urls(texts: Texts, settings: NoSettings) -> Mapped:
    """URLs and IPv4 addresses are taken out, with the white space before them."""
    points, domains = _domain_points(texts)
    counts = numpy.zeros(texts.count, dtype=numpy.int64)
    made: list[str | None] = [None] * texts.count
    if len(points):
        made = _substituted(texts, _host_pattern(tuple(sorted(domains))), points, 1, counts)
    # Addresses are looked for in what the first expression has left.
    left = texts.replaced(made) if any(text is not None for text in made) else texts
    again = _substituted(left, _ADDRESS, _digit_points(left), 3, counts)
    final = [first if second is None else second for first, second in zip(made, again, strict=True)]
    return Mapped(final, {"removed_urls": counts})


def _domain_points(texts: Texts) -> tuple[NDArray[numpy.int64], set[str]]:
    """Places of points with a top-level domain behind them, and the domains that were found."""
    words = texts.words("word")
    before = numpy.maximum(words.starts - 1, 0)
    pointed = words.where(texts.codes[before] == ord("."))
    pointed = pointed.where(texts.bounds[pointed.document] < pointed.starts)
    known = pointed.where(matching.among_few(pointed, _domain_hashes()))
    return known.starts - 1, set(known.strings())


@cache
def _domain_hashes() -> NDArray[numpy.uint64]:
    return matching.hashes_of_words(tuple(sorted(top_level_domains())))


@cache
def _host_pattern(domains: tuple[str, ...]) -> re.Pattern[str]:
    """Hosts that end in one of ``domains``: those of a batch, since a list of all would be slow to search."""
    names = "|".join(domains)
    host = r"[-a-zA-Z0-9@:%._+~#=]{1,256}"
    return re.compile(rf"\s{{0,10}}(?:(?:https?|ftp)://)?{host}\.(?:{names})\b{_TAIL}")


def _digit_points(texts: Texts) -> NDArray[numpy.int64]:
    """Places of points between two digits."""
    codes = texts.codes
    points = numpy.flatnonzero(codes == ord("."))
    points = points[(points > 0) & (points < len(codes) - 1)]
    digits = (codes >= ord("0")) & (codes <= ord("9"))
    return points[digits[points - 1] & digits[points + 1]]


def _substituted(
    texts: Texts,
    pattern: re.Pattern[str],
    points: NDArray[numpy.int64],
    fewest: int,
    counts: NDArray[numpy.int64],
) -> list[str | None]:
    """The texts without what ``pattern`` matches, searched where ``fewest`` of ``points`` are in one run.

    A run of URL characters is searched with the white space before it, and with one character more on each
    side, which no match takes in and word boundaries are judged by. Matches are added to ``counts``.
    """
    made: list[str | None] = [None] * texts.count
    if not len(points):
        return made
    runs = texts.runs(texts.is_class("url"))
    held = numpy.searchsorted(points, runs.ends) - numpy.searchsorted(points, runs.starts)
    runs = runs.where(held >= fewest)
    pieces: dict[int, list[str]] = {}
    done: dict[int, int] = {}
    columns = (runs.document, runs.starts - texts.bounds[runs.document], runs.lengths)
    for document, start, length in zip(*(column.tolist() for column in columns), strict=True):
        text = texts.texts[document]
        left = start
        while left > 0 and start - left < _MOST_SPACES and text[left - 1].isspace():
            left -= 1
        right = start + length
        begin, end = max(left - 1, 0), min(right + 1, len(text))
        shorter, found = pattern.subn("", text[begin:end])
        if found:
            counts[document] += found
            head = text[done.get(document, 0) : left]
            pieces.setdefault(document, []).extend(
                (head, shorter[left - begin : len(shorter) - (end - right)])
            )
            done[document] = right
    for document, parts in pieces.items():
        made[document] = "".join(parts) + texts.texts[document][done[document] :]
    return made


class NewlineSettings(Parameters):
    """How many line ends may follow each other."""

    maximum: int = 2
    """Most line feeds in a row."""


@mapper(
    "dclm.squeeze_newlines",
    settings=NewlineSettings,
    signals={"removed_newlines": "line feeds that were taken out"},
    source=_SOURCE,
)
def squeeze_newlines(texts: Texts, settings: NewlineSettings) -> Mapped:
    """Longer runs of line feeds become two."""
    most = "\n" * settings.maximum
    pattern = re.compile(f"\n{{{settings.maximum + 1},}}")
    made = [pattern.sub(most, text) if most + "\n" in text else None for text in texts.texts]
    removed = [0 if new is None else len(old) - len(new) for old, new in zip(texts.texts, made, strict=True)]
    return Mapped(made, {"removed_newlines": removed})
