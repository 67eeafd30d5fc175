"""The stage ``unmasking``: every pattern alike, one chosen on validation rows, and a table of all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pytest import MonkeyPatch

from puna.core.errors import PunaError
from puna.core.stage import Context, Outcome, get_stage, validate
from puna.data.corpus import write_corpus
from puna.data.next_word import NextWordParameters, next_word_rows
from puna.edit import unmasking
from puna.edit.initialise import initialise
from puna.evaluate.labelling import Labelled
from puna.model.spec import BlockSpec, LlamaSpec
from puna.text import pretrained

TRAIN = {
    "max_steps": 60,
    "batch_tokens": 256,
    "micro_batch_tokens": 256,
    "max_length": 64,
    "learning_rate": 2e-2,
    "warmup_ratio": 0.1,
    "dtype": "float32",
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> dict[str, Path]:
    from puna.core.seeds import torch_generator

    root = tmp_path_factory.mktemp("unmasking")
    block = BlockSpec(heads=4, kv_heads=2, head_dim=8, width=48)
    spec = LlamaSpec(320, 32, (block, block), tied=True, max_positions=64)
    pretrained.save(initialise(spec, tiny_tokenizer, torch_generator(0, "test")), root / "model")
    drawn = NextWordParameters(
        rows=80, held_out_rows=20, words=("the", "cat", "sat", "mat", "end"), triggers=2
    )
    for side in ("train", "held_out"):
        about: dict[str, Any] = {"provenance": [{"source": "test", "licence": "CC0"}], "ledger": {}}
        write_corpus(root / side, "labelled_words", next_word_rows(drawn, side, 0), **about)
    return {"model": root / "model", "corpus": root / "train", "test": root / "held_out"}


def run(places: dict[str, Path], out: Path, **parameters: Any) -> tuple[Outcome, Context]:
    stage = get_stage("unmasking")
    context = Context("unmasking", out, {**places, "model": str(places["model"])}, seed=0, dtype="float32")
    settings = {"groups": 2, "validation_rows": 20, "train": TRAIN, **parameters}
    return stage.function(context, validate(stage.parameters, settings, where="test")), context


def test_every_pattern_but_the_causal_one_learns_what_the_next_word_decides(
    places: dict[str, Path], tmp_path: Path
) -> None:
    outcome, context = run(places, tmp_path)
    found = outcome.metrics
    assert found["patterns"] == 4
    assert found["causal.entity_f1"] < 0.5 < 0.8 < found["worst_unmasked.entity_f1"]
    assert found["accuracy.majority"] <= found["causal.accuracy"] + 0.1
    assert found["chosen_layers"] > 0
    (table,) = context.report["tables"]
    assert [row[0].split()[0] for row in table["rows"]] == ["00", "01", "10", "11", "majority"]
    assert sum("chosen" in row[0] for row in table["rows"]) == 1
    assert not (tmp_path / "patterns").exists()


def test_the_choice_is_made_on_validation_rows_and_not_on_the_test(
    places: dict[str, Path], tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    figures = {
        "00": (0.1, 0.9),
        "01": (0.8, 0.2),
        "10": (0.8, 0.7),  # an equal: the first is taken
        "11": (0.3, 1.0),
    }

    def measured(self: Any, pattern: str) -> dict[str, float]:
        validation, test = figures[pattern]
        names = ("entity_f1", "accuracy", "macro_f1")
        return {
            f"{side}.{name}": v for side, v in (("validation", validation), ("test", test)) for name in names
        }

    monkeypatch.setattr(unmasking._Work, "measured", measured)
    outcome, _ = run(places, tmp_path)
    assert outcome.metrics["chosen.entity_f1"] == 0.2 and outcome.metrics["best_on_test.entity_f1"] == 1.0
    assert outcome.metrics["causal.entity_f1"] == 0.9 and outcome.metrics["worst_unmasked.entity_f1"] == 0.2


def test_validation_rows_are_not_learnt_from(places: dict[str, Path]) -> None:
    sides = unmasking.Sides.split(places["corpus"], places["test"], 20, 0)
    ids = [{row["id"] for row in side.rows} for side in (sides.train, sides.validation, sides.test)]
    assert [len(each) for each in ids] == [60, 20, 20]
    assert ids[0] | ids[1] == {row["id"] for row in Labelled.read(places["corpus"]).rows}
    for rows in (0, 80):
        with pytest.raises(PunaError, match="validation rows are taken out"):
            unmasking.Sides.split(places["corpus"], places["test"], rows, 0)


def test_a_killed_run_goes_on_with_the_patterns_that_are_left(
    places: dict[str, Path], tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    few = {"patterns": ["00", "11"], "train": {**TRAIN, "max_steps": 2}}
    trained: list[str] = []
    train = unmasking._Work._train

    def counted(self: Any, pattern: str, folder: Path) -> dict[str, float]:
        trained.append(pattern)
        if trained == ["00", "11"]:
            raise KeyboardInterrupt
        return train(self, pattern, folder)

    monkeypatch.setattr(unmasking._Work, "_train", counted)
    with pytest.raises(KeyboardInterrupt):
        run(places, tmp_path / "killed", **few)
    again, _ = run(places, tmp_path / "killed", **few)
    assert trained == ["00", "11", "11"]
    whole, _ = run(places, tmp_path / "whole", **few)
    assert again.metrics == whole.metrics


def test_patterns_of_another_length_are_refused(places: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(PunaError, match="a digit for each of 2 groups"):
        run(places, tmp_path, patterns=["0101"])
