"""Flips between two versions: the identities of their rates, and the figures of a small example."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as some

from puna.core.errors import PunaError
from puna.evaluate.flips import flips, moves
from puna.evaluate.statistics import sign_test

BOOTSTRAP = {"draws": 100, "seed": 0}
answers = some.lists(some.tuples(*[some.integers(0, 3)] * 3), min_size=1, max_size=40)
scores = some.lists(some.tuples(*[some.integers(-9, 9)] * 2), min_size=1, max_size=40)


@given(answers)
def test_accuracy_falls_by_negative_less_positive_flips(items: list[tuple[int, int, int]]) -> None:
    before, after, gold = (list(column) for column in zip(*items, strict=True))
    found = flips(before, after, gold, **BOOTSTRAP)
    counts = [round(rate.value * len(items)) for rate in (found.before, found.after)]
    broken, mended = (round(rate.value * len(items)) for rate in (found.negative, found.positive))
    assert counts[0] - counts[1] == broken - mended
    assert found.before.value - found.after.value == pytest.approx(
        found.negative.value - found.positive.value, abs=1e-12
    )
    assert found.change.value == pytest.approx(found.after.value - found.before.value, abs=1e-12)
    # Nothing breaks that is not wrong now; and whatever breaks is a wrong answer unlike the one before.
    assert broken <= len(items) - counts[1]
    assert broken <= round(found.negative_mc.value * len(items)) <= len(items) - counts[1]


@given(answers)
def test_the_way_back_exchanges_what_breaks_and_what_is_mended(items: list[tuple[int, int, int]]) -> None:
    before, after, gold = (list(column) for column in zip(*items, strict=True))
    there, back = flips(before, after, gold, **BOOTSTRAP), flips(after, before, gold, **BOOTSTRAP)
    assert (there.negative, there.positive) == (back.positive, back.negative)
    assert there.sign_p == back.sign_p


@given(answers)
def test_a_version_flips_nothing_of_itself(items: list[tuple[int, int, int]]) -> None:
    before, _, gold = (list(column) for column in zip(*items, strict=True))
    found = flips(before, before, gold, **BOOTSTRAP)
    assert found.negative.value == found.positive.value == found.negative_mc.value == 0
    assert found.sign_p == 1


@given(scores)
def test_the_mean_change_is_gains_less_regressions(items: list[tuple[int, int]]) -> None:
    before, after = (numpy.array(column, dtype=float) for column in zip(*items, strict=True))
    found = moves(before, after, **BOOTSTRAP)
    mean = found.positive.value * found.gain - found.negative.value * found.regression
    assert mean == pytest.approx(float((after - before).mean()), abs=1e-9)
    assert found.gain >= 0 and found.regression >= 0
    assert found.positive.value + found.negative.value <= 1 + 1e-12


def test_rates_of_an_example() -> None:
    gold = [0, 0, 0, 0, 0, 0, 0, 0]
    before = [0, 0, 0, 1, 1, 1, 2, 0]
    after = [0, 1, 2, 0, 1, 2, 2, 0]
    found = flips(before, after, gold, draws=500, seed=0)
    assert found.negative.value == 2 / 8  # items 1 and 2
    assert found.positive.value == 1 / 8  # item 3
    assert found.negative_mc.value == 3 / 8  # item 5 too: wrong before, and wrong in another way
    assert found.sign_p == sign_test(numpy.array([-1.0, -1.0, 1.0])) == 1.0
    assert found.negative.low < 2 / 8 < found.negative.high
    figures: dict[str, Any] = found.metrics("quiz.new")
    assert figures["accuracy_change.quiz.new"] == -1 / 8
    assert figures["nfr.quiz.new"] == 2 / 8 and figures["nfr_mc.quiz.new.high"] == found.negative_mc.high


def test_versions_that_answered_other_items_are_refused() -> None:
    with pytest.raises(PunaError, match="same items"):
        flips([0, 1], [0], [0, 1], **BOOTSTRAP)
