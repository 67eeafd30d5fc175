"""Runs of characters of a batch (words, lines, n-grams), with hashes and what is counted over them.

A segment's hash comes from prefix sums: code points are mapped to 64 random bits, weighted with powers of
an odd base modulo 2**64 and summed once over the batch; the difference of two sums, times the inverse
power of the first place, depends on the characters alone. That is O(characters) for any number of
segments, and the same in every process. Two different short segments share a hash with a probability
near 2**-60; whoever wants to can construct long ones that do (Thue and Morse's sequence does for every
base), so a hash says that texts are the same only where nobody gains from a collision.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy
from numpy.typing import NDArray

if TYPE_CHECKING:
    from puna.data.curate.texts import Texts

_BASE = 0x9E3779B97F4A7C15 | 5  # Odd, and 5 modulo 8: its powers repeat only after 2**62.
_MEMBERS_BASE = 0xC2B2AE3D27D4EB4D  # 5 modulo 8 too: another base for n-grams of hashes.
_LOW_BITS = 14
_TWO_64 = 1 << 64


class Segments:
    """Segments in order: ``starts`` and ``ends`` [n] are places in ``texts.codes``.

    ``document`` [n] is worked out from the starts where it is not given, which needs segments that are
    not empty. ``texts`` is the batch they lie in, which may be a view of the one they were asked of.
    """

    def __init__(
        self,
        texts: Texts,
        starts: NDArray[numpy.int64],
        ends: NDArray[numpy.int64],
        document: NDArray[numpy.int64] | None = None,
        hashes: NDArray[numpy.uint64] | None = None,
    ) -> None:
        self.texts = texts
        self.starts = starts
        self.ends = ends
        self.count = len(starts)
        self._document = document
        if hashes is not None:
            self.hashes = hashes

    @cached_property
    def document(self) -> NDArray[numpy.int64]:
        """[n] the document that each lies in."""
        if self._document is not None:
            return self._document
        return numpy.repeat(numpy.arange(self.texts.count), self.counts)

    @cached_property
    def bounds(self) -> NDArray[numpy.int64]:
        """[documents + 1]: the segments of document d are those from ``bounds[d]`` to ``bounds[d + 1]``."""
        if self._document is not None:
            return numpy.searchsorted(self._document, numpy.arange(self.texts.count + 1))
        return numpy.searchsorted(self.starts, self.texts.bounds)

    @cached_property
    def counts(self) -> NDArray[numpy.int64]:
        """[documents] how many segments each has."""
        return numpy.diff(self.bounds)

    @cached_property
    def lengths(self) -> NDArray[numpy.int64]:
        """[n] characters."""
        return self.ends - self.starts

    @cached_property
    def hashes(self) -> NDArray[numpy.uint64]:
        """[n] hashes of their characters; segments with the same characters have the same hash."""
        sums = self.texts.shared("hash sums", lambda texts: _sums(texts.codes, _BASE, _code_table()))
        return _mix(_difference(sums, self.starts, self.ends, _BASE) + self.lengths.astype(numpy.uint64))

    def total(self, values: NDArray[Any]) -> NDArray[Any]:
        """[documents] sums of ``values`` [n]; 0 for a document without segments."""
        return by_document(values, self.bounds)

    def mean(self, values: NDArray[Any]) -> NDArray[numpy.float64]:
        """[documents] means of ``values`` [n]; nan for a document without segments."""
        return ratio(self.total(values), self.counts)

    def largest(self, values: NDArray[Any], nothing: float = 0) -> NDArray[Any]:
        """[documents] the largest of ``values`` [n]; ``nothing`` for a document without segments."""
        result = numpy.full(self.texts.count, nothing, dtype=numpy.result_type(values.dtype, type(nothing)))
        filled = self.counts > 0
        if filled.any():
            result[filled] = numpy.maximum.reduceat(values, self.bounds[:-1][filled])
        return result

    def count_in(self, mask: NDArray[numpy.bool_]) -> NDArray[numpy.int64]:
        """[n] how many characters of each segment are marked in ``mask`` [characters]."""
        sums = numpy.zeros(len(mask) + 1, dtype=numpy.int64)
        numpy.cumsum(mask, out=sums[1:])
        return sums[self.ends] - sums[self.starts]

    @cached_property
    def last(self) -> NDArray[numpy.uint32]:
        """[n] code point of the last character; 0 for an empty segment."""
        return self._code_at(self.ends - 1)

    @cached_property
    def first(self) -> NDArray[numpy.uint32]:
        """[n] code point of the first character; 0 for an empty segment."""
        return self._code_at(self.starts)

    def _code_at(self, places: NDArray[numpy.int64]) -> NDArray[numpy.uint32]:
        codes = numpy.zeros(self.count, dtype=numpy.uint32)
        filled = self.lengths > 0
        codes[filled] = self.texts.codes[places[filled]]
        return codes

    def where(self, mask: NDArray[numpy.bool_]) -> Segments:
        """The segments where ``mask`` [n] holds, of the same documents."""
        hashes = self.__dict__.get("hashes")
        kept = None if hashes is None else hashes[mask]
        return Segments(self.texts, self.starts[mask], self.ends[mask], self.document[mask], kept)

    def stripped(self, character_class: str = "white_space") -> Segments:
        """The same segments without characters of a class at their ends, as ``str.strip`` does."""
        texts = self.texts
        if character_class == "white_space":
            solid = texts.words("white_space")
        else:
            key = ("runs outside", character_class)
            solid = texts.shared(key, lambda batch: batch.runs(~batch.is_class(character_class)))
        if not solid.count:
            return Segments(texts, self.starts, self.starts, self.document)
        # The first run that ends behind a segment's start, and the last that starts before its end.
        first = numpy.searchsorted(solid.ends, self.starts, side="right")
        last = numpy.searchsorted(solid.starts, self.ends) - 1
        filled = first <= last
        starts = numpy.maximum(self.starts, solid.starts[numpy.minimum(first, solid.count - 1)])
        ends = numpy.minimum(self.ends, solid.ends[numpy.maximum(last, 0)])
        starts = numpy.where(filled, starts, self.starts)
        ends = numpy.where(filled, ends, self.starts)
        return Segments(texts, starts, ends, self.document)

    def ngrams(self, n: int) -> Segments:
        """``n`` neighbours of one document each, from the first's start to the last's end.

        Their hashes are made of the members': what stands between members does not count.
        """
        if n < 1:
            raise ValueError("an n-gram has at least one member")
        if n == 1:
            return self
        within = self.document[n - 1 :] == self.document[: max(self.count - n + 1, 0)]
        first = numpy.flatnonzero(within)
        last = first + (n - 1)
        hashes = _mix(_difference(self._member_sums, first, last + 1, _MEMBERS_BASE) + numpy.uint64(n))
        return Segments(self.texts, self.starts[first], self.ends[last], self.document[first], hashes)

    @cached_property
    def _member_sums(self) -> NDArray[numpy.uint64]:
        return _sums(self.hashes, _MEMBERS_BASE)

    @cached_property
    def _groups(self) -> tuple[NDArray[numpy.int64], NDArray[numpy.int64]]:
        """Places sorted so that equal segments of a document are neighbours, and where each group starts."""
        keys = _mix(self.hashes + self.document.astype(numpy.uint64) * numpy.uint64(_BASE))
        order = numpy.argsort(keys)
        keys = keys[order]
        differs = numpy.empty(self.count, dtype=bool)
        differs[:1] = True
        numpy.not_equal(keys[1:], keys[:-1], out=differs[1:])
        return order, numpy.flatnonzero(differs)

    def duplicated(self) -> NDArray[numpy.bool_]:
        """[n] whether an equal one (same document, same hash) came before."""
        order, starts = self._groups
        result = numpy.ones(self.count, dtype=bool)
        if self.count:
            result[numpy.minimum.reduceat(order, starts)] = False
        return result

    def counts_of(self) -> NDArray[numpy.int64]:
        """[n] how often each occurs in its document."""
        order, starts = self._groups
        sizes = numpy.diff(starts, append=self.count)
        result = numpy.empty(self.count, dtype=numpy.int64)
        result[order] = numpy.repeat(sizes, sizes)
        return result

    def among(self, hashes: NDArray[numpy.uint64]) -> NDArray[numpy.bool_]:
        """[n] whether each one's hash is among ``hashes``, such as those of a list of words."""
        return numpy.isin(self.hashes, hashes)

    def strings(self) -> list[str]:
        """The segments as Python strings: slow, for what cannot be counted over arrays."""
        joined = self.texts.joined
        return [
            joined[start:end] for start, end in zip(self.starts.tolist(), self.ends.tolist(), strict=True)
        ]


