"""The planner: what drops most for its cost comes first; mappers stay where they are."""

from __future__ import annotations

import itertools
from math import nan

import pytest

from puna.data.curate.execute import execute
from puna.data.curate.pipeline import make_pipeline
from puna.data.curate.planner import plan
from puna.data.curate.texts import Texts

STEPS = [
    {"score": "text.sizes", "as": "dear"},
    {"gate": {"name": "few", "signal": "dear.words", "minimum": 2}},
    {"score": "text.sizes", "as": "cheap"},
    {"gate": {"name": "most", "signal": "cheap.characters", "minimum": 6}},
    {"gate": {"name": "beside", "signal": "dear.lines", "minimum": 1}},
    {"map": "text.newlines"},
    {"score": "text.sizes", "as": "after"},
    {"gate": {"name": "last", "signal": "after.words", "minimum": 3}},
]


def count(seconds=0.0, dropped=0):
    return {"came": 100, "dropped": dropped, "seconds": seconds}


def test_gates_are_ordered_by_what_they_drop_for_their_cost():
    phase = make_pipeline(STEPS).phases()[0]
    counts = {step.label: count() for step in phase.steps}
    counts |= {"dear": count(10.0), "cheap": count(0.1), "few": count(0, 5), "most": count(0, 50)}
    counts["beside"] = count(0, 4)
    order = plan(phase, counts)
    assert order[:5] == ["cheap", "most", "dear", "few", "beside"]
    assert order[5:] == ["text.newlines", "after", "last"]
    counts["cheap"] = count(1000.0)
    assert plan(phase, counts)[:2] == ["dear", "few"]


def test_gates_of_one_score_count_together():
    steps = [
        {"score": "text.sizes", "as": "one"},
        {"gate": {"name": "single", "signal": "one.words", "minimum": 2}},
        {"score": "text.sizes", "as": "two"},
        {"gate": {"name": "first", "signal": "two.characters", "minimum": 6}},
        {"gate": {"name": "second", "signal": "two.lines", "minimum": 1}},
    ]
    phase = make_pipeline(steps).phases()[0]
    counts = {"one": count(1.0), "two": count(1.0)}
    counts |= {"single": count(0, 30), "first": count(0, 20), "second": count(0, 25)}
    # Alone each gate of "two" drops less than "single", together they drop 40%.
    assert plan(phase, counts) == ["two", "second", "first", "one", "single"]


@pytest.mark.parametrize("numbers", list(itertools.permutations(range(3))))
def test_every_order_keeps_the_same_documents(numbers):
    pairs = [STEPS[0:2], STEPS[2:4], [{"score": "text.sizes", "as": "third"}]]
    pairs[2].append({"gate": {"name": "short", "signal": "third.characters", "maximum": 12}})
    steps = make_pipeline([step for number in numbers for step in pairs[number]]).steps
    texts = Texts(["one", "one two", "a b c", "a word too many here", "", "three words now"])
    assert execute(steps, texts).rows.tolist() == [1]


def test_what_looks_at_documents_one_by_one_is_not_asked_about_dropped_ones():
    steps = make_pipeline(
        [
            {"score": "text.sizes"},
            {"gate": {"name": "few", "signal": "text.sizes.words", "minimum": 2}},
            {"score": "language.detected", "settings": {"detector": "script"}},
        ]
    ).steps
    texts = ["ένα δύο", "μία", "δύο τρία", "a b c", "ένα δύο τρία"]
    name = "language.detected.probability"
    assert execute(steps, Texts(texts)).signals[name].tolist() == pytest.approx(
        [1, nan, 1, 0, 1], nan_ok=True
    )
    assert execute(steps, Texts(texts), everything=True).signals[name].tolist() == [1, 1, 1, 0, 1]
