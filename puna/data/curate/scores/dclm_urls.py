"""DCLM's bans by URL, with lists that a user gives (arXiv:2406.11794, after RefinedWeb, arXiv:2306.01116).

Four lists: domains that must be the host exactly; *strict* strings that ban wherever they stand in the URL
once "-" and "." are taken out of it; *hard* words that ban as whole words; and *soft* words of which a page
needs two different ones. The papers' lists hold thousands of entries and are not part of puna: without a
list its signal is null, which a gate may keep. Entries and URLs are compared in lower case.

The released pipeline takes "www" out of the host, which leaves its point; here "www." goes.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import numpy
from numpy.typing import NDArray

from puna.core.stage import Parameters
from puna.data.curate import matching
from puna.data.curate.operator import Signals, score
from puna.data.curate.texts import Texts

_LEFT_OUT = str.maketrans("", "", "-.")


class UrlSettings(Parameters):
    """The lists; each is given in place or as a file with one entry a line, or both."""

    domains: tuple[str, ...] = ()
    """Hosts that are banned."""
    domains_file: Path | None = None
    """File of more of them."""
    strict: tuple[str, ...] = ()
    """Strings that ban a URL wherever they stand in it."""
    strict_file: Path | None = None
    """File of more of them."""
    hard: tuple[str, ...] = ()
    """Words that ban a URL."""
    hard_file: Path | None = None
    """File of more of them."""
    soft: tuple[str, ...] = ()
    """Words of which two different ones ban a URL."""
    soft_file: Path | None = None
    """File of more of them."""

    def entries(self, name: str) -> tuple[str, ...]:
        """All entries of a list, in lower case."""
        given: tuple[str, ...] = getattr(self, name)
        file: Path | None = getattr(self, f"{name}_file")
        more = () if file is None else matching.lines_of_file(file, f"{name} entries")
        return tuple(sorted({entry.lower() for entry in (*given, *more)}))


@score(
    "dclm.urls",
    settings=UrlSettings,
    signals={
        "banned_domain": "1 if the host is on the list, else 0; null without a list or URL",
        "strict": "different strict strings in the URL; null without a list or URL",
        "hard": "different hard words in the URL; null without a list or URL",
        "soft": "different soft words in the URL; null without a list or URL",
    },
    source="arXiv:2406.11794",
)
def urls(texts: Texts, settings: UrlSettings) -> Signals:
    """Entries of four lists that the page's URL holds."""
    lower = [url.lower() for url in texts.urls]
    hosts = [_host(url) for url in lower]
    domains = frozenset(settings.entries("domains"))
    banned = [float(host in domains) for host in hosts] if domains else None
    bare = [url.translate(_LEFT_OUT) for url in lower]
    found = {
        "banned_domain": banned,
        "strict": _different(bare, settings.entries("strict"), whole=False),
        "hard": _different(lower, settings.entries("hard"), whole=True),
        "soft": _different(lower, settings.entries("soft"), whole=True),
    }
    known = numpy.array([url != "" for url in texts.urls], dtype=bool)
    return {name: _known_only(values, known) for name, values in found.items()}


def _host(url: str) -> str:
    try:
        return urlsplit(url).netloc.removeprefix("www.")
    except ValueError:  # such as a bracket that is not closed
        return ""


def _known_only(values: list[float] | None, known: NDArray[numpy.bool_]) -> NDArray[numpy.float64]:
    """The values where there is a list and a URL, null elsewhere."""
    if values is None:
        return numpy.full(len(known), numpy.nan)
    return numpy.where(known, numpy.array(values, dtype=numpy.float64), numpy.nan)


def _different(urls: list[str], entries: tuple[str, ...], *, whole: bool) -> list[float] | None:
    """How many different entries each URL holds, none overlapping another; None without entries."""
    if not entries:
        return None
    pattern = _pattern(entries, whole)
    # URLs hold no line feeds: one search goes over them all.
    joined = "\n".join(url.replace("\n", " ") for url in urls)
    seen: list[set[str]] = [set() for _ in urls]
    starts = numpy.cumsum([0] + [len(url) + 1 for url in urls])
    matches = list(pattern.finditer(joined))
    which = numpy.searchsorted(starts, [match.start() for match in matches], side="right") - 1
    for match, place in zip(matches, which.tolist(), strict=True):
        seen[place].add(match.group())
    return [float(len(found)) for found in seen]


@cache
def _pattern(entries: tuple[str, ...], whole: bool) -> re.Pattern[str]:
    any_entry = matching.either(entries)
    return re.compile(rf"\b(?:{any_entry})\b" if whole else any_entry)