def by_document(values: NDArray[Any], bounds: NDArray[numpy.int64]) -> NDArray[Any]:
    """Sums of ``values`` over consecutive ranges of ``bounds`` [ranges + 1]; an empty range sums to 0.

    Truth values and integers are summed as int64, others in their own type.
    """
    if values.dtype == bool:
        return _count_by_document(values, bounds)
    kind = numpy.int64 if values.dtype.kind == "i" else values.dtype
    result = numpy.zeros(len(bounds) - 1, dtype=kind)
    filled = bounds[1:] > bounds[:-1]
    if filled.any():
        result[filled] = numpy.add.reduceat(values, bounds[:-1][filled], dtype=kind)
    return result


def _count_by_document(mask: NDArray[numpy.bool_], bounds: NDArray[numpy.int64]) -> NDArray[numpy.int64]:
    """How often ``mask`` holds in each range: numpy counts truth values fastest of all things."""
    ranges = len(bounds) - 1
    if len(mask) < 64 * ranges:
        return numpy.diff(numpy.searchsorted(numpy.flatnonzero(mask), bounds))
    places = bounds.tolist()
    counts = (numpy.count_nonzero(mask[a:b]) for a, b in pairwise(places))
    return numpy.fromiter(counts, numpy.int64, ranges)


def ratio(part: Sequence[float] | NDArray[Any], whole: NDArray[Any]) -> NDArray[numpy.float64]:
    """``part / whole`` as float64; nan where ``whole`` is 0."""
    whole_ = numpy.asarray(whole, dtype=numpy.float64)
    result = numpy.full(whole_.shape, numpy.nan)
    numpy.divide(numpy.asarray(part, dtype=numpy.float64), whole_, out=result, where=whole_ != 0)
    return result


