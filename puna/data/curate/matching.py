"""Looking for given strings in a batch: at the ends of segments, as whole words, anywhere in a text."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from functools import cache

import numpy
from numpy.typing import NDArray

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
