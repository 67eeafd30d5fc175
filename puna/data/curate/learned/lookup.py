"""Tables from 64-bit hashes to numbers, asked a whole array at a time."""

from __future__ import annotations

import numpy
from numpy.typing import NDArray


class HashTable:
    """Which place each of ``keys`` [n], all different and well mixed, stands at.

    Open addressing at half load: a question costs one or two looks. Memory: 8 bytes for each slot, of which
    there are two to four per key, and 8 for each key.
    """

    def __init__(self, keys: NDArray[numpy.uint64]) -> None:
        self.keys = keys
        bits = max(4, int(2 * len(keys)).bit_length())
        self._shift = numpy.uint64(64 - bits)
        self._mask = (1 << bits) - 1
        self._slots = numpy.full(1 << bits, -1, dtype=numpy.int64)
        rest = numpy.arange(len(keys))
        slots = self._first(keys)
        while len(rest):
            free = self._slots[slots] < 0
            self._slots[slots[free]] = rest[free]
            lost = self._slots[slots] != rest
            rest, slots = rest[lost], (slots[lost] + 1) & self._mask

    def _first(self, keys: NDArray[numpy.uint64]) -> NDArray[numpy.int64]:
        return (keys >> self._shift).astype(numpy.int64)

    def places(self, hashes: NDArray[numpy.uint64]) -> NDArray[numpy.int64]:
        """[n] the place of each hash among the keys; -1 for one that is none of them."""
        result = self._slots[self._first(hashes)]
        if not len(self.keys):
            return result
        rest = numpy.flatnonzero((result >= 0) & (self.keys[result] != hashes))
        slots = self._first(hashes[rest])
        while len(rest):
            slots = (slots + 1) & self._mask
            found = self._slots[slots]
            result[rest] = found
            again = (found >= 0) & (self.keys[found] != hashes[rest])
            rest, slots = rest[again], slots[again]
        return result
