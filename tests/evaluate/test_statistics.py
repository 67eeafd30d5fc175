from __future__ import annotations

import math

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.evaluate import statistics

counts = st.lists(st.floats(1, 1000), min_size=2, max_size=40)


def test_resampling_weights_sum_to_the_number_of_items_and_have_mean_one() -> None:
    weights = numpy.concatenate(list(statistics.resamples(50, 4000, seed=1)))
    assert weights.shape == (4000, 50)
    assert (weights.sum(axis=1) == 50).all()
    assert abs(weights.mean(axis=0) - 1).max() < 0.1


def test_weights_are_the_same_for_one_seed_and_differ_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    first = numpy.concatenate(list(statistics.resamples(7, 9, seed=3)))
    monkeypatch.setattr(statistics, "_WEIGHTS_AT_ONCE", 14)  # two rows a chunk: same draws, other chunks
    assert (numpy.concatenate(list(statistics.resamples(7, 9, seed=3))) == first).all()
    assert (numpy.concatenate(list(statistics.resamples(7, 9, seed=4))) != first).any()


def test_interval_of_a_mean_agrees_with_the_normal_theory() -> None:
    values = numpy.random.default_rng(0).normal(10, 3, 400)
    found = statistics.ratio(values, numpy.ones(400), draws=4000, seed=0)
    half = 1.96 * values.std() / math.sqrt(400)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.05)
    assert found.high == pytest.approx(values.mean() + half, abs=0.05)


def test_coverage_of_the_interval_is_near_its_level() -> None:
    generator = numpy.random.default_rng(5)
    hits = 0
    for trial in range(200):
        bits = generator.normal(2, 0.5, 60)
        found = statistics.ratio(bits, numpy.ones(60), draws=400, seed=trial, level=0.9)
        hits += found.low <= 2 <= found.high
    assert 0.82 <= hits / 200 <= 0.96


@settings(deadline=None, max_examples=30)
@given(counts, st.floats(0.5, 1.5))
def test_a_common_factor_changes_every_draw_alike(before: list[float], factor: float) -> None:
    bits = numpy.array(before)
    found = statistics.relative_change(bits * factor, bits, draws=50, seed=0)
    assert found.value == pytest.approx(factor - 1, abs=1e-9)
    assert found.low == pytest.approx(factor - 1, abs=1e-9)
    assert found.high == pytest.approx(factor - 1, abs=1e-9)


def test_pairing_shows_a_small_change_that_separate_intervals_hide() -> None:
    generator = numpy.random.default_rng(0)
    before = generator.uniform(100, 5000, 80)
    after = before * generator.normal(0.97, 0.01, 80)
    change = statistics.relative_change(after, before, draws=1000, seed=0)
    assert change.high < 0
    ones = numpy.ones(80)
    alone = [statistics.ratio(values, ones, draws=1000, seed=0) for values in (after, before)]
    assert alone[0].high > alone[1].low


@settings(deadline=None, max_examples=30)
@given(counts)
def test_identical_systems_have_no_difference(values: list[float]) -> None:
    bits = numpy.array(values)
    assert statistics.relative_change(bits, bits, draws=20, seed=0) == statistics.Interval(0.0, 0.0, 0.0)
    assert statistics.sign_test(bits - bits) == 1.0


def test_one_document_has_a_value_but_no_interval() -> None:
    found = statistics.ratio(numpy.array([8.0]), numpy.array([4.0]), draws=10, seed=0)
    assert found.value == 2.0
    assert not found.known
    assert found.metrics("bpb") == {"bpb": 2.0}


@pytest.mark.parametrize(
    ("signs", "expected"),
    [([1] * 5, 2 / 32), ([-1] * 5, 2 / 32), ([1, 1, 1, 1, -1, 0], 12 / 32), ([1, -1], 1.0), ([0, 0], 1.0)],
)
def test_sign_test_is_the_exact_binomial(signs: list[int], expected: float) -> None:
    assert statistics.sign_test(numpy.array(signs, dtype=float)) == pytest.approx(expected)


def test_unequal_lengths_and_silly_settings_are_refused() -> None:
    with pytest.raises(PunaError, match="same items"):
        statistics.relative_change(numpy.ones(3), numpy.ones(2), draws=10, seed=0)
    with pytest.raises(PunaError, match="bootstrap settings"):
        statistics.ratio(numpy.ones(3), numpy.ones(3), draws=0, seed=0)