def _mix(values: NDArray[numpy.uint64]) -> NDArray[numpy.uint64]:
    """The finaliser of splitmix64: a one-to-one map after which every bit depends on every bit."""
    mixed = values ^ (values >> numpy.uint64(30))
    mixed *= numpy.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> numpy.uint64(27)
    mixed *= numpy.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> numpy.uint64(31)
    return mixed


@cache
def _code_table() -> NDArray[numpy.uint64]:
    """64 bits for every code point."""
    return _mix(numpy.arange(1, 0x110001, dtype=numpy.uint64) * numpy.uint64(_BASE))


@cache
def _low_powers(base: int) -> NDArray[numpy.uint64]:
    """[2**14] powers of ``base`` modulo 2**64, from the power 0 on."""
    return _geometric(base, 1 << _LOW_BITS)


@cache
def _high_powers(base: int, count: int) -> NDArray[numpy.uint64]:
    """[count] powers of ``base ** 2**14``."""
    return _geometric(pow(base, 1 << _LOW_BITS, _TWO_64), count)


def _geometric(base: int, count: int) -> NDArray[numpy.uint64]:
    factors = numpy.full(count, base, dtype=numpy.uint64)
    factors[:1] = 1
    return numpy.multiply.accumulate(factors)


def _rounded(length: int) -> int:
    """How many high powers cover ``length`` places: a power of two, so that few tables are kept."""
    return 1 << max(length >> _LOW_BITS, 1).bit_length()


def _sums(
    values: NDArray[Any], base: int, table: NDArray[numpy.uint64] | None = None
) -> NDArray[numpy.uint64]:
    """[n + 1] prefix sums of ``values[i] * base**i`` modulo 2**64, beginning with 0.

    With a ``table`` the values are looked up in it. The work goes block by block, so that all but the
    sums stays in the processor's cache.
    """
    length = len(values)
    low, high = _low_powers(base), _high_powers(base, _rounded(length))
    sums = numpy.zeros(length + 1, dtype=numpy.uint64)
    for block, start in enumerate(range(0, length, len(low))):
        part = values[start : start + len(low)]
        weighted = low[: len(part)] * (part if table is None else table[part])
        weighted *= high[block]
        weighted[:1] += sums[start : start + 1]
        numpy.cumsum(weighted, out=sums[start + 1 : start + 1 + len(part)])
    return sums


def _difference(
    sums: NDArray[numpy.uint64], starts: NDArray[numpy.int64], ends: NDArray[numpy.int64], base: int
) -> NDArray[numpy.uint64]:
    """[n] sums of ``values[start + i] * base**i`` over each segment, modulo 2**64."""
    inverse = pow(base, -1, _TWO_64)
    low, high = _low_powers(inverse), _high_powers(inverse, _rounded(len(sums)))
    difference = sums[ends] - sums[starts]
    difference *= low[starts & ((1 << _LOW_BITS) - 1)]
    difference *= high[starts >> _LOW_BITS]
    return difference
