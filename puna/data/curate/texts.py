"""A batch of documents, with everything derived of them made once and shared by all operators.

Texts are joined and seen as one array of code points; words, lines and n-grams are runs of it
(:class:`~puna.data.curate.segments.Segments`). Some 4 to 16 MB of text make a good batch: a character
takes 4 bytes here, and 8 more for each array of prefix sums that an operator asks for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar, cast

import numpy
from numpy.typing import NDArray

from puna.core.errors import unknown_name
from puna.data.curate.characters import table_of
from puna.data.curate.segments import Segments, by_document

T = TypeVar("T")
MakeSegments = Callable[["Texts"], Segments]
_WORDS: dict[str, MakeSegments] = {}
_LINES: dict[str, MakeSegments] = {}


class Texts:
    """Documents of a batch, in order; ``languages``, ``urls`` and ``metas`` are "" where unknown.

    ``metas`` are JSON texts that a reader kept beside the text, such as the boxes of scanned pages.
    """

    def __init__(
        self,
        texts: Sequence[str],
        languages: Sequence[str] | None = None,
        urls: Sequence[str] | None = None,
        metas: Sequence[str] | None = None,
    ) -> None:
        self.texts = list(texts)
        self.count = len(self.texts)
        self.languages = _column(languages, self.count)
        self.urls = _column(urls, self.count)
        self.metas = _column(metas, self.count)
        self.lengths: NDArray[numpy.int64] = numpy.fromiter(map(len, self.texts), numpy.int64, self.count)
        """[count] characters of each document."""
        self.bounds: NDArray[numpy.int64] = numpy.concatenate([[0], numpy.cumsum(self.lengths)])
        """[count + 1]: document d is ``codes[bounds[d]:bounds[d + 1]]``."""
        self._kept: dict[Hashable, Any] = {}

    def shared(self, key: Hashable, make: Callable[[Texts], T]) -> T:
        """What ``make`` gives of this batch, made when ``key`` is first asked for and kept."""
        if key not in self._kept:
            self._kept[key] = make(self)
        return cast(T, self._kept[key])

    def forget(self) -> None:
        """Let go of everything derived of this batch.

        What is derived refers to its batch and so keeps it, until Python's collector comes by: too late
        where one batch follows another.
        """
        kept, self._kept = self._kept, {}
        for value in kept.values():
            if isinstance(value, Texts):
                value.forget()

    @property
    def joined(self) -> str:
        """All texts one after another, with nothing between them."""
        return self.shared("joined", lambda texts: "".join(texts.texts))

    @property
    def codes(self) -> NDArray[numpy.uint32]:
        """[characters] code points of :attr:`joined`."""
        return self.shared("codes", _codes)

    @property
    def document(self) -> NDArray[numpy.int64]:
        """[characters] the document that each character belongs to."""
        return self.shared("document", lambda texts: numpy.repeat(numpy.arange(texts.count), texts.lengths))

    def is_class(self, name: str) -> NDArray[numpy.bool_]:
        """[characters] whether each belongs to a class of :mod:`~puna.data.curate.characters`."""
        return self.shared(("class", name), lambda texts: table_of(name).take(texts.codes))

    def total(self, values: NDArray[Any]) -> NDArray[Any]:
        """[count] sums over each document of ``values`` [characters]; of truth values: how many hold."""
        return by_document(values, self.bounds)

    def count_of(self, name: str) -> NDArray[numpy.int64]:
        """[count] how many characters of each document belong to the class ``name``."""
        return self.shared(("count", name), lambda texts: texts.total(texts.is_class(name)))

    def words(self, kind: str = "white_space") -> Segments:
        """The words of a registered kind, in order."""
        if kind not in _WORDS:
            raise unknown_name("kind of words", kind, _WORDS)
        return self.shared(("words", kind), _WORDS[kind])

    def lines(self, kind: str = "newline") -> Segments:
        """The lines of a registered kind, in order."""
        if kind not in _LINES:
            raise unknown_name("kind of lines", kind, _LINES)
        return self.shared(("lines", kind), _LINES[kind])

    def whole(self) -> Segments:
        """Every document as one segment, empty ones too."""
        return self.shared(
            "whole",
            lambda texts: Segments(texts, texts.bounds[:-1], texts.bounds[1:], numpy.arange(texts.count)),
        )

    def view(self, name: str, make: Callable[[str], str]) -> Texts:
        """The same documents with each text passed through ``make``, kept under ``name``."""
        return self.shared(("view", name), lambda texts: texts.replaced([make(text) for text in texts.texts]))

    @property
    def lower(self) -> Texts:
        """The same documents in lower case, as ``str.lower`` makes it."""
        return self.view("lower", str.lower)

    def replaced(self, texts: Sequence[str | None]) -> Texts:
        """A new batch of the same documents with other texts; None leaves a text as it is."""
        changed = [old if new is None else new for old, new in zip(self.texts, texts, strict=True)]
        return Texts(changed, self.languages, self.urls, self.metas)

    def take(self, places: Sequence[int] | NDArray[Any]) -> Texts:
        """A new batch of the documents at ``places`` (or where a mask over all of them holds)."""
        chosen = numpy.asarray(places)
        wanted = (numpy.flatnonzero(chosen) if chosen.dtype == bool else chosen.astype(numpy.int64)).tolist()
        columns = (self.texts, self.languages, self.urls, self.metas)
        return Texts(*([column[place] for place in wanted] for column in columns))

    def found(self, pattern: re.Pattern[str]) -> Segments:
        """All matches of a pattern, each document searched alone: for patterns with few matches."""
        places: list[tuple[int, int, int]] = []
        for place, (text, start) in enumerate(zip(self.texts, self.bounds.tolist(), strict=False)):
            for match in pattern.finditer(text):
                places.append((start + match.start(), start + match.end(), place))
        starts, ends, document = numpy.array(places, dtype=numpy.int64).reshape(-1, 3).T
        return Segments(self, starts, ends, document)

    def runs(self, kinds: NDArray[Any]) -> Segments:
        """Longest runs of equal ``kinds`` [characters] within a document; runs of 0 or False are left out."""
        codes = len(kinds)
        if not codes:
            nothing = numpy.zeros(0, dtype=numpy.int64)
            return Segments(self, nothing, nothing, nothing)
        if kinds.dtype == bool:
            ends = numpy.flatnonzero(self._last_of_runs(kinds))
            return Segments(self, numpy.flatnonzero(self.first_of_runs(kinds)), ends + 1)
        begins = numpy.empty(codes, dtype=bool)
        begins[0] = True
        numpy.not_equal(kinds[1:], kinds[:-1], out=begins[1:])
        begins[self.bounds[:-1][self.lengths > 0]] = True
        starts = numpy.flatnonzero(begins)
        ends = numpy.append(starts[1:], codes)
        counted = kinds[starts] != 0
        starts, ends = starts[counted], ends[counted]
        return Segments(self, starts, ends)

    def first_of_runs(self, mask: NDArray[numpy.bool_]) -> NDArray[numpy.bool_]:
        """[characters] the first character of each run in which ``mask`` holds, within a document."""
        first = mask.copy()
        numpy.greater(mask[1:], mask[:-1], out=first[1:])
        places = self.bounds[:-1][self.lengths > 0]
        first[places] = mask[places]
        return first

    def _last_of_runs(self, mask: NDArray[numpy.bool_]) -> NDArray[numpy.bool_]:
        """[characters] the last character of each such run."""
        last = mask.copy()
        numpy.greater(mask[:-1], mask[1:], out=last[:-1])
        places = self.bounds[1:][self.lengths > 0] - 1
        last[places] = mask[places]
        return last


def words(kind: str) -> Callable[[MakeSegments], MakeSegments]:
    """Register a function of a batch as what finds words of this ``kind``."""
    return _registered(_WORDS, kind)


def lines(kind: str) -> Callable[[MakeSegments], MakeSegments]:
    """Register a function of a batch as what finds lines of this ``kind``."""
    return _registered(_LINES, kind)


def _registered(registry: dict[str, MakeSegments], kind: str) -> Callable[[MakeSegments], MakeSegments]:
    def register(make: MakeSegments) -> MakeSegments:
        if kind in registry:
            raise ValueError(f"{kind!r} is registered twice")
        registry[kind] = make
        return make

    return register


def _column(values: Sequence[str] | None, count: int) -> list[str]:
    column = [""] * count if values is None else list(values)
    if len(column) != count:
        raise ValueError(f"{len(column)} values for {count} documents")
    return column


def _codes(texts: Texts) -> NDArray[numpy.uint32]:
    encoded = texts.joined.encode("utf-32-le", "surrogatepass")
    return numpy.frombuffer(encoded, dtype="<u4")


def hashes_of(strings: Sequence[str]) -> NDArray[numpy.uint64]:
    """[n] the hashes that segments of just these characters have: to look words up in a batch."""
    return Texts(strings).whole().hashes


@words("white_space")
def _white_space(texts: Texts) -> Segments:
    """What ``str.split()`` gives."""
    return texts.runs(~texts.is_class("white_space"))


@words("word_punct")
def _word_punct(texts: Texts) -> Segments:
    r"""What ``\w+|[^\w\s]+`` finds: runs of word characters, and runs of what is neither these nor space."""
    kinds = texts.is_class("word").astype(numpy.uint8)
    kinds[~texts.is_class("white_space") & (kinds == 0)] = 2
    return texts.runs(kinds)


@words("word")
def _word(texts: Texts) -> Segments:
    r"""What ``\w+`` finds."""
    return texts.runs(texts.is_class("word"))


@lines("newline")
def _newline(texts: Texts) -> Segments:
    r"""What ``split("\n")`` gives: empty ones are kept, and an empty document has one."""
    breaks = numpy.flatnonzero(texts.is_class("newline"))
    return between(texts, breaks, breaks + 1)


@lines("filled")
def _filled(texts: Texts) -> Segments:
    """Lines without white space around them, those with nothing else left out."""
    stripped = texts.lines("newline").stripped()
    return stripped.where(stripped.lengths > 0)


@lines("paragraph")
def _paragraph(texts: Texts) -> Segments:
    r"""What ``re.split(r"\n{2,}")`` gives: empty ones at the ends are kept."""
    breaks = texts.runs(texts.is_class("newline"))
    breaks = breaks.where(breaks.lengths >= 2)
    return between(texts, breaks.starts, breaks.ends)


def between(texts: Texts, starts: NDArray[numpy.int64], ends: NDArray[numpy.int64]) -> Segments:
    """What lies between separators: one segment more in a document than it has separators."""
    places = numpy.searchsorted(texts.bounds, starts, side="right") - 1
    per_document = numpy.bincount(places, minlength=texts.count)
    document = numpy.repeat(numpy.arange(texts.count), per_document + 1)
    # Separator i of document d stands before segment i + d + 1 of the batch and behind segment i + d.
    first = numpy.cumsum(per_document + 1) - (per_document + 1)
    begins = numpy.empty(len(document), dtype=numpy.int64)
    finishes = numpy.empty(len(document), dtype=numpy.int64)
    begins[first] = texts.bounds[:-1]
    finishes[first + per_document] = texts.bounds[1:]
    index = numpy.arange(len(starts)) + places
    finishes[index] = starts
    begins[index + 1] = ends
    return Segments(texts, begins, finishes, document)
