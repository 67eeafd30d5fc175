"""Fields that a reader kept of a row beside its text."""

from __future__ import annotations

import json
import math
from typing import Any

from puna.data.curate.texts import Texts


def field_values(texts: Texts, name: str) -> list[tuple[bool, Any]]:
    """[count] whether each document has the field, and its value; dots lead into fields inside fields.

    ``language`` and ``url`` are the document's own, unless it has a field of that name.
    """
    rows: list[Any] = texts.shared("metas as values", _read)
    own = {"language": texts.languages, "url": texts.urls}.get(name)
    found: list[tuple[bool, Any]] = []
    for place, row in enumerate(rows):
        present, value = _inside(row, name.split("."))
        if not present and own is not None and own[place]:
            present, value = True, own[place]
        found.append((present, value))
    return found


def number_of(value: Any) -> float:
    """A number, or the number that a string spells; nan for anything else, and for infinity."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def _read(texts: Texts) -> list[Any]:
    return [_value(text) for text in texts.metas]


def _value(text: str) -> Any:
    if not text:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _inside(row: Any, path: list[str]) -> tuple[bool, Any]:
    for key in path:
        if not isinstance(row, dict) or key not in row:
            return False, None
        row = row[key]
    return True, row
