"""The gap monitor: how far a figure rose and came back, and how far the first and last layers moved."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import little_trainings
import pytest
import torch
from little_trainings import write_places

from puna.core.errors import PunaError
from puna.core.stage import Context, Outcome, get_stage, validate
from puna.train.gap import LayerUpdates, gap_curves, gaps
from puna.train.metrics import read_metrics


def line(tokens: int, general: float, domain: float) -> dict[str, Any]:
    return {"step": tokens, "kind": "eval", "tokens": tokens, "general.loss": general, "domain.loss": domain}


def test_a_rise_and_its_recovery_are_told() -> None:
    found = gaps([line(0, 2.0, 4.0), line(10, 3.0, 3.0), line(20, 2.6, 2.5), line(40, 2.25, 2.0)])
    assert found["highest.general.loss"] == 3.0 and found["rise.general.loss"] == 0.5
    assert found["rise_at.general.loss"] == 0.25 and found["recovered.general.loss"] == 0.75
    # What only falls has no rise, and nothing to recover from.
    assert found["rise.domain.loss"] == 0.0 and found["rise_at.domain.loss"] == 0.0
    assert found["recovered.domain.loss"] == 1.0
    assert gaps([]) == {}


def test_a_rise_that_stays_has_not_recovered() -> None:
    found = gaps([line(0, 2.0, 4.0), line(10, 2.2, 3.0), line(20, 2.4, 2.5)])
    assert found["recovered.general.loss"] == 0.0 and found["rise_at.general.loss"] == 1.0


def test_updates_are_relative_to_the_weights_at_the_beginning(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama(num_hidden_layers=4)
    updates = LayerUpdates(model, 1)
    assert updates.measure() == {"update.bottom": 0.0, "update.top": 0.0, "update.ratio": 1.0}
    with torch.no_grad():
        for weight in model.model.layers[0].parameters():
            weight *= 1.2
        for weight in model.model.layers[1].parameters():
            weight += 1.0  # watched by nobody
        for weight in model.model.layers[3].parameters():
            weight *= 1.1
    found = updates.measure()
    assert found["update.bottom"] == pytest.approx(0.2, rel=1e-5)
    assert found["update.top"] == pytest.approx(0.1, rel=1e-5)
    assert found["update.ratio"] == pytest.approx(2.0, rel=1e-5)
    with torch.no_grad():
        for weight in model.model.layers[3].parameters():
            weight /= 1.1
    assert updates.measure()["update.ratio"] > 1e5
    with pytest.raises(PunaError, match="overlap"):
        LayerUpdates(model, 3)


def test_curves_begin_at_no_change() -> None:
    lines = [
        {"tokens": n, "a.bits_per_byte": bits, "update.ratio": 1.0}
        for n, bits in ((0, 2.0), (8, 2.5), (16, 2.25))
    ]
    changes, updates = gap_curves(lines)
    assert changes["series"] == [{"name": "a", "x": [0, 8, 16], "y": [0.0, 25.0, 12.5]}]
    assert updates["series"] == [{"name": "ratio", "x": [0, 8, 16], "y": [1.0, 1.0, 1.0]}]
    assert gap_curves(lines[:2]) == gap_curves([]) == []  # both ends alone show no way between them


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> dict[str, Path]:
    return write_places(tmp_path_factory.mktemp("gap"), tiny_tokenizer)


def train(places: dict[str, Path], out: Path, *, held_out: bool = True, **changes: Any) -> Outcome:
    inputs: dict[str, Any] = {"model": str(places["model"]), "corpus": {"main": places["documents"]}}
    if held_out:
        inputs["held_out"] = {"en": places["held_out"]}
    stage = get_stage("train")
    parameters = validate(stage.parameters, {**little_trainings.SMALL, **changes}, where="test")
    return stage.function(Context("train", out, inputs, seed=0, dtype="float32"), parameters)


def test_watching_changes_no_weight_and_is_told_at_every_evaluation(
    places: dict[str, Path], tmp_path: Path
) -> None:
    plain = train(places, tmp_path / "plain", eval_steps=2)
    watched = train(places, tmp_path / "watched", eval_steps=2, watched_layers=1)
    assert little_trainings.weights(watched).keys() == little_trainings.weights(plain).keys()
    for name, tensor in little_trainings.weights(plain).items():
        assert torch.equal(tensor, little_trainings.weights(watched)[name])
    lines = [line for line in read_metrics(tmp_path / "watched" / "metrics.jsonl") if line["kind"] == "eval"]
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert lines[0]["update.bottom"] == 0.0 < lines[1]["update.bottom"] < lines[2]["update.bottom"]
    assert watched.metrics["highest.update.ratio"] == max(line["update.ratio"] for line in lines[1:])
    assert watched.metrics["rise.en.loss"] == plain.metrics["rise.en.loss"] < math.inf
    assert "highest.update.ratio" not in plain.metrics


def test_what_cannot_be_watched_is_refused(places: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(PunaError, match="nothing to evaluate on"):
        train(places, tmp_path / "a", held_out=False, watched_layers=1)
    with pytest.raises(PunaError, match="watched_layers does not go with"):
        train(places, tmp_path / "b", watched_layers=1, lora={"r": 2})
