"""Gates against the plain definition of each bound, from both sides."""

from __future__ import annotations

import math

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.core.stage import validate
from puna.data.curate.gates import Gate, passes, quantile_bounds
from puna.data.curate.operator import Spans


def judge(values, tags=None, lengths=None, **settings):
    gate = Gate(name="g", signal="t.s", **settings)
    values = values if isinstance(values, Spans) else numpy.array(values, dtype=float)
    count = len(lengths) if lengths is not None else len(values)
    signals = {"t.s": values, "t#characters": numpy.array(lengths or [1] * count, dtype=float)}
    return passes(gate, signals, tags or [""] * count).tolist()


@pytest.mark.parametrize(
    ("bound", "passing"),
    [
        ({"minimum": 2}, [False, True, True]),
        ({"above": 2}, [False, False, True]),
        ({"maximum": 2}, [True, True, False]),
        ({"below": 2}, [True, False, False]),
        ({"minimum": 2, "below": 3}, [False, True, False]),
    ],
)
def test_bounds_hold_from_both_sides(bound, passing):
    assert judge([1, 2, 3], **bound) == passing


@given(
    st.lists(st.floats(-5, 5) | st.just(math.nan), max_size=8),
    st.floats(-5, 5),
    st.sampled_from(["keep", "drop"]),
)
def test_null_is_kept_or_dropped_as_told(values, bound, null):
    by_hand = [null == "keep" if math.isnan(value) else value >= bound for value in values]
    assert judge(values, minimum=bound, null=null) == by_hand


def test_a_language_replaces_the_bounds_it_names():
    passing = judge(
        [1, 1, 5, 5], ["en", "nl", "en", "nl"], minimum=2, maximum=4, languages={"nl": {"above": 0}}
    )
    assert passing == [False, True, False, False]


def spans(document, values, sizes):
    ends = numpy.cumsum(sizes)
    return Spans(numpy.array(document), ends - numpy.array(sizes), ends, numpy.array(values, dtype=float))


@pytest.mark.parametrize(
    ("reduce", "numbers"),
    [
        ("mean", [2, None, 4]),
        ("max", [3, None, 4]),
        ("min", [1, None, 4]),
        ("sum", [4, None, 4]),
        ("count", [2, 0, 1]),
        ("share", [(1 * 2 + 3 * 6) / 10, 0, 4 * 5 / 5]),
    ],
)
def test_spans_become_one_number(reduce, numbers):
    signal = spans([0, 0, 2, 2], [1, 3, 4, math.nan], [2, 6, 5, 9])
    for place, number in enumerate(numbers):
        lengths = [10, 3, 5]
        if number is None:
            assert judge(signal, lengths=lengths, reduce=reduce, minimum=-100)[place] is False
        else:
            assert judge(signal, lengths=lengths, reduce=reduce, minimum=number)[place] is True
            assert judge(signal, lengths=lengths, reduce=reduce, above=number)[place] is False


def test_a_gate_with_a_condition_looks_at_no_others():
    gate = Gate(name="g", signal="s", minimum=5, when={"signal": "t", "above": 0})
    signals = {"s": numpy.array([1.0, 1, 9, 1]), "t": numpy.array([1.0, 0, 1, math.nan])}
    assert passes(gate, signals, [""] * 4).tolist() == [False, True, True, True]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.sampled_from([0.1, 0.5, 0.9]))
def test_a_quantile_keeps_the_upper_share(values, share):
    gate = Gate(name="g", signal="s", quantile_minimum=share)
    numbers = numpy.array(values, dtype=float)
    found = quantile_bounds(gate, numbers, numpy.array([""] * len(values), dtype=object))
    kept = passes(gate, {"s": numbers}, [""] * len(values), found)
    bound = found[""]["minimum"]
    assert bound in values
    assert numpy.mean(numbers < bound) <= share + 1e-12
    assert numpy.mean(numbers <= bound) >= share - 1e-12
    assert kept.tolist() == [value >= bound for value in values]


def test_quantiles_may_be_those_of_a_language():
    gate = Gate(name="g", signal="s", quantile_minimum=0.5, by_language=True)
    values, tags = numpy.array([1.0, 2, 10, 20]), ["en", "en", "nl", "nl"]
    found = quantile_bounds(gate, values, numpy.array(tags, dtype=object))
    assert found == {"en": {"minimum": 1.0}, "nl": {"minimum": 10.0}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"minimun": 1}, "did you mean 'minimum'"),
        ({}, "no bound"),
        ({"minimum": 1, "above": 1}, "bound the same side"),
        ({"minimum": 1, "quantile_minimum": 0.5}, "bound the same side"),
        ({"minimum": float("nan")}, "finite"),
        ({"minimum": 5, "maximum": 3}, "nothing passes: minimum 5, maximum 3"),
        ({"minimum": 3, "below": 3}, "nothing passes"),
        (
            {"quantile_minimum": 0.5, "when": {"signal": "t", "quantile_minimum": 0.5}},
            "quantiles bound the gate",
        ),
    ],
)
def test_a_wrong_gate_is_told(settings, message):
    with pytest.raises(PunaError, match=message):
        validate(Gate, {"name": "g", "signal": "s", **settings}, where="gate")
