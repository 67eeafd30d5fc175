"""Repetition inside a document: copies of lines and paragraphs, and of runs of n words.

An n-gram can only occur twice where both (n - 1)-grams in it do. So the n-grams of a batch are looked at
level by level, each among the places that the level below has left: from 5-grams on these are few, and
sorting them is cheap. Before sorting, a table of counts by some bits of the hash throws out most of those
that occur once. The counts are those of all n-grams; what is skipped is what occurs once.

Two readings of "characters in duplicate n-grams" live here: :func:`covered` counts every copy (each word
once), :func:`jumped` those copies that come after the first, stepping over each copy it has counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from puna.data.curate.segments import Segments, by_document
from puna.data.curate.texts import Texts

_ODD = numpy.uint64(0xD6E8FEB86659FD93)
_MIX = numpy.uint64(0xBF58476D1CE4E5B9)
_SHIFT = numpy.uint64(32)


@dataclass(frozen=True)
class Repeated:
    """n-grams that occur more than once in their document.

    ``places`` [k] are their first words, in order; ``groups`` [k] is which of the different n-grams each
    one is (numbers from 0); ``sizes`` and ``first`` [groups] how often that one occurs in its document,
    and the first place at which it does.
    """

    n: int
    places: NDArray[numpy.int64]
    groups: NDArray[numpy.int64]
    sizes: NDArray[numpy.int64]
    first: NDArray[numpy.int64]


def repeated(words: Segments, kind: str, n: int) -> Repeated:
    """The n-grams of ``words`` that occur more than once; ``kind`` names the words in the batch's memory."""
    return words.texts.shared(("repeated", kind, n), lambda texts: _repeated(words, kind, n))


def _repeated(words: Segments, kind: str, n: int) -> Repeated:
    places, keys = _candidates(words, kind, n)
    order = numpy.argsort(keys)
    keys = keys[order]
    begins = numpy.empty(len(keys), dtype=bool)
    begins[:1] = True
    numpy.not_equal(keys[1:], keys[:-1], out=begins[1:])
    starts = numpy.flatnonzero(begins)
    sizes = numpy.diff(starts, append=len(keys))
    several = sizes > 1
    members = order[numpy.repeat(several, sizes)]
    groups = numpy.repeat(numpy.arange(int(several.sum())), sizes[several])
    if not len(members):
        nothing = numpy.zeros(0, dtype=numpy.int64)
        return Repeated(n, nothing, nothing, nothing, nothing)
    ends = numpy.cumsum(sizes[several])
    first = places[numpy.minimum.reduceat(members, ends - sizes[several])]
    # Back into the order of the text: candidates stand in it, so a table by candidate does it.
    group_at = numpy.full(len(places), -1, dtype=numpy.int64)
    group_at[members] = groups
    kept = numpy.flatnonzero(group_at >= 0)
    return Repeated(n, places[kept], group_at[kept], sizes[several], first)


def _candidates(words: Segments, kind: str, n: int) -> tuple[NDArray[numpy.int64], NDArray[numpy.uint64]]:
    """Places at which an n-gram may begin that occurs twice, and the n-grams' keys."""
    key = ("repeated candidates", kind, n)
    return words.texts.shared(key, lambda texts: _survivors(words, kind, n))


def _survivors(words: Segments, kind: str, n: int) -> tuple[NDArray[numpy.int64], NDArray[numpy.uint64]]:
    if n == 1:
        keys = words.hashes + words.document.astype(numpy.uint64) * _ODD
        places = numpy.arange(words.count)
    else:
        below, keys = _candidates(words, kind, n - 1)
        # A place goes on if the next one is left too and belongs to the same document.
        both = numpy.flatnonzero(below[1:] == below[:-1] + 1)
        places = below[both]
        last = places + (n - 1)
        # Two neighbours in the list may belong to different documents only where the n-gram would.
        within = words.document[last] == words.document[places]
        both, places, last = both[within], places[within], last[within]
        keys = (keys[both] ^ (keys[both] >> _SHIFT)) * _MIX + words.hashes[last]
    mixed = keys * _ODD
    bits = max(len(keys).bit_length() + 1, 1)
    buckets = (mixed >> numpy.uint64(64 - bits)).astype(numpy.int64)
    crowded = numpy.bincount(buckets, minlength=1 << bits)[buckets] > 1
    return places[crowded], keys[crowded]


def _letters_up_to(words: Segments, kind: str) -> NDArray[numpy.int64]:
    """[words + 1] characters of all words before each."""

    def make(texts: Texts) -> NDArray[numpy.int64]:
        return numpy.concatenate([[0], numpy.cumsum(words.lengths)])

    return words.texts.shared(("letters up to", kind), make)


