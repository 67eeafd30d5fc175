"""States, resumption and full disks of the stage ``train``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from little_checkpoints import stored
from little_trainings import LORA, TIMED, train, weights

from puna.core.errors import PunaError
from puna.text import pretrained
from puna.train.checkpoint import Checkpoints
from puna.train.metrics import read_metrics


def test_resume_refuses_another_recipe_and_finishes_with_the_same(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from puna.train import job

    whole, _ = train(places, tmp_path / "whole", lora=LORA)
    with monkeypatch.context() as patch:
        patch.setattr(job, "write_model", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(places, tmp_path / "run", lora=LORA, save_steps=2)
    for changed, key in (
        ({"learning_rate": 2e-2}, "learning_rate"),
        ({"lora": {**LORA, "r": 4}}, "lora"),
        ({"seed": 9}, "seed"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"save_steps": 3}, "save_steps"),
    ):
        with pytest.raises(PunaError, match=f"'{key}' has changed"):
            train(places, tmp_path / "run", **{"lora": LORA, "save_steps": 2, **changed})
    other = {**places, "documents": places["held_out"]}
    with pytest.raises(PunaError, match="'corpus' has changed"):
        train(other, tmp_path / "run", lora=LORA, save_steps=2)
    resumed, _ = train(places, tmp_path / "run", lora=LORA, save_steps=2)
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(whole).items())


def compared(out: Path, after: int) -> list[dict[str, Any]]:
    """Lines of metrics beyond a step, without what a clock gave."""
    lines = read_metrics(out / "metrics.jsonl")
    return [
        {key: value for key, value in line.items() if key not in TIMED}
        for line in lines
        if line["step"] > after
    ]


def test_a_state_handed_on_gives_what_the_whole_run_gives_and_its_weights_alone_do_not(
    places: dict[str, Path], tmp_path: Path
) -> None:
    """Under another name, whose own seed would order and drop otherwise; logging may differ."""
    same = {"lora": {**LORA, "dropout": 0.3}, "max_steps": 8}
    whole, _ = train(places, tmp_path / "whole", held_out=True, state_after=4, eval_steps=2, **same)
    half, _ = train(places, tmp_path / "half", stop_after=4, state_after="end", **same)
    assert half.metrics["steps"] == 4 and whole.metrics["steps"] == 8
    one, other = (stored(outcome.outputs["state"]) for outcome in (whole, half))
    assert one.keys() == other.keys() and "cpu/0" in one
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    ends = {}
    for restore in ("all", "weights"):
        settings = {**same, "restore": restore, "save_dtype": "float32", "state_after": "end"}
        resumed, _ = train(
            places, tmp_path / restore, name="other", state=half.outputs["state"], held_out=True, **settings
        )
        assert resumed.metrics["steps"] == 8
        ends[restore] = weights(resumed)
        first = read_metrics(tmp_path / restore / "metrics.jsonl")[0]
        assert (first["step"], first["kind"]) == (4, "eval")
    expected = weights(whole)
    assert all(torch.equal(tensor, ends["all"][name]) for name, tensor in expected.items())
    trained = [line for line in compared(tmp_path / "whole", 4) if line["kind"] == "train"]
    assert trained == [line for line in compared(tmp_path / "all", 4) if line["kind"] == "train"]
    assert not all(torch.equal(tensor, ends["weights"][name]) for name, tensor in expected.items())
    losses = [line["loss"] for line in compared(tmp_path / "weights", 4)[:1]]
    assert losses == [trained[0]["loss"]], "weights, order of data and dropout are those of the state"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"learning_rate": 2e-2}, "'learning_rate' has changed"),
        ({"weight_decay": 0.1}, "'weight_decay' has changed"),
        ({"stop_after": 2}, "nothing is left to train"),
    ],
)
def test_a_state_of_another_recipe_or_beyond_the_end_is_refused(
    places: dict[str, Path], tmp_path: Path, changed: dict[str, Any], words: str
) -> None:
    half, _ = train(places, tmp_path / "half", stop_after=2, state_after="end")
    with pytest.raises(PunaError, match=words):
        train(places, tmp_path / "on", state=half.outputs["state"], **changed)


def test_recomputed_layers_change_no_bit_of_a_training(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as are set, or as few as the memory needs; dropout draws the same again."""
    from puna.train import job

    same = {"lora": {**LORA, "dropout": 0.3}, "max_steps": 3, "save_dtype": "float32"}
    seen: list[int] = []
    plain = job.start_table

    def table(model: Any, *others: Any) -> Any:
        seen.append(model.recomputed_layers)
        return plain(model, *others)

    monkeypatch.setattr(job, "start_table", table)
    usual, _ = train(places, tmp_path / "usual", **same)
    one, _ = train(places, tmp_path / "one", recompute=1, **same)
    monkeypatch.setattr(job, "total_memory", lambda: 1)
    needed, _ = train(places, tmp_path / "needed", **same)
    assert seen == [0, 1, 2]
    for outcome in (one, needed):
        found = weights(outcome)
        assert all(torch.equal(tensor, found[name]) for name, tensor in weights(usual).items())


def test_a_state_with_a_torn_file_is_refused_by_name(places: dict[str, Path], tmp_path: Path) -> None:
    half, _ = train(places, tmp_path / "half", stop_after=2, state_after="end")
    (file,) = half.outputs["state"].glob("shard-*.safetensors")
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[:-5])
    with pytest.raises(PunaError, match=r"shard-.*safetensors: not the file that was written"):
        train(places, tmp_path / "on", state=half.outputs["state"])


def test_a_state_is_kept_even_if_the_process_dies_right_before(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "keep", dies)
        with pytest.raises(KeyboardInterrupt):
            train(places, tmp_path, state_after=2)
    resumed, _ = train(places, tmp_path, state_after=2)
    assert json.loads((resumed.outputs["state"] / "state.json").read_text())["state"]["step"] == 2


def test_a_full_disk_under_the_final_model_is_told_and_the_same_call_finishes(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    whole, _ = train(places, tmp_path / "whole", lora=LORA)
    with monkeypatch.context() as patch:

        def refused(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(pretrained, "save", refused)
        with pytest.raises(PunaError, match="no room to write this") as error:
            train(places, tmp_path / "run", lora=LORA)
    assert "model" in str(error.value.where) and "bytes are free" in str(error.value)
    assert "checkpoint-00000004: the same command goes on" in str(error.value)
    finished, _ = train(places, tmp_path / "run", lora=LORA)
    assert all(torch.equal(tensor, weights(finished)[name]) for name, tensor in weights(whole).items())
