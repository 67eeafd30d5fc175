"""Words by the word boundaries of Unicode (UAX #29), and fastText's words: what DCLM counts.

The rules look at a character and its neighbours only, so a whole batch is split at once: pairs of
neighbouring classes are looked up in a table, and just those pairs that depend on a third character (the
apostrophe in "don't", the point in "3.14") are looked at again.

Simplified: the two characters of some line ends are left apart, since no word that is wanted here is white
space.
"""

from __future__ import annotations

from functools import cache

import numpy
from numpy.typing import NDArray

from puna.data.curate.characters import CODE_POINTS, Table, character_class, table_from, table_of
from puna.data.curate.segments import Segments
from puna.data.curate.texts import Texts, words

# Classes of characters: Word_Break properties, some put together because no rule tells them apart here.
_CLASSES = {
    "newline": ("CR", "LF", "Newline"),
    "ignored": ("Extend", "Format", "ZWJ"),
    "letter": ("ALetter",),
    "hebrew": ("Hebrew_Letter",),
    "number": ("Numeric",),
    "katakana": ("Katakana",),
    "connector": ("ExtendNumLet",),
    "single_quote": ("Single_Quote",),
    "double_quote": ("Double_Quote",),
    "middle": ("MidNumLet",),
    "middle_letter": ("MidLetter",),
    "middle_number": ("MidNum",),
    "regional": ("Regional_Indicator",),
    "space": ("WSegSpace",),
}
_CODE = {name: code for code, name in enumerate(_CLASSES, start=1)}
_KINDS = len(_CLASSES) + 1
_LETTERS = ("letter", "hebrew")
_BETWEEN_LETTERS = ("middle_letter", "middle", "single_quote")
_BETWEEN_NUMBERS = ("middle_number", "middle", "single_quote")
_APART, _TOGETHER, _DEPENDS = range(3)


@cache
def _class_table() -> NDArray[numpy.uint8]:
    """[code points] the class of each, 0 for all others."""
    import regex

    table = numpy.zeros(CODE_POINTS, dtype=numpy.uint8)
    every = "".join(map(chr, range(CODE_POINTS)))
    for name, properties in _CLASSES.items():
        pattern = "[" + "".join(rf"\p{{WB={which}}}" for which in properties) + "]+"
        for match in regex.finditer(pattern, every):
            table[match.start() : match.end()] = _CODE[name]
    return table


@character_class("pictographic")
def _pictographic() -> Table:
    """Unicode's Extended_Pictographic."""
    import regex

    table = numpy.zeros(CODE_POINTS, dtype=bool)
    for match in regex.finditer(r"\p{Extended_Pictographic}+", "".join(map(chr, range(CODE_POINTS)))):
        table[match.start() : match.end()] = True
    return table


@cache
def _pair_table() -> NDArray[numpy.uint8]:
    """[kinds * kinds] whether two neighbours are one word: no, yes, or it depends on a third character."""
    table = numpy.full((_KINDS, _KINDS), _APART, dtype=numpy.uint8)

    def put(verdict: int, left: tuple[str, ...], right: tuple[str, ...]) -> None:
        for one in left:
            for other in right:
                table[_CODE[one], _CODE[other]] = verdict

    solid = (*_LETTERS, "number")
    put(_TOGETHER, solid, solid)
    put(_TOGETHER, ("katakana",), ("katakana",))
    put(_TOGETHER, (*solid, "katakana", "connector"), ("connector",))
    put(_TOGETHER, ("connector",), (*solid, "katakana"))
    middles = tuple(dict.fromkeys((*_BETWEEN_LETTERS, *_BETWEEN_NUMBERS, "double_quote")))
    put(_DEPENDS, solid, middles)
    put(_DEPENDS, middles, solid)
    put(_TOGETHER, ("hebrew",), ("single_quote",))
    put(_TOGETHER, ("space",), ("space",))
    return table.reshape(-1)


def _runs(texts: Texts) -> Segments:
    """What lies between the boundaries of UAX #29: every character is in one run."""
    codes = texts.codes
    kinds = _class_table()[codes]
    places = _bases(kinds, texts)
    kinds = kinds[places] if len(places) < len(codes) else kinds
    first = numpy.zeros(len(kinds), dtype=bool)
    first[numpy.searchsorted(places, texts.bounds[:-1][texts.lengths > 0])] = True
    together = numpy.zeros(len(kinds), dtype=bool)
    if len(kinds) > 1:
        together[1:] = _joined(kinds, first)
        # Spaces are one run unless something between them was passed over.
        together[1:] &= (kinds[1:] != _CODE["space"]) | (numpy.diff(places) == 1)
        _join_pictures(together, places, texts)
        _join_flags(together, kinds, first)
        together &= ~first
    starts = places[~together]
    ends = numpy.append(starts[1:], len(codes)) if len(starts) else starts
    return Segments(texts, starts, ends)


