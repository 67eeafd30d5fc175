from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from puna.core.errors import PunaError
from puna.run.alone import named, parse_inputs, run_stage
from puna.run.lock import locked

pytestmark = pytest.mark.usefixtures("little")


def test_a_stage_alone_leaves_its_outputs_and_record_in_the_folder() -> None:
    record = run_stage("letters", {}, "out", {"count": 4})
    assert record.metrics == {"letters": 8.0}
    assert Path("out/train/text").read_text() == "abababab"
    assert Path("out/stage.json").is_file()


def test_an_unchanged_stage_is_not_run_again_unless_forced() -> None:
    def executions() -> int:
        return len(Path("executed.log").read_text().split())

    run_stage("letters", {}, "out")
    run_stage("letters", {}, "out")
    assert executions() == 1
    run_stage("letters", {}, "out", {"upper": True})
    assert executions() == 2
    run_stage("letters", {}, "out", {"upper": True}, force=True)
    assert executions() == 3


def test_inputs_settings_and_hyphens_reach_the_stage() -> None:
    run_stage("letters", {}, "corpus")
    settings = {"learning-rate": 2, "lora.r": 3, "weights.a-b": 0.5}
    record = run_stage("learn", {"corpus": "corpus/train"}, "model", settings, seed=4)
    assert record.parameters["learning_rate"] == 2.0
    assert record.parameters["lora"]["r"] == 3
    assert record.parameters["weights"] == {"a-b": 0.5}
    assert record.parts["seed"] == 4
    assert record.inputs["corpus"]["train"]["origin"] == "path"


@pytest.mark.parametrize(
    ("items", "found"),
    [
        (["corpus=a"], {"corpus": "a"}),
        (["a"], {"corpus": "a"}),
        (["corpus=a", "corpus=b", "held_out.nl=c"], {"corpus": ["a", "b"], "held_out.nl": "c"}),
    ],
)
def test_inputs_on_the_command_line(items: list[str], found: dict[str, Any]) -> None:
    assert parse_inputs("learn", items) == found


def test_mistakes_are_told_as_they_were_given() -> None:
    with pytest.raises(PunaError, match="did you mean 'letters'"):
        run_stage("leters", {}, "out")
    with pytest.raises(
        PunaError, match=r"setting letters.cont=1, stage letters: unknown key 'cont'[\s\S]*'count'"
    ):
        run_stage("letters", {}, "out", {"cont": 1})
    with pytest.raises(PunaError, match="input 'corpus' is missing"):
        run_stage("learn", {}, "out")
    with pytest.raises(PunaError, match=r"setting learn\.in\.corpus=nowhere"):
        run_stage("learn", {"corpus": "nowhere"}, "out")
    with pytest.raises(PunaError, match="which input is this"):
        parse_inputs("measure", ["a"])


def test_a_second_stage_is_kept_out_of_the_folder_and_no_other() -> None:
    with locked(Path("here/out"), Path("here/.out.lock")):
        with pytest.raises(PunaError, match="here/out: another run works in this folder"):
            run_stage("letters", {}, "here/out")
        run_stage("letters", {}, "here/other")
    run_stage("letters", {}, "here/out")


@pytest.mark.parametrize(
    ("items", "found"),
    [
        (["a/model", "b/model"], ["a/model", "b/model"]),
        (["base=a/model", "b/model"], {"base": "a/model", "model": "b/model"}),
        (["base=x", "a/model", "b/model"], {"base": "x", "a": "a/model", "b": "b/model"}),
        (["a=b/model"], ["a=b/model"]),
        (["k=v=w"], {"k": "v=w"}),
        (["runs/x=1"], ["runs/x=1"]),
    ],
)
def test_models_and_corpora_can_be_named_on_the_command_line(items: list[str], found: Any) -> None:
    Path("a=b/model").mkdir(parents=True)  # What is there is a path, whatever it looks like.
    assert named(items) == found


def test_two_of_one_name_on_the_command_line_are_a_mistake() -> None:
    with pytest.raises(PunaError, match="two are called 'a'"):
        named(["a=x", "a=y"])


def test_a_folder_that_holds_something_else_is_not_touched() -> None:
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("years of work")
    with pytest.raises(PunaError, match="holds something that no stage made"):
        run_stage("letters", {}, "out")
    assert Path("out/thesis.txt").read_text() == "years of work"
    Path("new.work").mkdir()
    Path("new.work/thesis.txt").write_text("years of work")
    with pytest.raises(PunaError, match=r"new\.work: holds something that no stage made"):
        run_stage("letters", {}, "new")
    assert Path("new.work/thesis.txt").read_text() == "years of work"
    Path("empty").mkdir()
    run_stage("letters", {}, "empty")
    assert Path("empty/stage.json").is_file()
