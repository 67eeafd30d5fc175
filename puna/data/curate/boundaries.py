"""Words by the word boundaries of Unicode (UAX #29), and fastText's words: what DCLM counts.

The rules look at a character and its neighbours only, so a whole batch is split at once: pairs of
neighbouring classes are looked up in a table, and just those pairs that depend on a third character (the
apostrophe in "don't", the point in "3.14") are looked at again.

Simplified: pairs of regional indicators (flags) and runs of spaces are left apart, since a word that is
wanted here begins with a letter or a digit.
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
    return table.reshape(-1)


@words("unicode")
def _unicode(texts: Texts) -> Segments:
    """Words by the boundaries of UAX #29, those that begin with a letter or a digit."""
    codes = texts.codes
    kinds = _class_table()[codes]
    places = _bases(kinds, texts)
    kinds = kinds[places] if len(places) < len(codes) else kinds
    first = numpy.zeros(len(kinds), dtype=bool)
    first[numpy.searchsorted(places, texts.bounds[:-1][texts.lengths > 0])] = True
    together = numpy.zeros(len(kinds), dtype=bool)
    if len(kinds) > 1:
        together[1:] = _joined(kinds, first)
        _join_pictures(together, places, texts)
        together &= ~first
    starts = places[~together]
    ends = numpy.append(starts[1:], len(codes)) if len(starts) else starts
    wanted = table_of("alphanumeric")[codes[starts]]
    return Segments(texts, starts[wanted], ends[wanted])


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


@character_class("fasttext_space")
def _fasttext_space() -> Table:
    """What fastText splits words at: ASCII's white space and NUL."""
    return table_from(" \n\r\t\v\f\0")


@words("fasttext")
def _fasttext(texts: Texts) -> Segments:
    """The words that fastText reads, without the mark it makes of a line's end."""
    return texts.runs(~texts.is_class("fasttext_space"))
