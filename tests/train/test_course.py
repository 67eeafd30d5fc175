"""Phases: the rate goes on through them, segments end with them, and what a course comes to is told."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from little_trainings import steps, train, weights

from puna.core.errors import PunaError
from puna.core.stage import Context, get_stage, validate
from puna.train.schedule import Part, compose, factor

PHASES = [{"tokens": 256, "weights": {"main": 1}}, {"tokens": 192, "weights": {"main": 1}}]
LINE = [{"linear": "phase", "to": 0.5}, {"linear": "phase", "to": 0.2}]


def test_a_segment_ends_with_its_phase() -> None:
    schedule = compose([Part("linear", "phase", end=0.5), Part("linear", "phase", end=0.25)], 30, [20, 30])
    assert [segment.steps for segment in schedule.segments] == [20, 10]
    assert factor(20, schedule) == 0.5 and factor(19, schedule) == pytest.approx(0.525)
    parts = [
        Part("warmup", 5),
        Part("constant", "phase"),
        Part("warmup", 4, end=0.5),
        Part("linear", "phase"),
    ]
    assert [segment.steps for segment in compose(parts, 30, [20, 30]).segments] == [5, 15, 4, 6]
    with pytest.raises(PunaError, match="no phase ends behind"):
        compose([Part("constant", 20), Part("constant", "phase")], 20, [20])


def test_rate_and_moments_go_on_through_phases(places: dict[str, Path], tmp_path: Path) -> None:
    """The line of the first segment ends with the first phase, where the second goes on from it."""
    mixture = {"phases": PHASES, "repeat": 9}
    _, context = train(places, tmp_path / "two", max_steps=..., schedule=LINE, mixture=mixture)
    rates = [line["learning_rate"] for line in steps(context.out)]
    falls = [before - after for before, after in itertools.pairwise(rates)]
    first = round(5e-3 / falls[0])  # steps of the first phase, in which the rate falls by half
    assert 4 <= first < len(rates) and rates[first] == pytest.approx(5e-3)
    assert falls[:first] == pytest.approx([falls[0]] * first)
    assert falls[first:] == pytest.approx([falls[-1]] * (len(falls) - first))


def test_a_run_stopped_between_phases_goes_on_from_its_state(places: dict[str, Path], tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "max_steps": ...,
        "schedule": LINE,
        "mixture": {"phases": PHASES, "repeat": 9},
    }
    whole, _ = train(places, tmp_path / "whole", **settings)
    first, _ = train(places, tmp_path / "first", stop_after=4, state_after="end", **settings)
    second, _ = train(places, tmp_path / "second", state=first.outputs["state"], **settings)
    assert all((weights(second)[name] == tensor).all() for name, tensor in weights(whole).items())


def test_segments_by_phase_need_phases(places: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(PunaError, match="mixture has no phases"):
        train(places, tmp_path / "none", schedule=LINE)


def course(**settings: Any) -> dict[str, float]:
    definition = get_stage("course")
    context = Context("course", Path("nowhere"), {})
    return definition.function(context, validate(definition.parameters, settings, where="test")).metrics


def test_a_course_is_told_in_tokens_steps_and_rates() -> None:
    phases = [
        {"tokens": 1000, "weights": {"text": 1, "code": 0}},
        {"tokens": 2000, "weights": {"text": 1, "code": 3}},
        {"tokens": 500, "weights": {"text": 0, "code": 1}},
    ]
    line = [
        {"linear": "phase", "to": 0.8},
        {"linear": "phase", "to": 0.4},
        {"warmup": 2, "start": 0, "to": 0.5},
    ]
    line += [{"linear": "phase"}]
    told = course(batch_tokens=100, learning_rate=0.1, schedule=line, mixture={"phases": phases})
    assert told["tokens"] == 3500 and told["steps"] == 35 and told["steps.2"] == 20
    assert told["tokens.2.text"] == 500 and told["tokens.2.code"] == 1500 and told["tokens.1.code"] == 0
    assert told["rate.first.2"] == pytest.approx(0.08) and told["rate.last.1"] == pytest.approx(0.082)
    assert told["jump.2"] == pytest.approx(0, abs=1e-12) and told["jump.3"] == pytest.approx(0.25 - 0.4)
    with pytest.raises(PunaError, match="says the tokens of each"):
        course(schedule=line, mixture={"weights": {"text": 1}})
