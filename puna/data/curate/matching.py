"""Looking for given strings in a batch: at the ends of segments, as whole words, anywhere in a text."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from puna.core.errors import PunaError
from puna.data.curate.segments import Segments
from puna.data.curate.texts import Texts, hashes_of

_TABLE_BITS = 16


def occurrences(texts: Texts, *strings: str) -> NDArray[numpy.int64]:
    """[count] how often any of ``strings`` occurs, each counted as ``str.count`` does."""

    def make(batch: Texts) -> NDArray[numpy.int64]:
        counts = (sum(map(text.count, strings)) for text in batch.texts)
        return numpy.fromiter(counts, numpy.int64, batch.count)

    return texts.shared(("occurrences", strings), make)


def begins_with(segments: Segments, strings: Iterable[str]) -> NDArray[numpy.bool_]:
    """[n] whether a segment begins with one of ``strings``, as ``str.startswith`` does."""
    result = numpy.zeros(segments.count, dtype=bool)
    for string in strings:
        result |= _stands_at(segments, string, segments.starts)
    return result


def ends_with(segments: Segments, strings: Iterable[str]) -> NDArray[numpy.bool_]:
    """[n] whether a segment ends with one of ``strings``, as ``str.endswith`` does."""
    result = numpy.zeros(segments.count, dtype=bool)
    for string in strings:
        result |= _stands_at(segments, string, segments.ends - len(string))
    return result


def _stands_at(segments: Segments, string: str, places: NDArray[numpy.int64]) -> NDArray[numpy.bool_]:
    """[n] whether ``string`` stands at ``places`` in segments that are long enough to hold it."""
    left = numpy.flatnonzero(segments.lengths >= len(string))
    for offset, character in enumerate(string):
        left = left[segments.texts.codes[places[left] + offset] == ord(character)]
    result = numpy.zeros(segments.count, dtype=bool)
    result[left] = True
    return result


def any_in(segments: Segments, mask: NDArray[numpy.bool_]) -> NDArray[numpy.bool_]:
    """[n] whether a segment (none may be empty) holds a character that is marked in ``mask`` [characters]."""
    result: NDArray[numpy.bool_] = mask[segments.starts]
    # Most words show it in their first character; only the others are looked through.
    open_ones = numpy.flatnonzero(~result)
    if len(open_ones):
        pairs = numpy.stack([segments.starts[open_ones], segments.ends[open_ones]], axis=1).reshape(-1)
        inside = pairs[:-1] if pairs[-1] == len(mask) else pairs
        result[open_ones] = numpy.logical_or.reduceat(mask, inside)[::2]
    return result


@cache
def hashes_in_any_case(words: tuple[str, ...]) -> NDArray[numpy.uint64]:
    """Hashes of all strings that ``str.lower`` turns into one of a few short ASCII ``words``."""
    written = {
        "".join(letters)
        for word in words
        for letters in itertools.product(*({letter, letter.upper()} for letter in word))
    }
    return hashes_of(sorted(written))


@cache
def hashes_of_words(words: tuple[str, ...]) -> NDArray[numpy.uint64]:
    """Hashes of ``words`` as they are written."""
    return hashes_of(words)


def among_few(segments: Segments, hashes: NDArray[numpy.uint64]) -> NDArray[numpy.bool_]:
    """[n] whether each segment's hash is among some tens or thousands of ``hashes``."""
    shift = numpy.uint64(64 - _TABLE_BITS)
    table = numpy.zeros(1 << _TABLE_BITS, dtype=bool)
    table[hashes >> shift] = True
    result: NDArray[numpy.bool_] = table[segments.hashes >> shift]
    likely = numpy.flatnonzero(result)
    result[likely] = numpy.isin(segments.hashes[likely], hashes)
    return result


def kinds_of(segments: Segments, strings: Sequence[str]) -> NDArray[numpy.int64]:
    """[documents] how many different ones of ``strings`` are among a document's segments."""
    hashes = hashes_of_words(tuple(strings))
    order = numpy.argsort(hashes)
    found = numpy.flatnonzero(among_few(segments, hashes))
    which = numpy.searchsorted(hashes[order], segments.hashes[found])
    seen = numpy.zeros((segments.texts.count, len(strings)), dtype=bool)
    seen[segments.document[found], which] = True
    result: NDArray[numpy.int64] = seen.sum(axis=1, dtype=numpy.int64)
    return result


def lowered(texts: Texts) -> str:
    """The joined texts in lower case, character by character, so that places stay what they are."""

    def make(batch: Texts) -> str:
        # One letter alone has a longer lower case (i with a dot); no ASCII string is found in that either.
        return batch.joined.replace("\u0130", "\ufffd").lower()

    return texts.shared("lowered", make)


def places_of(texts: Texts, phrase: str) -> NDArray[numpy.int64]:
    """Places where an ASCII ``phrase`` in lower case stands, in any case, overlapping ones too.

    Some may reach over the end of a document: segments that are asked about them tell.
    """
    joined = lowered(texts)
    places: list[int] = []
    found = joined.find(phrase)
    while found >= 0:
        places.append(found)
        found = joined.find(phrase, found + 1)
    return numpy.array(places, dtype=numpy.int64)


def holds_any(segments: Segments, phrases: Iterable[str]) -> NDArray[numpy.bool_]:
    """[n] whether one of ``phrases`` (ASCII, in lower case) stands in a segment, in any case.

    The segments are in order and do not overlap.
    """
    result = numpy.zeros(segments.count, dtype=bool)
    if not segments.count:
        return result
    for phrase in phrases:
        places = places_of(segments.texts, phrase)
        inside = numpy.searchsorted(segments.starts, places, side="right") - 1
        ends = segments.ends[numpy.maximum(inside, 0)]
        whole = (inside >= 0) & (places + len(phrase) <= ends)
        result[inside[whole]] = True
    return result


def lines_of_file(file: Path, what: str) -> tuple[str, ...]:
    """The lines of a list that a user gives, without white space around them, empty ones left out."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PunaError(f"no list of {what}", where=file, found=str(error), expected="a text file") from None
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def either(strings: Iterable[str]) -> str:
    """A regular expression of any of ``strings``, of several that begin alike the longest that matches.

    They are put together as a tree of letters: thousands cost little more than one at each place.
    """
    tree: dict[str, Any] = {}
    for string in strings:
        node = tree
        for letter in string:
            node = node.setdefault(letter, {})
        node[""] = None
    return _branches(tree)


def _branches(tree: dict[str, Any]) -> str:
    """A tree of letters as an expression; "" marks that a string ends there."""
    branches = [re.escape(letter) + _branches(below) for letter, below in tree.items() if letter]
    if not branches:
        return ""
    return f"(?:{'|'.join(branches)})" + ("?" if "" in tree else "")
