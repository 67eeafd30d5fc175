"""Rows of tables as text, without loss: ``[name: "value", other name: null]`` and back.

System S71 (Zhang and others 2023, arXiv:2308.16361) shows a model its rows in this shape. Values are
quoted as JSON strings are, so that quotes, line breaks and control characters survive; ``null`` without
quotes is a cell that is empty. A column's name stands bare where it is plain, else it is quoted too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from json.decoder import scanstring  # type: ignore[attr-defined]  # as documented as JSONDecoder is

from puna.core.errors import PunaError

Row = Mapping[str, "str | None"]
"""A row: cells as text by column, in the columns' order; None is null."""

_NAME = re.compile(r"\w(?:[\w .()/%+-]*[\w()%+])?")
_SEPARATOR = ", "


def render(row: Row) -> str:
    """The row as text; :func:`parse` gives it back, columns in the same order."""
    return "[" + _SEPARATOR.join(f"{_name(name)}: {cell(value)}" for name, value in row.items()) + "]"


def cell(value: str | None) -> str:
    """A single value as it stands in a rendered row."""
    return "null" if value is None else _quoted(value)


def parse(text: str) -> dict[str, str | None]:
    """The row that :func:`render` wrote; anything else is a :class:`PunaError` that names the place."""
    row: dict[str, str | None] = {}
    place = _expect(text, 0, "[")
    if text[place:] == "]":
        return row
    while True:
        name, place = _read_name(text, place)
        if name in row:
            raise _broken(text, place, "a column that has not come yet", found=repr(name))
        place = _expect(text, place, ": ")
        if text.startswith("null", place):
            row[name], place = None, place + 4
        else:
            row[name], place = _read_quoted(text, place)
        if text[place:] == "]":
            return row
        place = _expect(text, place, _SEPARATOR)


def broken(rows: Iterable[Row]) -> int:
    """How many rows do not come back as they were, columns in order; 0, or :func:`render` is wrong."""
    return sum(list(parse(render(row)).items()) != list(row.items()) for row in rows)


def _name(name: str) -> str:
    return name if _NAME.fullmatch(name) else _quoted(name)


def _quoted(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise PunaError(
            "a cell holds half a surrogate pair, which no text can hold",
            found=ascii(value),
            fix="read the table in the encoding it was written in",
        ) from None
    return json.dumps(value, ensure_ascii=False)


def _read_name(text: str, place: int) -> tuple[str, int]:
    if text.startswith('"', place):
        return _read_quoted(text, place)
    found = _NAME.match(text, place)
    if found is None:
        raise _broken(text, place, "a column's name")
    return found[0], found.end()


def _read_quoted(text: str, place: int) -> tuple[str, int]:
    place = _expect(text, place, '"')
    try:
        value, end = scanstring(text, place, True)
    except json.JSONDecodeError as error:
        raise _broken(text, error.pos, "a quoted value") from None
    return str(value), int(end)


def _expect(text: str, place: int, sign: str) -> int:
    if not text.startswith(sign, place):
        raise _broken(text, place, repr(sign))
    return place + len(sign)


def _broken(text: str, place: int, expected: str, found: str | None = None) -> PunaError:
    return PunaError(
        "not a rendered row",
        where=f"character {place}",
        found=found or repr(text[place : place + 30]),
        expected=expected,
    )
