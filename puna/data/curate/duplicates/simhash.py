"""SimHash: 64 bits of each document, near in Hamming distance where documents are alike, and near pairs.

A bit of a document's hash is 1 where more than half of its members' hashes have a 1 there (Charikar 2002;
Manku 2007 for the search). Members are counted as often as they occur.

The search is exact. Two hashes that differ in at most d of 64 bits, cut into B blocks, agree in at least
B - d blocks: for every choice of B - d blocks the hashes are sorted by these, and neighbours with the same
ones are compared. That is what simhash-py does, which Data-Juicer calls: 15 sortings for 6 blocks and d = 4,
36 for 9 and 7.
"""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy
from numpy.typing import NDArray

_BITS = 64
_LANES = numpy.uint64(0x0101010101010101)
_MEMBERS_IN_A_LANE = 255


def simhashes(hashes: NDArray[numpy.uint64], bounds: NDArray[numpy.int64]) -> NDArray[numpy.uint64]:
    """[documents] the SimHash of documents whose members are ``hashes[bounds[d]:bounds[d + 1]]``.

    A document without members has the hash 0.
    """
    sizes = numpy.diff(bounds)
    pieces = -(-sizes // _MEMBERS_IN_A_LANE)  # [documents] ceiling
    ones = numpy.zeros((len(sizes), _BITS), dtype=numpy.int64)
    filled = sizes > 0
    if not filled.any():
        return numpy.zeros(len(sizes), dtype=numpy.uint64)
    document = numpy.repeat(numpy.arange(len(sizes)), pieces)
    inside = numpy.arange(len(document)) - numpy.repeat(numpy.cumsum(pieces) - pieces, pieces)
    starts = bounds[:-1][document] + inside * _MEMBERS_IN_A_LANE
    piece_of_document = numpy.cumsum(pieces)[filled] - pieces[filled]
    # Eight bits, a byte apart from each other, are summed at once: bytes hold up to 255 members.
    for shift in range(8):
        spread = (hashes >> numpy.uint64(shift)) & _LANES
        sums = numpy.add.reduceat(spread, starts).view(numpy.uint8).reshape(-1, 8)  # [pieces, lanes]
        ones[filled, shift::8] = numpy.add.reduceat(sums, piece_of_document, axis=0, dtype=numpy.int64)
    majority = 2 * ones > sizes[:, None]  # [documents, bits]
    return numpy.packbits(majority, axis=1, bitorder="little").view("<u8").reshape(-1)


def blocks_of(count: int) -> list[numpy.uint64]:
    """The masks of ``count`` blocks of nearly the same width that the 64 bits are cut into."""
    edges = [_BITS * place // count for place in range(count + 1)]
    return [numpy.uint64(((1 << high) - 1) ^ ((1 << low) - 1)) for low, high in pairwise(edges)]


def near_pairs(
    hashes: NDArray[numpy.uint64], blocks: int, distance: int
) -> tuple[NDArray[numpy.int64], NDArray[numpy.int64]]:
    """Places of all pairs of different ``hashes`` [n] that differ in at most ``distance`` bits.

    Pairs may come more than once. Time is that of (blocks over distance) sortings and of the pairs that
    share a choice of blocks, of which there are many where blocks are short for the number of hashes.
    """
    masks = blocks_of(blocks)
    left: list[NDArray[numpy.int64]] = []
    right: list[NDArray[numpy.int64]] = []
    for chosen in combinations(masks, blocks - distance):
        keys = hashes & numpy.bitwise_or.reduce(numpy.array(chosen))
        order = numpy.argsort(keys)
        keys, ordered = keys[order], hashes[order]
        candidates = numpy.arange(len(keys) - 1)
        step = 1
        while len(candidates):
            candidates = candidates[candidates + step < len(keys)]
            candidates = candidates[keys[candidates] == keys[candidates + step]]
            different = ordered[candidates] ^ ordered[candidates + step]
            near = candidates[numpy.bitwise_count(different) <= distance]
            left.append(order[near])
            right.append(order[near + step])
            step += 1
    nothing = numpy.zeros(0, dtype=numpy.int64)
    return numpy.concatenate([nothing, *left]), numpy.concatenate([nothing, *right])
