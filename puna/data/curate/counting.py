"""How often n-grams occur in their documents, counted by sorting their hashes document by document.

Scores of repetition need no place of a repeated n-gram, only how many there are and how often each
occurs: a document's hashes are sorted where they lie, which is fast as they fit into the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy
from numpy.typing import NDArray

from puna.data.curate.segments import Segments, by_document
from puna.data.curate.texts import Texts

_BASE = 0xD1342543DE82EF95
_BLOCK = 1 << 15
_TWO_64 = 1 << 64


@dataclass(frozen=True)
class Repetition:
    """The n-grams of each document of a batch.

    ``total``, ``distinct`` and ``repeated`` [count] are the n-grams, the different ones, and those of the
    different ones that occur more than once. ``document`` and ``sizes`` [groups] are of each of the latter
    the document and how often it occurs, sorted by document.
    """

    total: NDArray[numpy.int64]
    distinct: NDArray[numpy.int64]
    repeated: NDArray[numpy.int64]
    document: NDArray[numpy.int64]
    sizes: NDArray[numpy.int64]

    def in_repeated(self) -> NDArray[numpy.int64]:
        """[count] occurrences of n-grams that occur more than once."""
        return by_document(self.sizes, self._bounds())

    def in_top(self, k: NDArray[numpy.int64]) -> NDArray[numpy.int64]:
        """[count] occurrences of the ``k`` [count] most frequent n-grams of each document."""
        order = numpy.lexsort((-self.sizes, self.document))
        bounds = self._bounds()
        rank = numpy.arange(len(order)) - bounds[self.document]
        sizes = numpy.where(rank < k[self.document], self.sizes[order], 0)
        # Beyond those that are repeated there are only n-grams that occur once.
        once = numpy.maximum(numpy.minimum(k, self.distinct) - self.repeated, 0)
        return by_document(sizes, bounds) + once

    def _bounds(self) -> NDArray[numpy.int64]:
        return numpy.concatenate([[0], numpy.cumsum(self.repeated)])


def character_ngrams(texts: Texts, n: int) -> Repetition:
    """The runs of ``n`` characters of each document; kept, as families define their scores differently."""
    return texts.shared(("character n-grams", n), lambda batch: _character_ngrams(batch, n))


def word_ngrams(words: Segments, n: int) -> Repetition:
    """The runs of ``n`` words of each document."""
    ngrams = words.ngrams(n)
    return _counted(ngrams.hashes.copy(), ngrams.bounds)


def _character_ngrams(texts: Texts, n: int) -> Repetition:
    counts = numpy.maximum(texts.lengths - (n - 1), 0)
    bounds = numpy.concatenate([[0], numpy.cumsum(counts)])
    hashes = numpy.empty(int(bounds[-1]), dtype=numpy.uint64)
    windows = _windows(texts.codes, n)
    origins = texts.bounds.tolist()
    places = bounds.tolist()
    for document in range(texts.count):
        first, last = places[document], places[document + 1]
        hashes[first:last] = windows[origins[document] : origins[document] + last - first]
    return _counted(hashes, bounds)


def _windows(codes: NDArray[numpy.uint32], n: int) -> NDArray[numpy.uint64]:
    """[characters - n + 1] hashes of the ``n`` characters from each place on.

    Code points are mapped to 64 random bits, and windows are made of two halves of the size before, so
    that their cost grows with log n; block by block, to stay in the cache.
    """
    table = _table()
    length = max(len(codes) - n + 1, 0)
    result = numpy.empty(length, dtype=numpy.uint64)
    # From the highest bit of n down: double, then add one character where the bit is set.
    bits = [bit == "1" for bit in bin(n)[3:]]
    for start in range(0, length, _BLOCK):
        stop = min(start + _BLOCK, length)
        single = table[codes[start : stop + n - 1]]
        hashed, size = single, 1
        for odd in bits:
            factor = numpy.uint64(pow(_BASE, size, _TWO_64))
            hashed = hashed[:-size] * factor + hashed[size:]
            size *= 2
            if odd:
                hashed = hashed[:-1] * numpy.uint64(_BASE) + single[size : size + len(hashed) - 1]
                size += 1
        result[start:stop] = hashed
    return result


_codes: list[NDArray[numpy.uint64]] = []


def _table() -> NDArray[numpy.uint64]:
    """64 random bits for every code point, the same in every process."""
    if not _codes:
        generator = numpy.random.Generator(numpy.random.PCG64(0x70756E61))
        _codes.append(generator.integers(0, _TWO_64, size=0x110000, dtype=numpy.uint64, endpoint=False))
    return _codes[0]


def _counted(hashes: NDArray[numpy.uint64], bounds: NDArray[numpy.int64]) -> Repetition:
    """Counts of ``hashes`` [n], which are sorted in place within ``bounds`` [count + 1]."""
    places = bounds.tolist()
    for first, last in pairwise(places):
        hashes[first:last].sort()
    begins = numpy.empty(len(hashes), dtype=bool)
    numpy.not_equal(hashes[1:], hashes[:-1], out=begins[1:])
    total = numpy.diff(bounds)
    begins[bounds[:-1][total > 0]] = True
    starts = numpy.flatnonzero(begins)
    sizes = numpy.diff(starts, append=len(hashes))
    several = sizes > 1
    starts, sizes = starts[several], sizes[several]
    document = numpy.searchsorted(bounds, starts, side="right") - 1
    repeated = numpy.bincount(document, minlength=len(total))
    return Repetition(total, by_document(begins, bounds), repeated, document, sizes)
