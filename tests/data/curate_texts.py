"""Documents for the tests of curation's operators, and how a test applies one."""

from __future__ import annotations

import math

import pytest
from hypothesis import strategies as st

from puna.data.curate.operator import Spans, apply_map, apply_score, get_operator
from puna.data.curate.texts import Texts

_WORDS = (
    "the The and of to a bc Be x1 7 42 # ... … • ● * don't 3.14 foo_bar Ünïcode 中文 ǅ STOP { } ! ? . ” , ß"
)
_LINES = ("3 likes", "1.2K Views", "items in cart", "Read more...", "Sign-in", "lorem ipsum", "javascript")
_SPACES = ("\n", "\n", "\n\n", "\n\n\n", " ", " ", " ", "\t", "\r\n", "\u2028", "\xa0", "\x00")
_OTHERS = (
    "http://a.com/x?y=1",
    "foo.org",
    "192.168.0.1",
    "[12]",
    "[edit]",
    "- ",
    ". . .",
    "\u0301",
    "\u200d",
)
_PIECES = st.sampled_from(
    [*_WORDS.split(), *_LINES, *_SPACES, *_OTHERS, '"', "Privacy Policy", "see e.g. this.", "word " * 5]
)
DOCUMENTS = st.lists(st.lists(_PIECES, max_size=40).map("".join), max_size=5)
"""Batches of documents made of pieces that some rule looks for."""


def scored(name: str, documents: list[str], **settings: object) -> dict[str, object]:
    """A score's signals as lists: numbers per document (None: null), or (document, start, end, value)."""
    return _listed(apply_score(*_operator("score", name, documents, settings)))


def mapped(name: str, documents: list[str], **settings: object) -> tuple[list[str], dict[str, object]]:
    """The texts that a mapper makes, and its signals as lists."""
    made = apply_map(*_operator("map", name, documents, settings))
    texts = [old if new is None else new for old, new in zip(documents, made.texts, strict=True)]
    return texts, _listed(made.signals)


def _operator(kind, name, documents, settings):
    operator = get_operator(kind, name)
    return operator, Texts(documents), operator.settings(**settings)


def _listed(signals) -> dict[str, object]:
    return {
        name: _spans(values) if isinstance(values, Spans) else [_number(value) for value in values]
        for name, values in signals.items()
    }


def _spans(spans: Spans) -> list[tuple[int, int, int, float | None]]:
    columns = (spans.document, spans.starts, spans.ends, spans.values)
    return [
        (int(document), int(start), int(end), _number(value))
        for document, start, end, value in zip(*columns, strict=True)
    ]


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def share(part: float, whole: float) -> float | None:
    """A ratio as operators give it: None where there is nothing to share."""
    return part / whole if whole else None


def close(found: dict[str, object], by_hand: dict[str, object]) -> None:
    """Check an operator's signals: the same names, null in the same places, and numbers up to rounding."""
    assert set(found) == set(by_hand)
    for name, expected in by_hand.items():
        assert _comparable(found[name]) == pytest.approx(_comparable(expected), 1e-12, 1e-12, nan_ok=True), (
            name
        )


def _comparable(values) -> list[float]:
    flat = [number for value in values for number in (value if isinstance(value, tuple) else (value,))]
    return [math.nan if number is None else float(number) for number in flat]


def columns(documents, by_hand) -> dict[str, list[float | None]]:
    """What ``by_hand`` says of each document, by the signals' names."""
    rows = [by_hand(document) for document in documents]
    return {name: [row[name] for row in rows] for name in rows[0]}
