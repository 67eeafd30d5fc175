"""Operators: one small example of each kind, and what the registry refuses."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest

from puna.core.errors import PunaError
from puna.data.curate.operator import (
    BadDocument,
    Operator,
    Spans,
    all_operators,
    apply_map,
    apply_score,
    checked,
    get_operator,
    score,
)
from puna.data.curate.texts import Texts


def test_a_score_counts_without_deciding():
    operator = get_operator("score", "text.sizes")
    signals = apply_score(operator, Texts(["one two\n\n three", ""]), operator.settings())
    assert signals["characters"].tolist() == [15, 0]
    assert signals["words"].tolist() == [3, 0]
    spans = signals["line_words"]
    assert (spans.document.tolist(), spans.starts.tolist(), spans.ends.tolist()) == ([0, 0], [0, 10], [7, 15])
    assert spans.values.tolist() == [2, 1]


def test_a_mapper_leaves_texts_that_need_no_change():
    operator = get_operator("map", "text.newlines")
    mapped = apply_map(operator, Texts(["a\r\nb\rc", "d\n"]), operator.settings())
    assert mapped.texts == ["a\nb\nc", None]
    assert mapped.signals["replaced"].tolist() == [2, 0]


def test_an_extractor_tells_a_bad_page():
    operator = get_operator("extract", "plain.text")
    assert operator.function("Größe".encode("latin-1"), operator.settings(encoding="latin-1")) == "Größe"
    with pytest.raises(BadDocument, match="not utf-8"):
        operator.function(b"\xff", operator.settings())


class Stored:
    def __init__(self, columns):
        self.columns = columns
        self.count = len(next(iter(columns.values())))

    def read(self, name):
        return self.columns[name]


def test_a_global_operator_sees_all_shards():
    operator = get_operator("global", "order.length")
    sketches = [
        Stored(operator.function.sketch(Texts(texts), operator.settings()))
        for texts in (["aaa", "a"], ["aa", "aaaa", "a"])
    ]
    resolved = list(operator.function.resolve(sketches, operator.settings(), Path("unused")))
    assert [shard.signals["place"].tolist() for shard in resolved] == [[0.75, 0], [0.5, 1, 0.25]]


def test_every_operator_tells_what_it_is():
    operators = all_operators()
    assert {operator.kind for operator in operators} == {"score", "map", "extract", "global"}
    for operator in operators:
        assert operator.summary and operator.source, operator.name
        for field_name, field in operator.settings.model_fields.items():
            assert field.description, f"{operator.name}: {field_name}"


def test_an_unknown_operator_is_told_with_the_nearest():
    with pytest.raises(PunaError, match=r"did you mean 'text\.sizes'"):
        get_operator("score", "text.size")


def test_a_name_is_taken_once_and_has_a_family():
    with pytest.raises(ValueError, match="two operators"):
        all_operators()
        score("text.sizes", signals={"a": "b"}, source="none")
    with pytest.raises(ValueError, match=r"family\.name"):
        score("sizes", signals={"a": "b"}, source="none")


def test_signals_that_were_not_declared_are_refused():
    declared = get_operator("score", "text.sizes")
    operator = Operator("a.b", "score", None, declared.settings, {"x": "a number"}, {}, "none", 1, "none")
    with pytest.raises(ValueError, match="declared are"):
        checked(operator, {"y": numpy.zeros(2)}, 2)
    with pytest.raises(ValueError, match="numbers for 2 documents"):
        checked(operator, {"x": numpy.zeros(3)}, 2)
    with pytest.raises(ValueError, match="not what is declared"):
        checked(operator, {"x": Spans.nothing()}, 2)
