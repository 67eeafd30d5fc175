"""A whole run of the real stages on a tiny model, from the command line to report and card."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import puna
from puna.run.alone import run_stage
from puna.run.planner import plan
from puna.run.recipe import load
from puna.run.record import Run
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
    held_out: {share: 0.3}
    leak: report  # The texts are nearly the same.
  tuned:
    use: train
    in: {model: base, corpus: cat.train}
    max_steps: 12
    batch_tokens: 128
    micro_batch_tokens: 128
    max_length: 64
    learning_rate: 3e-3
    save_steps: 4
    lora: {r: 4}
  scores:
    use: evaluate
    in: {models: {base: base, tuned: tuned}, corpora: {cat: cat.held_out}}
    prompts: ["the cat"]
    sample_tokens: 4
  export:
    use: export
    in: {model: tuned}
    format: hf
claims:
  - name: cat
    says: The cat is learnt
    value: scores["bpb.cat.tuned"] / scores["bpb.cat.base"] - 1
    at_most: 0
"""


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
    for number in range(10):
        words = " ".join(
            ["the cat sat on that mat", "and then it went in again", f"for the end of day {number}"] * 5
        )
        (tmp_path / "texts" / f"{number}.txt").write_text(f"{words}.\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def test_a_recipe_of_real_stages_runs_proves_and_reports(place: Path) -> None:
    run = puna.run("recipe.yaml")
    assert run["scores"]["bpb.cat.tuned"] < run["scores"]["bpb.cat.base"]
    assert run.claims is not None and run.claims["passed"]
    report = run.report.read_text()
    assert "A tiny Llama reads about a cat" in report and "The cat is learnt" in report
    assert "learning_rate: 0.003" in report
    assert "A tiny Llama" in (run.folder / "tuned/model/README.md").read_text()
    exported = run.stages["export"].output("model")
    assert puna.load(exported).spec == puna.load(run.stages["tuned"].output("model")).spec
    assert [decision.action for decision in Runner(load("recipe.yaml"), run.folder).preview()] == [
        "reuse"
    ] * 4
    again = Runner(load(run.folder / "run.yaml"), run.folder).preview()
    assert [decision.action for decision in again] == ["reuse"] * 4


def test_changed_text_is_noticed(place: Path) -> None:
    puna.run("recipe.yaml", set={"tuned.max_steps": 1})
    (place / "texts" / "0.txt").write_text(
        "another text altogether, and a longer one than it was before\n" * 9
    )
    decisions = Runner(load("recipe.yaml", settings={"tuned.max_steps": 1}), Path("runs/tiny")).preview()
    assert decisions[0].action == "run" and "0.txt changed" in decisions[0].reason


@pytest.mark.slow
def test_training_that_is_killed_ends_in_the_weights_it_would_have_had(place: Path) -> None:
    command = [sys.executable, "-m", "puna.cli", "run", "recipe.yaml", "--set", "tuned.max_steps=120"]
    log = place / "runs/tiny/tuned.work/metrics.jsonl"
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (log.exists() and len(log.read_text().splitlines()) > 8):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert not (place / "runs/tiny/tuned").exists()
    resumed = puna.run("recipe.yaml", set={"tuned.max_steps": 120})
    assert resumed.stages["tuned"].sessions == 2
    straight = puna.run("recipe.yaml", set={"tuned.max_steps": 120}, out="runs/straight")
    assert weights(resumed) == weights(straight)


def weights(run: Run) -> str:
    return str(run.stages["tuned"].outputs["model"]["files"]["model.safetensors"]["sha256"])


def test_export_writes_both_formats_and_merges_an_adapter(place: Path) -> None:
    run = puna.run("recipe.yaml", set={"tuned.max_steps": 1, "tuned.save_dtype": "float32"})
    adapter = run.stages["tuned"].output("adapter")
    settings = {"format": "hf", "dtype": "float32"}
    merged = run_stage("export", {"model": str(adapter)}, "merged", settings, device="cpu").output("model")
    here, there = puna.load(merged), puna.load(run.stages["tuned"].output("model"))
    for (name, one), two in zip(here.named_parameters(), there.parameters(), strict=True):
        assert (one - two).abs().max() < 1e-5, name
    file = run_stage("export", {"model": "base"}, "gguf", {"kind": "q8_0"}, device="cpu").output("model")
    assert next(file.rglob("*.gguf") if file.is_dir() else iter([file])).read_bytes()[:4] == b"GGUF"
    about = json.loads(Path("gguf/stage.json").read_text())
    assert about["metrics"]["parameters"] == puna.load("base").spec.parameter_count()


def test_a_plan_follows_a_new_vocabulary_through_the_recipe(place: Path) -> None:
    train = {"max_steps": 2, "batch_tokens": 64, "micro_batch_tokens": 64, "max_length": 64}
    stages = {
        "cat": {"use": "corpus", "sources": [{"path": "texts/*.txt"}], "held_out": {"share": 0.3}},
        "words": {"use": "tokenizer", "in": {"model": "base", "corpus": "cat.train"}, "vocab_size": 5000},
        "transfer": {
            "use": "vocabulary",
            "in": {"model": "base", "tokenizer": "words"},
            "builder": "mean_of_pieces",
            "pad_to_multiple": 64,
        },
        "tuned": {"use": "train", "in": {"model": "transfer", "corpus": "cat.train"}, **train},
        "plain": {"use": "train", "in": {"model": "base", "corpus": "cat.train"}, **train},
    }
    recipe: dict[str, Any] = {"name": "new-words", "title": "t", "device": "cpu", "stages": stages}
    costs = {stage.stage: stage.cost for stage in plan(recipe, device="h100").stages}
    old, new = costs["plain"], costs["tuned"]
    assert old is not None and new is not None and costs["transfer"] is not None
    assert costs["transfer"].spec.vocab_size == 5056
    assert new.trainable - old.trainable == (5056 - 320) * 48  # A tied matrix: rows of the hidden size.
    stages["words"]["in"] = {"corpus": "cat.train"}  # a tokenizer of no model's kind has as many rows
    made = plan(recipe, device="h100")
    assert {stage.stage: stage.cost for stage in made.stages}["tuned"] == new


def test_the_kind_of_a_corpus_follows_it_through_the_stages(tmp_path: Path) -> None:
    """Of sentence pairs nothing is read for bits per byte; each corpus of them is translated."""
    (tmp_path / "pairs.jsonl").write_text('{"source_text": "a cat", "target_text": "een kat"}\n' * 50)
    about: dict[str, Any] = {"name": "little", "title": "t", "stages": {}}
    for name in ("one", "two"):
        source = {"path": str(tmp_path / "pairs.jsonl")}
        about["stages"][name] = {"use": "corpus", "kind": "sentence_pairs", "sources": [source]}
    about["stages"]["drawn"] = {"use": "sample", "in": {"corpus": "two.train"}, "rows": 5}
    inputs = {"models": {"base": "meta-llama/Llama-2-7b-hf"}, "corpora": {"one": "one.train"}}
    translation = {"rows": 4, "max_tokens": 8}
    about["stages"]["scores"] = {"use": "evaluate", "in": inputs, "translation": translation}
    alone = plan(about, device="h100").stages[-1].cost
    inputs["corpora"]["drawn"] = "drawn"
    both = plan(about, device="h100").stages[-1].cost
    assert alone is not None and both is not None
    assert (alone.tokens, both.tokens) == (4 * 8, 2 * 4 * 8)