def _letters(words: Segments, kind: str, places: NDArray[numpy.int64], n: int) -> NDArray[numpy.int64]:
    """Characters of the words of each n-gram that begins at ``places``."""
    sums = _letters_up_to(words, kind)
    return sums[places + n] - sums[places]


def longest_top(words: Segments, kind: str, n: int) -> NDArray[numpy.int64]:
    """[documents] characters in all copies of the most frequent n-gram, of several such the longest.

    0 where no n-gram occurs twice. Copies that overlap are counted in full.
    """
    found = repeated(words, kind, n)
    document = words.document[found.first]
    most = _largest(document, found.sizes, words.texts.count)
    top = numpy.flatnonzero(found.sizes == most[document])
    letters = _letters(words, kind, found.first[top], n)
    return most * _largest(document[top], letters, words.texts.count)


def first_top(words: Segments, kind: str, n: int, gap: int = 0) -> NDArray[numpy.int64]:
    """[documents] characters in all copies of the most frequent n-gram, of several such the first one.

    ``gap`` characters stand between two words. 0 where no n-gram occurs twice.
    """
    found = repeated(words, kind, n)
    count = words.texts.count
    document = words.document[found.first]
    most = _largest(document, found.sizes, count)
    top = numpy.flatnonzero(found.sizes == most[document])
    earliest = numpy.full(count, words.count, dtype=numpy.int64)
    numpy.minimum.at(earliest, document[top], found.first[top])
    result = numpy.zeros(count, dtype=numpy.int64)
    have = numpy.flatnonzero(earliest < words.count)
    letters = _letters(words, kind, earliest[have], n) + gap * (n - 1)
    result[have] = letters * most[have]
    return result


def covered(words: Segments, kind: str, n: int) -> NDArray[numpy.int64]:
    """[documents] characters of the words that lie in any copy of an n-gram that occurs more than once."""
    places = repeated(words, kind, n).places
    if not len(places):
        return numpy.zeros(words.texts.count, dtype=numpy.int64)
    # Copies that begin within n words of each other cover one stretch. Stretches never cross documents,
    # since n-grams do not: where they touch, the sums are taken apart by the document of each copy.
    fresh = numpy.minimum(numpy.diff(places, prepend=places[0] - n), n)
    document = words.document[places]
    fresh[1:][document[1:] != document[:-1]] = n
    sums = _letters_up_to(words, kind)
    letters = sums[places + n] - sums[places + n - fresh]
    return by_document(letters, numpy.searchsorted(document, numpy.arange(words.texts.count + 1)))


def jumped(words: Segments, kind: str, n: int) -> NDArray[numpy.int64]:
    """[documents] characters of n-grams that an equal one came before, reading from left to right.

    A copy is counted and stepped over whole; what begins inside it is neither counted nor remembered.
    """
    found = repeated(words, kind, n)
    places = found.places[_counted(found)]
    document = words.document[places]
    bounds = numpy.searchsorted(document, numpy.arange(words.texts.count + 1))
    return by_document(_letters(words, kind, places, n), bounds)


def _counted(found: Repeated) -> list[int]:
    """Which of ``found.places`` are counted by :func:`jumped`.

    Reading is sequential by definition, but only copies after the first are read one by one: a first copy
    is remembered unless it was stepped over.
    """
    places = found.places
    first = found.first[found.groups]
    later = numpy.flatnonzero(places != first)
    ends = places[later] + found.n
    firsts = numpy.searchsorted(places, first[later]).tolist()
    behind = numpy.searchsorted(places, ends).tolist()  # among all places,
    onward = numpy.searchsorted(places[later], ends).tolist()  # and among the later copies
    groups, numbers = found.groups[later].tolist(), later.tolist()
    passed, remembered = bytearray(len(places)), bytearray(len(found.sizes))
    counted: list[int] = []
    at = 0
    while at < len(numbers):
        if remembered[groups[at]] or not passed[firsts[at]]:
            number = numbers[at]
            counted.append(number)
            inside = behind[at] - number - 1
            passed[number + 1 : behind[at]] = b"\1" * inside
            at = onward[at]
        else:
            remembered[groups[at]] = 1
            at += 1
    return counted


def first_ngram(words: Segments, kind: str, n: int, gap: int = 0) -> NDArray[numpy.int64]:
    """[documents] characters of the first n-gram with ``gap`` between its words; 0 where there is none."""
    result = numpy.zeros(words.texts.count, dtype=numpy.int64)
    have = numpy.flatnonzero(words.counts >= n)
    result[have] = _letters(words, kind, words.bounds[have], n) + gap * (n - 1)
    return result


def _largest(
    document: NDArray[numpy.int64], values: NDArray[numpy.int64], count: int
) -> NDArray[numpy.int64]:
    """[count] the largest of ``values`` of each document, in any order; 0 where it has none."""
    result = numpy.zeros(count, dtype=numpy.int64)
    numpy.maximum.at(result, document, values)
    return result
