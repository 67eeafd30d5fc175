"""The integer programme over variants: exact, within its limits, never worse than greed."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.edit.sub_blocks.programme import Option, Problem, brute_force, greedy, most_of, only, solve


def group(*options: tuple[float, float, float]) -> tuple[Option, ...]:
    """Options as (score, seconds, bytes)."""
    names = ("parent", "small", "linear", "none")
    return tuple(
        Option(name, score, {"seconds": seconds, "bytes": size})
        for name, (score, seconds, size) in zip(names, options, strict=False)
    )


number = st.floats(0, 10).map(lambda value: round(value, 3))


@st.composite
def problems(draw: Any) -> Problem:
    """Up to six groups of up to four options, two resources of different sizes, limits that can be met."""
    groups = []
    for _ in range(draw(st.integers(1, 6))):
        options = [
            (draw(number), draw(number) * 1e-6, draw(number) * 1e6) for _ in range(draw(st.integers(1, 4)))
        ]
        groups.append(group(*options))
    chosen = [draw(st.integers(0, len(options) - 1)) for options in groups]
    limits = {
        name: math.fsum(options[place].takes[name] for options, place in zip(groups, chosen, strict=True))
        for name in ("seconds", "bytes")
    }
    slack = draw(st.sampled_from([1.001, 1.3]))
    return Problem(tuple(groups), {name: limit * slack + 1e-9 for name, limit in limits.items()})


@settings(max_examples=60)
@given(problems())
def test_the_programme_is_the_best_of_all_combinations_and_never_worse_than_greed(problem: Problem) -> None:
    found = solve(problem)
    assert all(problem.used(found, name) <= limit * (1 + 1e-6) for name, limit in problem.limits.items())
    best = problem.score(brute_force(problem))
    assert problem.score(found) == pytest.approx(best, abs=1e-6)
    try:
        descended = greedy(problem)
    except PunaError:
        return
    assert problem.fits(descended)
    assert problem.score(descended) >= problem.score(found) - 1e-6


TWO = Problem(
    (group((0, 4, 4), (1, 2, 2), (2, 1, 2), (9, 0, 0)), group((0, 4, 4), (3, 2, 2), (3, 1, 1), (8, 0, 0))),
    {"seconds": 5.0},
)


def test_the_cheapest_score_within_the_limit_is_found() -> None:
    assert solve(TWO) == (2, 0) or solve(TWO) == brute_force(TWO)
    assert TWO.score(solve(TWO)) == 2.0


def test_greed_can_be_worse() -> None:
    """The first exchange saves most for its score, and is regretted."""
    problem = Problem((group((0, 10, 0), (1, 6, 0)), group((0, 10, 0), (1.6, 5, 0))), {"seconds": 15.0})
    assert problem.score(greedy(problem)) > problem.score(solve(problem))


def test_further_solutions_share_no_more_than_alpha_of_their_choices() -> None:
    found: list[tuple[int, ...]] = []
    for _ in range(3):
        found.append(solve(TWO, before=found, alpha=0.5))
    assert len(set(found)) == 3
    scores = [TWO.score(each) for each in found]
    assert scores == sorted(scores)
    with pytest.raises(PunaError, match="no child keeps all limits together"):
        solve(TWO, before=[(place, place) for place in range(4)], alpha=0.0)


def test_other_aims_are_the_same_programme() -> None:
    heaviest = solve(most_of(TWO, "bytes"))
    assert TWO.used(heaviest, "bytes") == 6.0 and TWO.fits(heaviest)
    narrow = only(TWO, ("parent", "none"))
    assert narrow.score(solve(narrow)) == 8.0
    with pytest.raises(PunaError, match="none of these variants"):
        only(TWO, ("half",))


@pytest.mark.parametrize("way", [solve, brute_force, greedy])
def test_limits_that_nothing_meets_are_named(way: Any) -> None:
    with pytest.raises(PunaError, match="no child is this cheap") as error:
        way(Problem((group((0, 4, 4), (1, 3, 3)),), {"bytes": 2.0}))
    assert "bytes" in str(error.value)
    apart = Problem((group((0, 4, 1), (1, 1, 4)),), {"seconds": 2.0, "bytes": 2.0})
    with pytest.raises(PunaError):
        way(apart)


def test_too_many_combinations_are_not_tried() -> None:
    with pytest.raises(PunaError, match="too many combinations"):
        brute_force(Problem((group(*[(0, 1, 1)] * 4),) * 12, {"seconds": 99.0}))


def test_without_scipy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    blocked: Sequence[str] = ("scipy.optimize", "scipy")
    for name in blocked:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(PunaError, match=r"puna\[search\]"):
        solve(TWO)
