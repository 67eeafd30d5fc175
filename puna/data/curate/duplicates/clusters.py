"""Clusters of documents: connected components of a graph of equal keys, and the one survivor of each.

Documents are places 0, 1, 2 ... in the order of the shards. A cluster is named by its smallest place.
Clusters are transitive: who shares a key with someone in a cluster is in it.
"""

from __future__ import annotations

import numpy
from numpy.typing import NDArray

Places = NDArray[numpy.int64]


class Clusters:
    """A union-find over ``count`` documents whose unions are made a whole array at a time.

    Memory: 8 bytes for each document. An array of edges costs a few passes over itself; afterwards every
    document points at its cluster's smallest place.
    """

    def __init__(self, count: int) -> None:
        self.smallest: Places = numpy.arange(count, dtype=numpy.int64)  # [count]

    def join(self, left: Places, right: Places) -> None:
        """Put ``left[i]`` and ``right[i]`` into one cluster, for every i."""
        root = self.smallest
        while True:
            low, high = root[left], root[right]
            differ = low != high
            if not differ.any():
                return
            left, right = left[differ], right[differ]
            low, high = low[differ], high[differ]
            numpy.minimum.at(root, numpy.maximum(low, high), numpy.minimum(low, high))
            _flatten(root)

    def join_equal(self, keys: NDArray[numpy.uint64], places: Places) -> None:
        """Put documents with the same key into one cluster. ``keys`` and ``places`` are aligned."""
        self.join(*edges_of_equal(keys, places))

    def sizes(self) -> Places:
        """How many documents the cluster of each document holds. [count]"""
        return numpy.bincount(self.smallest, minlength=len(self.smallest))[self.smallest]


def _flatten(root: Places) -> None:
    """Let everybody point at the end of its chain, in place."""
    while True:
        further = root[root]
        if numpy.array_equal(further, root):
            return
        root[:] = further


def edges_of_equal(keys: NDArray[numpy.uint64], places: Places) -> tuple[Places, Places]:
    """Edges from every document to the smallest place of those with its key; none for a key of one alone.

    ``keys`` is [n] or, for keys wider than 64 bits, [n, words]; ``places`` [n].
    """
    if not len(keys):
        return places[:0], places[:0]
    order = numpy.argsort(keys) if keys.ndim == 1 else numpy.lexsort(keys.T)
    ordered = keys[order]
    differs = ordered[1:] != ordered[:-1]
    if differs.ndim == 2:
        differs = differs.any(axis=1)
    if differs.all():
        return places[:0], places[:0]
    starts = numpy.flatnonzero(numpy.concatenate([[True], differs]))
    ordered_places = places[order]
    sizes = numpy.diff(starts, append=len(order))
    heads = numpy.repeat(numpy.minimum.reduceat(ordered_places, starts), sizes)
    other = heads != ordered_places
    return ordered_places[other], heads[other]