@words("unicode")
def _unicode(texts: Texts) -> Segments:
    """Words by the boundaries of UAX #29, those that begin with a letter or a digit."""
    runs = texts.shared("unicode runs", _runs)
    return _where(runs, table_of("alphanumeric")[texts.codes[runs.starts]])


@words("unicode_solid")
def _unicode_solid(texts: Texts) -> Segments:
    """Words by the boundaries of UAX #29, those that are not white space: punctuation counts, too."""
    runs = texts.shared("unicode runs", _runs)
    # A run that begins with white space may end with what extends a character.
    space = table_of("white_space")
    return _where(runs, ~(space[texts.codes[runs.starts]] & space[texts.codes[runs.ends - 1]]))


def _where(runs: Segments, wanted: NDArray[numpy.bool_]) -> Segments:
    return Segments(runs.texts, runs.starts[wanted], runs.ends[wanted])


def _bases(kinds: NDArray[numpy.uint8], texts: Texts) -> NDArray[numpy.int64]:
    """Places of the characters that rules look at: an ignored one belongs to what stands before it."""
    ignored = kinds == _CODE["ignored"]
    if not ignored.any():
        return numpy.arange(len(kinds))
    after_line = numpy.zeros(len(kinds), dtype=bool)
    after_line[1:] = kinds[:-1] == _CODE["newline"]
    after_line[texts.bounds[:-1][texts.lengths > 0]] = True
    return numpy.flatnonzero(~ignored | after_line)


def _joined(kinds: NDArray[numpy.uint8], first: NDArray[numpy.bool_]) -> NDArray[numpy.bool_]:
    """[n - 1] whether each character (but the first) belongs to the word of the one before.

    ``first`` [n] marks the first characters of documents.
    """
    pairs = kinds[:-1].astype(numpy.uint16)
    pairs *= _KINDS
    pairs += kinds[1:]
    verdicts = _pair_table()[pairs]
    together: NDArray[numpy.bool_] = verdicts == _TOGETHER
    open_ones = numpy.flatnonzero(verdicts == _DEPENDS)
    together[open_ones] = _in_threes(kinds, first, open_ones)
    return together


def _in_threes(
    kinds: NDArray[numpy.uint8], first: NDArray[numpy.bool_], pairs: NDArray[numpy.int64]
) -> NDArray[numpy.bool_]:
    """[pairs] whether the pair (i, i + 1) lies within letter-middle-letter or number-middle-number."""
    middles = numpy.isin(kinds[pairs], [_CODE[name] for name in (*_LETTERS, "number")])
    middle = numpy.where(middles, pairs + 1, pairs)  # the place of the quote or point
    following = numpy.minimum(middle + 1, len(kinds) - 1)
    inside = ~first[middle] & (following > middle) & ~first[following]
    before = numpy.where(inside, kinds[middle - 1], 0)
    after = numpy.where(inside, kinds[following], 0)
    between = kinds[middle]

    def of(values: NDArray[numpy.uint8], names: tuple[str, ...]) -> NDArray[numpy.bool_]:
        return numpy.isin(values, [_CODE[name] for name in names])

    letters = of(before, _LETTERS) & of(after, _LETTERS) & of(between, _BETWEEN_LETTERS)
    numbers = of(before, ("number",)) & of(after, ("number",)) & of(between, _BETWEEN_NUMBERS)
    hebrew = of(before, ("hebrew",)) & of(after, ("hebrew",)) & of(between, ("double_quote",))
    result: NDArray[numpy.bool_] = letters | numbers | hebrew
    return result


def _join_pictures(together: NDArray[numpy.bool_], places: NDArray[numpy.int64], texts: Texts) -> None:
    """A picture behind a zero-width joiner belongs to what stands before."""
    joiners = numpy.flatnonzero(texts.codes[:-1] == 0x200D)
    if not len(joiners):
        return
    pictures = joiners[texts.is_class("pictographic")[joiners + 1]] + 1
    together[numpy.searchsorted(places, pictures)] = True


def _join_flags(
    together: NDArray[numpy.bool_], kinds: NDArray[numpy.uint8], first: NDArray[numpy.bool_]
) -> None:
    """Regional indicators make flags two by two, counted from the first of a run."""
    places = numpy.flatnonzero(kinds == _CODE["regional"])
    if not len(places):
        return
    begins = numpy.concatenate([[True], (numpy.diff(places) != 1) | first[places[1:]]])
    numbers = numpy.arange(len(places))
    numbers -= numpy.maximum.accumulate(numpy.where(begins, numbers, 0))
    together[places[numbers % 2 == 1]] = True


@character_class("fasttext_space")
def _fasttext_space() -> Table:
    """What fastText splits words at: ASCII's white space and NUL."""
    return table_from(" \n\r\t\v\f\0")


@words("fasttext")
def _fasttext(texts: Texts) -> Segments:
    """The words that fastText reads, without the mark it makes of a line's end."""
    return texts.runs(~texts.is_class("fasttext_space"))
