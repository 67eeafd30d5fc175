"""``model_steps``: whole models along a training, and what each had seen; the speed without the start."""

from __future__ import annotations

from pathlib import Path

import pytest
from little_trainings import LORA, train

from puna.core.errors import PunaError
from puna.core.files import read_json
from puna.evaluate.difference import difference
from puna.train.summary import metrics_of


def test_models_are_left_along_the_way_and_the_last_is_the_trained_one(
    places: dict[str, Path], tmp_path: Path
) -> None:
    outcome, _ = train(places, tmp_path / "run", max_steps=5, model_steps=2)
    folder = outcome.outputs["models"]
    seen = read_json(folder / "seen.json")
    assert (
        list(seen) == ["step-2", "step-4", "step-5"] == sorted(p.name for p in folder.iterdir() if p.is_dir())
    )
    assert seen["step-5"]["tokens"] == outcome.metrics["tokens"] > seen["step-2"]["tokens"] > 0
    assert difference(folder / "step-5", outcome.outputs["model"]).differ == 0
    assert difference(folder / "step-2", folder / "step-4").differ > 0
    stopped, _ = train(places, tmp_path / "short", max_steps=5, stop_after=2)
    assert difference(folder / "step-2", stopped.outputs["model"]).differ == 0


def test_a_state_is_gone_on_with_that_left_models(places: dict[str, Path], tmp_path: Path) -> None:
    whole, _ = train(places, tmp_path / "whole", max_steps=5, model_steps=2, state_after=3)
    again, _ = train(places, tmp_path / "again", max_steps=5, state=whole.outputs["state"])
    assert difference(whole.outputs["model"], again.outputs["model"]).differ == 0


def test_an_adapter_is_no_whole_model(places: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(PunaError, match="whole models"):
        train(places, tmp_path / "run", lora=LORA, model_steps=2)


def test_the_steady_speed_leaves_the_first_tenth_out() -> None:
    class State:
        step, tokens, targets, seconds = 20, 2000, 1900, 29.0

    lines = [
        {"kind": "train", "tokens": 100 * n, "seconds": 10.0 + n - 1, "loss": 1.0, "peak_memory": 1}
        for n in range(1, 21)
    ]
    found = metrics_of(lines, State(), 1)  # type: ignore[arg-type]
    assert found["tokens_per_second.steady"] == pytest.approx(100.0)
    assert found["tokens_per_second"] == pytest.approx(2000 / 29)
    assert metrics_of(lines[:1], State(), 1)["tokens_per_second.steady"] == 10.0  # type: ignore[arg-type]
