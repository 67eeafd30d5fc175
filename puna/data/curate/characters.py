"""Classes of characters as tables over all code points, each built when it is first asked for."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable
from functools import cache

import numpy
from numpy.typing import NDArray

from puna.core.errors import unknown_name

CODE_POINTS = 0x110000
Table = NDArray[numpy.bool_]
_CLASSES: dict[str, Callable[[], Table]] = {}


def character_class(name: str) -> Callable[[Callable[[], Table]], Callable[[], Table]]:
    """Register a function that makes the table ``[CODE_POINTS]`` of the class ``name``."""

    def register(make: Callable[[], Table]) -> Callable[[], Table]:
        if name in _CLASSES:
            raise ValueError(f"two classes of characters are named {name!r}")
        _CLASSES[name] = make
        return make

    return register


@cache
def table_of(name: str) -> Table:
    """The table of a class: ``table[code]`` says whether the character belongs to it."""
    if name not in _CLASSES:
        raise unknown_name("class of characters", name, _CLASSES)
    made = _CLASSES[name]()
    made.flags.writeable = False
    return made


def table_from(characters: Iterable[str], *ranges: tuple[int, int]) -> Table:
    """A table of single ``characters`` and of ``ranges`` of code points, both ends included."""
    table = numpy.zeros(CODE_POINTS, dtype=bool)
    table[[ord(character) for character in characters]] = True
    for first, last in ranges:
        table[first : last + 1] = True
    return table


def _by_method(name: str) -> Callable[[], Table]:
    def make() -> Table:
        # numpy's methods of strings of one character are those of Python's str; NUL is the empty string
        # there and in none of these classes.
        every = numpy.arange(CODE_POINTS, dtype=numpy.uint32).view("<U1")
        return numpy.asarray(getattr(numpy.strings, name)(every), dtype=bool)

    return make


for _name, _method in {
    "alphabetic": "isalpha",
    "digit": "isdigit",
    "decimal": "isdecimal",
    "numeric": "isnumeric",
    "alphanumeric": "isalnum",
    "upper": "isupper",
    "lower": "islower",
    "white_space": "isspace",
}.items():
    character_class(_name)(_by_method(_method))


@character_class("newline")
def _newline() -> Table:
    return table_from("\n")


@character_class("punctuation")
def _punctuation() -> Table:
    """ASCII's punctuation, as in ``string.punctuation``."""
    return table_from(string.punctuation)


@character_class("word")
def _word() -> Table:
    r"""What ``\w`` of Python's ``re`` stands for."""
    return table_of("alphanumeric") | table_from("_")


@character_class("latin")
def _latin() -> Table:
    """ASCII's letters and those of the Latin blocks up to Latin Extended Additional."""
    blocks = table_from(
        "", (0x41, 0x5A), (0x61, 0x7A), (0xAA, 0xAA), (0xBA, 0xBA), (0xC0, 0x24F), (0x1E00, 0x1EFF)
    )
    return blocks & table_of("alphabetic")
