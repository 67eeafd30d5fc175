"""Every option of the stage ``train`` by what it changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from little_trainings import LORA, TIMED, train, weights
from test_distilling import FLIPS as OF_DISTILLING

from puna.core.stage import Outcome
from puna.text import pretrained
from puna.train.metrics import read_metrics
from puna.train.settings import Lora
from puna.train.stages import Train


def seen(outcome: Outcome, out: Path) -> dict[str, Any]:
    """All that can be observed of a run, apart from times."""
    lines = read_metrics(out / "metrics.jsonl")
    model = {
        name: (str(tensor.dtype), float(tensor.double().sum())) for name, tensor in weights(outcome).items()
    }
    return {
        "lines": [{key: value for key, value in line.items() if key not in TIMED} for line in lines],
        "model": model,
        "outputs": sorted(outcome.outputs),
        "files": sorted(str(path.relative_to(out)).partition("events")[0] for path in out.rglob("*")),
    }


# What to change, and what must be set besides for it to mean something.
PAIRS: dict[str, Any] = {"max_length": 96, "batch_tokens": 192, "micro_batch_tokens": 192}
FLIPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "objective": ({}, {"objective": "sft"}),
    "beta": ({**PAIRS, "objective": "dpo"}, {"beta": 0.5}),
    "label_smoothing": ({**PAIRS, "objective": "dpo"}, {"label_smoothing": 0.2}),
    "target_margin": ({**PAIRS, "objective": "simpo"}, {"target_margin": 0.0}),
    "likelihood_weight": ({**PAIRS, "objective": "cpo"}, {"likelihood_weight": 0.0}),
    "epochs": ({"max_steps": ..., "epochs": 1}, {"epochs": 2}),
    "max_steps": ({}, {"max_steps": 3}),
    "max_tokens": ({"max_steps": ..., "max_tokens": 100}, {"max_tokens": 200}),
    "batch_tokens": ({}, {"batch_tokens": 96}),
    "max_length": ({}, {"max_length": 24}),
    "exits": ({}, {"exits": [1]}),
    "exit_loss": ({"exits": [1]}, {"exit_loss": "measured"}),
    "children": ({}, {"children": {"layers": [1, 2]}}),
    "child_steps": ({"children": {"layers": [1, 2]}}, {"child_steps": 2}),
    "packing": ({}, {"packing": "fit"}),
    "mixture": ({}, {"mixture": {"caps": {"main": {"rows": 9}}}}),
    "order": ({}, {"order": "sorted"}),
    "sort_by": ({"order": "sorted"}, {"sort_by": "loss"}),
    "descending": ({"order": "sorted"}, {"descending": True}),
    "last_turn_only": ({"objective": "sft", "train_on": ["user", "assistant"]}, {"last_turn_only": True}),
    "train_on": ({"objective": "sft"}, {"train_on": ["user"]}),
    "learning_rate": ({}, {"learning_rate": 2e-2}),
    "embedding_learning_rate_factor": ({}, {"embedding_learning_rate_factor": 0.1}),
    "schedule": ({}, {"schedule": "linear"}),
    "warmup_ratio": ({}, {"warmup_ratio": 0.5}),
    "warmup_steps": ({}, {"warmup_steps": 2}),
    "min_learning_rate_ratio": ({}, {"min_learning_rate_ratio": 0.5}),
    "timescale": ({"schedule": "inverse_sqrt"}, {"timescale": 2}),
    "step_size": ({"schedule": "step"}, {"step_size": 2}),
    "gamma": ({"schedule": "step", "step_size": 1}, {"gamma": 0.9}),
    "decay_ratio": ({"schedule": "wsd"}, {"decay_ratio": 0.9}),
    "weight_decay": ({}, {"weight_decay": 0.5}),
    "betas": ({}, {"betas": [0.5, 0.9]}),
    "max_grad_norm": ({}, {"max_grad_norm": 1e-3, "betas": [0.0, 0.0]}),
    "mup": ({}, {"mup": {"base_width": 8}}),
    "lora": ({}, {"lora": LORA}),
    "frozen": ({}, {"frozen": ["lm_head"]}),
    "adapter": ({}, {"adapter": {"prompt_length": 2}}),
    "model_steps": ({}, {"model_steps": 2}),
    "adapter_steps": ({"lora": LORA}, {"adapter_steps": 2}),
    "dtype": ({}, {"dtype": "bfloat16"}),
    "seed": ({}, {"seed": 1}),
    "logging_steps": ({}, {"logging_steps": 2}),
    "eval_steps": ({"held_out": True}, {"eval_steps": 1}),
    "eval_tokens": ({"held_out": True}, {"eval_tokens": 10}),
    "watched_layers": ({"held_out": True}, {"watched_layers": 1}),
    "stop_after": ({}, {"stop_after": 3}),
    "state_after": ({}, {"state_after": "end"}),
    "report_to": ({}, {"report_to": "tensorboard"}),
    "save_adapter": ({"lora": LORA}, {"save_adapter": False}),
    "save_dtype": ({}, {"save_dtype": "bfloat16"}),
}
LORA_FLIPS: dict[str, Any] = {
    "r": 3,
    "alpha": 4.0,
    "dropout": 0.5,
    "target": ["q_proj"],
    "rslora": True,
    "full": ["embed_tokens"],
    "dora": True,
    "base": "nf4",
}
_SEEN_ELSEWHERE = {
    "micro_batch_tokens": "test_micro_batch_tokens_bound_a_forward_pass",
    "markers": "test_markers_in_documents_are_tokens",
    "save_steps": "test_save_steps_make_checkpoints",
    "twins": "test_twins_alone_are_trained",
    "keep_zeros": "test_weights_that_were_pruned_to_zero_stay_so_if_asked",
    "restore": "test_a_state_handed_on_gives_what_the_whole_run_gives_and_its_weights_alone_do_not",
    "sharding": "test_a_process_alone_shares_nothing_out",
    "recompute": "test_recomputed_layers_change_no_bit_of_a_training",
}


def test_no_option_is_left_out_of_these_tests() -> None:
    assert set(FLIPS) | set(_SEEN_ELSEWHERE) | set(OF_DISTILLING) == set(Train.model_fields)
    assert set(LORA_FLIPS) == set(Lora.model_fields)
    tests = "".join(file.read_text() for file in Path(__file__).parent.glob("test_train_*.py"))
    assert all(f"def {name}(" in tests for name in _SEEN_ELSEWHERE.values())


@pytest.mark.parametrize("name", FLIPS)
def test_flipping_an_option_changes_something(places: dict[str, Path], tmp_path: Path, name: str) -> None:
    if name == "report_to":
        pytest.importorskip("tensorboard")
    besides, flip = FLIPS[name]
    if name == "max_grad_norm":  # AdamW forgives a constant factor unless its averages are off
        besides = {"betas": [0.0, 0.0]}
    before = seen(train(places, tmp_path / "before", **besides)[0], tmp_path / "before")
    after = seen(train(places, tmp_path / "after", **{**besides, **flip})[0], tmp_path / "after")
    assert before != after


@pytest.mark.parametrize("name", LORA_FLIPS)
def test_flipping_an_option_of_lora_changes_the_model(
    places: dict[str, Path], tmp_path: Path, name: str
) -> None:
    before = weights(train(places, tmp_path / "before", lora=LORA)[0])
    after = weights(train(places, tmp_path / "after", lora={**LORA, name: LORA_FLIPS[name]})[0])
    assert any(not torch.equal(tensor, after[key]) for key, tensor in before.items())


def test_micro_batch_tokens_bound_a_forward_pass(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from puna.model.llama import Llama

    plain = Llama.hidden
    shapes: list[tuple[int, ...]] = []

    def noted(self: Llama, input_ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        shapes.append(tuple(input_ids.shape))
        return plain(self, input_ids, *rest)

    monkeypatch.setattr(Llama, "hidden", noted)
    train(places, tmp_path / "64")
    assert max(rows * width for rows, width in shapes) == 64
    shapes.clear()
    train(places, tmp_path / "32", micro_batch_tokens=32)
    assert max(rows * width for rows, width in shapes) == 32


@pytest.mark.parametrize("lora", [None, LORA])
def test_weights_that_were_pruned_to_zero_stay_so_if_asked(
    places: dict[str, Path], tmp_path: Path, lora: dict[str, Any] | None
) -> None:
    model = pretrained.load(places["model"])
    name = "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        model.get_parameter(name)[::2] = 0
    pretrained.save(model, tmp_path / "pruned")
    given = {**places, "model": tmp_path / "pruned"}
    free = weights(train(given, tmp_path / "free", lora=lora)[0])[name]
    held = weights(train(given, tmp_path / "held", lora=lora, keep_zeros=True, weight_decay=0.1)[0])[name]
    assert free[::2].any() and not held[::2].any() and held[1::2].any()


def test_a_process_alone_shares_nothing_out(places: dict[str, Path], tmp_path: Path) -> None:
    """What it does with several processes: test_sharding.py, test_elastic.py."""
    alone, shared = (weights(train(places, tmp_path / way, sharding=way)[0]) for way in ("none", "full"))
    assert all(torch.equal(tensor, shared[name]) for name, tensor in alone.items())
