"""Pipelines as data: what is read, what is refused, and the phases they are cut into."""

from __future__ import annotations

import pytest

from puna.core.errors import PunaError
from puna.data.curate.execute import execute
from puna.data.curate.pipeline import load_pipeline, make_pipeline, preset_names
from puna.data.curate.texts import Texts

STEPS = [
    {"map": "text.newlines"},
    {"score": "text.sizes"},
    {"gate": {"name": "words", "signal": "text.sizes.words", "minimum": 3}},
    {"global": "order.length"},
    {"gate": {"name": "short half", "signal": "order.length.place", "maximum": 0.5}},
]


def test_every_preset_can_be_read():
    assert "example" in preset_names()
    for name in preset_names():
        pipeline = load_pipeline(name)
        assert pipeline.name == name
        assert pipeline.source


def test_phases_end_where_all_documents_are_needed():
    phases = make_pipeline(STEPS).phases()
    assert [[step.label for step in phase.steps] for phase in phases] == [
        ["text.newlines", "text.sizes", "words"],
        ["short half"],
    ]
    assert phases[0].entry is None and phases[0].closing is phases[1].entry
    quantile = {"gate": {"name": "best", "signal": "text.sizes.words", "quantile_minimum": 0.9}}
    phases = make_pipeline([*STEPS[:3], quantile]).phases()
    assert [phase.entry.label if phase.entry else None for phase in phases] == [None, "best"]


def test_a_step_may_be_changed_by_its_name():
    pipeline = make_pipeline(STEPS, gates={"words": {"minimum": 7}})
    assert pipeline.gates()[0].minimum == 7
    assert pipeline.fingerprint != make_pipeline(STEPS).fingerprint


def test_an_included_preset_stands_in_place():
    pipeline = make_pipeline([{"include": "example"}, {"score": "text.sizes", "as": "after"}])
    assert [step.label for step in pipeline.steps][-1] == "after"
    assert "after.words" in pipeline.signals()


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([{"scor": "text.sizes"}], "did you mean 'score'"),
        ([{"score": "text.size"}], r"did you mean 'text\.sizes'"),
        ([{"map": "text.sizes"}], r"write \{score: text\.sizes\}"),
        ([], "found:    none"),
        ([{"score": "text.sizes", "setting": {}}], "did you mean 'settings'"),
        ([{"score": "text.sizes", "settings": {"a": 1}}], "unknown key 'a'"),
        ([{"score": "text.sizes"}, {"score": "text.sizes"}], "the same name"),
        ([{"gate": {"name": "g", "signal": "text.sizes.words", "minimum": 1}}], r"put \{score: text\.sizes"),
        ([{"gate": {"name": "g", "signal": "nobody.knows", "minimum": 1}}], "unknown signal"),
        ([STEPS[1], {"gate": {"name": "g", "signal": "text.sizes.word", "minimum": 1}}], "did you mean"),
        ([STEPS[1], {"gate": {"name": "g", "signal": "text.sizes.line_words", "minimum": 1}}], "say how"),
        (
            [STEPS[1], {"gate": {"name": "g", "signal": "text.sizes.words", "reduce": "max", "minimum": 1}}],
            "one number already",
        ),
        ([{"include": "exmple"}], "did you mean 'example'"),
        ([STEPS[1], {"extract": "plain.text"}], "before anything else"),
        ([], "a list of steps"),
        (["gopher"], "a step is a mapping"),
    ],
)
def test_a_wrong_pipeline_is_told(steps, message):
    with pytest.raises(PunaError, match=message):
        make_pipeline(steps)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"gates": {"word": {}}}, "unknown gate"), ({"settings": {"x": {}}}, "unknown step")],
)
def test_a_change_of_nothing_is_told(change, message):
    with pytest.raises(PunaError, match=message):
        make_pipeline(STEPS, **change)


DOCUMENTS = ["one", "one two three\r\n", "", "a b c d", "x y z"]


@pytest.mark.parametrize("everything", [True, False])
def test_a_batch_keeps_its_rows_and_its_counts_add_up(everything):
    steps = make_pipeline([*STEPS[:3], {"score": "text.sizes", "as": "again"}]).steps
    done = execute(steps, Texts(DOCUMENTS), everything=everything)
    assert done.dropped == ["words", "", "words", "", ""]
    assert done.rows.tolist() == [1, 3, 4]
    assert done.current.texts == ["one two three\n", "a b c d", "x y z"]
    assert done.texts == [None, "one two three\n", None, None, None]
    assert done.signals["text.sizes.words"].tolist() == [1, 3, 0, 4, 3]
    for count in done.counts.values():
        assert count.came == count.kept + count.dropped + count.failed
    assert done.counts["words"].dropped == 2
    assert done.counts["words"].bytes == len("one two three\na b c dx y z")
    spans = done.signals["again.line_words"]
    assert spans.values[spans.document >= 3].tolist() == [4, 3]


def test_what_is_left_of_a_batch_is_gathered():
    steps = make_pipeline([*STEPS[1:3], {"score": "text.sizes", "as": "again"}]).steps
    documents = ["", "a b c", "", ""]
    rest = execute(steps, Texts(documents)).signals["again.words"].tolist()
    assert rest[1] == 3 and all(value != value for value in rest[:1] + rest[2:])
    assert execute(steps, Texts(documents), everything=True).signals["again.words"].tolist() == [0, 3, 0, 0]
