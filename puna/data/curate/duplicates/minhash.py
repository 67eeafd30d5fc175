"""MinHash signatures of many documents at a time, and the keys of their bands.

A signature has one number per permutation: the smallest value that a member of the document's set takes
under it. The permutations are x -> a x + b modulo 2**32 with a odd (Dietzfelbinger's multiply-shift family,
of which the order of the high bits decides), over 32 bits of the members' 64-bit hashes. Equal members of two
documents agree in every permutation; two documents agree in one row with a probability that is their Jaccard
similarity. A permutation costs a multiplication, an addition and a minimum per member; nothing else is linear
in members times permutations.

What datasketch and those after it compute, (a x + b) modulo 2**61 - 1 in 64 bits that overflow, is another
family of the same kind: signatures differ, clusters agree up to the chance of both.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy
from numpy.typing import NDArray

from puna.core.seeds import numpy_generator

NO_KEY = numpy.uint64(0)
"""The key of a document without members: it shares a band with nobody."""
_MEMBERS_AT_ONCE = 1 << 15  # Two arrays of so many uint32 stay in a core's second cache.


def permutations(count: int, seed: int) -> tuple[NDArray[numpy.uint32], NDArray[numpy.uint32]]:
    """Factors [count], all odd, and summands [count] of the permutations that ``seed`` draws."""
    generator = numpy_generator(seed, "minhash")
    factors, summands = generator.integers(0, 1 << 32, size=(2, count), dtype=numpy.uint32)
    return factors | numpy.uint32(1), summands


def signatures(
    hashes: NDArray[numpy.uint64], bounds: NDArray[numpy.int64], count: int, seed: int
) -> NDArray[numpy.uint32]:
    """[count, documents] the signatures of documents whose members are ``hashes[bounds[d]:bounds[d + 1]]``.

    A document without members has the largest number in every row.
    """
    documents = len(bounds) - 1
    result = numpy.full((count, documents), numpy.iinfo(numpy.uint32).max, dtype=numpy.uint32)
    filled = numpy.flatnonzero(numpy.diff(bounds))
    if not len(filled):
        return result
    factors, summands = permutations(count, seed)
    members = (hashes >> numpy.uint64(32)).astype(numpy.uint32)
    smallest = numpy.empty((count, len(filled)), dtype=numpy.uint32)
    starts = bounds[filled]
    for first, last in _pieces(starts, len(hashes)):
        end = starts[last] if last < len(starts) else len(hashes)
        piece = members[starts[first] : end]
        places = starts[first:last] - starts[first]
        values = numpy.empty_like(piece)
        for row in range(count):
            numpy.multiply(piece, factors[row], out=values)
            numpy.add(values, summands[row], out=values)
            numpy.minimum.reduceat(values, places, out=smallest[row, first:last])
    if len(filled) == documents:
        return smallest
    result[:, filled] = smallest
    return result


def _pieces(starts: NDArray[numpy.int64], end: int) -> Iterator[tuple[int, int]]:
    """Ranges of documents of about ``_MEMBERS_AT_ONCE`` members, at least one document each."""
    first = 0
    while first < len(starts):
        last = int(numpy.searchsorted(starts, starts[first] + _MEMBERS_AT_ONCE))
        yield first, max(last, first + 1)
        first = max(last, first + 1)


def band_keys(
    signature: NDArray[numpy.uint32], filled: NDArray[numpy.bool_], bands: int, rows: int
) -> NDArray[numpy.uint64]:
    """[bands, documents] a 64-bit key of each band's rows; ``NO_KEY`` where a document has no members.

    The key is a sum of the rows with random odd factors, mixed: two different bands share one with a
    probability near 2**-60.
    """
    factors = numpy_generator(0, "bands").integers(0, 1 << 63, size=(bands, rows), dtype=numpy.uint64)
    factors = (factors << numpy.uint64(1)) | numpy.uint64(1)
    keys = numpy.zeros((bands, signature.shape[1]), dtype=numpy.uint64)
    for band in range(bands):
        for row in range(rows):
            keys[band] += (signature[band * rows + row].astype(numpy.uint64) + factors[band, 0]) * factors[
                band, row
            ]
    keys ^= keys >> numpy.uint64(32)
    keys *= numpy.uint64(0xD6E8FEB86659FD93)
    keys ^= keys >> numpy.uint64(32)
    keys[keys == NO_KEY] = 1
    keys[:, ~filled] = NO_KEY
    return keys


def similarity(signature: NDArray[numpy.uint32], left: int, right: int) -> float:
    """The Jaccard similarity that two documents' signatures estimate: the share of equal rows."""
    return float(numpy.mean(signature[:, left] == signature[:, right]))
