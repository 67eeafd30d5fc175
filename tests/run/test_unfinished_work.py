"""A training that was interrupted is never wiped unasked, and never gone on from with something else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import puna
from puna.core.errors import PunaError
from puna.run.alone import run_stage
from puna.run.recipe import load
from puna.run.runner import Runner

RECIPE = """\
name: tiny
title: A tiny Llama reads about a cat
device: cpu
dtype: float32
stages:
  cat:
    use: corpus
    sources: [{path: texts/*.txt}]
    leak: report
  tuned:
    use: train
    in: {model: base, corpus: cat.train}
    max_steps: 4
    batch_tokens: 64
    micro_batch_tokens: 64
    max_length: 64
    learning_rate: 3e-3
    save_steps: 2
"""
SETTINGS = {"max_steps": 4, "batch_tokens": 64, "micro_batch_tokens": 64, "max_length": 64, "save_steps": 2}


@pytest.fixture
def place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: Callable[..., Any], tiny_tokenizer: Any
) -> Path:
    """A folder with the recipe, a tiny model and some texts; the current one."""
    monkeypatch.chdir(tmp_path)
    model = tiny_llama(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.tokenizer = tiny_tokenizer
    puna.save(model, "base")
    (tmp_path / "texts").mkdir()
    for number in range(6):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"the cat sat on that mat, day {number}.\n" * 4)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], None]:
    """``interrupt(run)`` runs a training that is interrupted before its model is written."""
    from puna.train import job

    def once(run: Callable[[], Any]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(job, "write_model", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                run()

    return once


def checkpoints(work: Path) -> list[str]:
    return sorted(path.name for path in (work / "checkpoints").iterdir())


def test_a_changed_parameter_neither_wipes_nor_continues_a_run(
    place: Path, interrupt: Callable[..., None]
) -> None:
    interrupt(lambda: puna.run("recipe.yaml"))
    written = Path("runs/tiny/run.yaml").read_text()
    changed = {"tuned.learning_rate": 1e-2}
    decisions = Runner(load("recipe.yaml", settings=changed), Path("runs/tiny")).preview()
    assert [decision.action for decision in decisions] == ["reuse", "refuse"]
    with pytest.raises(PunaError, match="would be lost") as error:
        puna.run("recipe.yaml", set=changed)
    told = str(error.value)
    assert "learning_rate 0.003 -> 0.01" in told and "checkpoint-00000004" in told and "--from tuned" in told
    assert checkpoints(Path("runs/tiny/tuned.work")) == ["checkpoint-00000002", "checkpoint-00000004"]
    assert Path("runs/tiny/run.yaml").read_text() == written, "refused before anything was written"
    resumed = puna.run("recipe.yaml")
    assert resumed.stages["tuned"].sessions == 2
    assert not (resumed.folder / "tuned" / "checkpoints").exists()


def test_a_change_further_up_is_refused_too_and_from_begins_anew(
    place: Path, interrupt: Callable[..., None]
) -> None:
    interrupt(lambda: puna.run("recipe.yaml"))
    Path("texts/0.txt").write_text("quite another text about a dog that ran away\n" * 5)
    with pytest.raises(PunaError, match="would be lost") as error:
        puna.run("recipe.yaml")
    assert "input corpus" in str(error.value)
    assert checkpoints(Path("runs/tiny/tuned.work")) == ["checkpoint-00000002", "checkpoint-00000004"]
    anew = puna.run("recipe.yaml", from_stage="tuned")
    assert anew.stages["tuned"].sessions == 1


def test_a_corpus_that_vanished_from_a_run_is_made_again_and_the_training_goes_on(
    place: Path, interrupt: Callable[..., None]
) -> None:
    interrupt(lambda: puna.run("recipe.yaml"))
    shard = next(Path("runs/tiny/cat").rglob("*.parquet"))
    shard.unlink()
    assert puna.run("recipe.yaml").stages["tuned"].sessions == 2
    assert shard.is_file()


@pytest.mark.parametrize("what", ["shard", "tokenizer", "weights"])
def test_a_file_that_changed_under_a_stage_alone_is_named(
    place: Path, interrupt: Callable[..., None], what: str
) -> None:
    run_stage("corpus", {}, "cat", {"sources": [{"path": "texts/*.txt"}], "leak": "report"})

    def train(**given: Any) -> Any:
        inputs = {"model": "base", "corpus": "cat/train"}
        return run_stage("train", inputs, "tuned", SETTINGS, device="cpu", dtype="float32", **given)

    interrupt(train)
    if what == "shard":
        file = next(Path("cat/train").glob("*.parquet"))
        file.unlink()
    elif what == "tokenizer":
        file = Path("base/tokenizer.json")
        file.write_text(json.dumps(json.loads(file.read_text()), indent=1))
    else:
        file = Path("base/model.safetensors")
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    with pytest.raises(PunaError, match="would be lost") as error:
        train()
    words = "is no longer there" if what == "shard" else "changed"
    assert f"{file.name} {words}" in str(error.value) and "--force" in str(error.value)
    assert checkpoints(Path("tuned.work")) == ["checkpoint-00000002", "checkpoint-00000004"]
    if what == "shard":
        with pytest.raises(PunaError, match="missing or not whole"):
            train(force=True)
    else:
        assert train(force=True).sessions == 1


def test_whole_work_takes_its_place_without_its_checkpoints(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the record and the renaming; until then the checkpoints stand."""
    from puna.run import execute

    def dies(*_: Any) -> None:
        assert checkpoints(Path("runs/tiny/tuned.work"))
        raise KeyboardInterrupt

    puna.run("recipe.yaml", set={"tuned.learning_rate": 1e-2})
    with monkeypatch.context() as patch:
        patch.setattr(execute, "_take_place", dies)
        with pytest.raises(KeyboardInterrupt):
            puna.run("recipe.yaml")
    finished = puna.run("recipe.yaml")
    assert finished.stages["tuned"].parameters["learning_rate"] == 3e-3
    assert not (finished.folder / "tuned" / "checkpoints").exists()
