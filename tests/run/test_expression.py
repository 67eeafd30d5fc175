from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.run.expression import parse

METRICS = {"lora": {"bpb.nl": 1.5, "zero": 0.0}, "base": {"bpb.nl": 2.0}}
numbers = st.floats(-1e6, 1e6)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('lora["bpb.nl"] / base["bpb.nl"] - 1', -0.25),
        ('max(lora["bpb.nl"], base["bpb.nl"], 1)', 2.0),
        ("min(1, 2) + mean(1, 2, 6) * abs(-2) ** 3", 25.0),
        ('-lora["bpb.nl"] + +1', -0.5),
        ("2 ** -1", 0.5),
    ],
)
def test_arithmetic_over_metrics(text: str, value: float) -> None:
    assert parse(text, where="claim").value(METRICS) == pytest.approx(value)


@given(numbers, numbers, numbers)
def test_it_agrees_with_python(a: float, b: float, c: float) -> None:
    metrics = {"s": {"a": a, "b": b, "c": c}}
    text = 's["a"] + s["b"] * s["c"] - max(s["a"], s["b"]) / 4'
    assert parse(text, where="claim").value(metrics) == a + b * c - max(a, b) / 4


def test_it_says_which_stages_and_metrics_it_reads() -> None:
    parsed = parse('lora["a"] / base["a"] + lora["b"]', where="claim")
    assert parsed.stages == ("lora", "base")
    assert parsed.metrics == (("lora", "a"), ("base", "a"), ("lora", "b"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1 1",
        "lora",
        "lora.metric",
        "lora[0]",
        'lora["a"]["b"]',
        'lora["a"](1)',
        "__import__('os').system('true')",
        "().__class__",
        "1 < 2",
        "1 if 1 else 2",
        "True",
        "'a'",
        "1j",
        "[1][0]",
        "(lambda: 1)()",
        "[x for x in (1, 2)]",
        "f'{1}'",
        "1 // 2",
        "1 % 2",
        "~1",
        "min()",
        "min(*[1])",
        "mean(1, k=2)",
        "abs(1, 2)",
        "sum(1, 2)",
        "x := 1",
        "-" * 1900 + "1",
        "(" * 900 + "1" + ")" * 900,
        "1+" * 1200 + "1",
    ],
)
def test_anything_else_is_refused_before_it_is_evaluated(text: str) -> None:
    with pytest.raises(PunaError, match="claim:"):
        parse(text, where="claim")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('lora["bpb.nl"] / lora["zero"]', "division by zero"),
        ("10.0 ** 1000", "not a finite number"),
        ("(-1) ** 0.5", "not a finite number"),
        ('lora["bpb.n"]', "did you mean 'bpb.nl'"),
        ('lara["x"]', "did you mean 'lora'"),
    ],
)
def test_what_cannot_be_computed_is_an_error(text: str, message: str) -> None:
    with pytest.raises(PunaError, match=message):
        parse(text, where="claim").value(METRICS)


def test_a_metric_that_is_no_number_stays_one() -> None:
    assert math.isnan(parse('s["a"] + 1', where="claim").value({"s": {"a": math.nan}}))
