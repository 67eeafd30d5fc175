from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.run.source import dump, parse, parse_value, read

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(plain)
def test_what_is_dumped_is_read_back(value: Any) -> None:
    assert parse(dump(value), "dump").value == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("-1.5E+2", -150.0),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("~", None),
        ("", None),
        ("0x10", 16),
        ("012", 12),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("12:30", "12:30"),
        ("'1e-3'", "1e-3"),
        ("[1, {a: b}]", [1, {"a": "b"}]),
        (".inf", math.inf),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    found = parse_value(text, "--set")
    assert found == value and type(found) is type(value)


def test_numbers_that_are_none_are_read() -> None:
    assert math.isnan(parse_value(".nan", "--set"))


def test_every_key_has_its_line() -> None:
    source = parse("a: 1\nb:\n  c: [x,\n    y]\n", "f.yaml")
    assert source.where(("b", "c", 1)) == "f.yaml, line 4"
    assert source.where(("b", "missing")) == "f.yaml, line 2"
    assert source.where(("nowhere",)) == "f.yaml, line 1"


def test_an_overridden_value_is_blamed_on_who_set_it() -> None:
    source = parse("a: {b: {c: 1, d: 2}}", "f.yaml")
    source.put(("a", "b"), {"c": 3}, "--set a.b={c: 3}")
    assert source.value == {"a": {"b": {"c": 3}}}
    assert source.where(("a", "b", "c")) == "--set a.b={c: 3}"
    assert source.where(("a",)) == "f.yaml, line 1"


def test_settings_reach_into_lists_by_position_and_make_mappings_on_the_way() -> None:
    source = parse("a: [{b: 1}, {b: 2}]", "f.yaml")
    source.put(("a", "1", "b"), 5, "--set")
    source.put(("x", "y", "z"), 6, "--set")
    assert source.value == {"a": [{"b": 1}, {"b": 5}], "x": {"y": {"z": 6}}}
    for path in (("a", "2"), ("a", "first"), ("a", "2", "b")):
        with pytest.raises(PunaError, match="a is a list"):
            source.put(path, 1, "--set")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "line 2: key 'a' stands twice"),
        ("a: {b: 1, b: 2}", "key 'b' stands twice"),
        ("a: &a [*a]", "nested too deeply"),
        ("[" * 3000, "nested too deeply"),
        ("a: [", "line 1: not valid YAML"),
        ("a: *nobody", "undefined alias"),
        ("? [a]\n: 1", "a key must be a word"),
        ("!!python/object/apply:os.system ['true']", "not allowed here"),
        ("a: !!python/name:os.system", "is not a value of type"),
        ("a: !!set {a}", "not allowed here"),
        ("a: !!binary aGk=", "is not a value of type"),
        ("a: " + "9" * 5000, "is not a value of type"),
        ("<<: [1]", "<< merges mappings only"),
        ("a: 1\n--- \nb: 2", "expected a single document"),
        ("a: \x07", "not valid YAML"),
    ],
)
def test_unsafe_or_broken_yaml_is_one_clear_error(text: str, message: str) -> None:
    with pytest.raises(PunaError, match=message.replace("<", r"\<")):
        parse(text, "f.yaml")


def test_an_alias_costs_what_it_stands_for() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    with pytest.raises(PunaError, match="aliases write out to too much"):
        parse("\n".join(lines), "bomb.yaml")


def test_few_aliases_and_merges_are_fine() -> None:
    source = parse("base: &base {a: 1, b: 2}\nuse: {<<: *base, b: 3}\nagain: *base", "f.yaml")
    assert source.value["use"] == {"a": 1, "b": 3}
    assert source.value["again"] == {"a": 1, "b": 2}


def test_a_missing_large_or_binary_file_is_told_by_name(tmp_path: Path) -> None:
    with pytest.raises(PunaError, match=r"gone.yaml: file not found"):
        read(tmp_path / "gone.yaml")
    (tmp_path / "large.yaml").write_text("#" * 1_000_001)
    with pytest.raises(PunaError, match="too large"):
        read(tmp_path / "large.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PunaError, match="not a readable text file"):
        read(tmp_path / "binary.yaml")
