"""A model that learns to end behind several layers: what it learns, and what is measured of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from little_trainings import SMALL, steps, train, weights
from torch.nn import functional

from puna.core.errors import PunaError
from puna.core.seeds import torch_generator
from puna.core.stage import validate
from puna.edit.shorten import shorten
from puna.model.llama import Llama
from puna.model.spec import BlockSpec, LlamaSpec
from puna.text import pretrained
from puna.text.packing import IGNORED, Batch
from puna.train.loader import MicroBatch
from puna.train.nested_exits import CrossEntropyAtExits, NestedCrossEntropy
from puna.train.objectives import CrossEntropy
from puna.train.plan import Method, exit_operations, memory
from puna.train.stages import Train

BLOCK = BlockSpec(heads=4, kv_heads=2, head_dim=8, width=48)
SPEC = LlamaSpec(120, 32, (BLOCK,) * 5, tied=True)


def batch(seed: int = 0) -> MicroBatch:
    generator = torch_generator(seed, "exits")
    ids = torch.randint(0, 120, (2, 12), generator=generator)
    labels = ids.roll(-1, 1)
    labels[:, -1] = IGNORED
    labels[0, :4] = IGNORED
    segments = torch.zeros_like(ids)
    positions = torch.arange(12).expand(2, 12).contiguous()
    return MicroBatch(Batch(ids, labels, positions, segments), numpy.array([0, 1]))


def model_of(seed: int = 0) -> Llama:
    return Llama(SPEC, generator=torch_generator(seed, "exits", "weights"))


def plain_loss(short: Llama, micro: MicroBatch) -> torch.Tensor:
    logits = short(micro.batch.input_ids, micro.batch.positions, micro.batch.segments)
    return functional.cross_entropy(
        logits.flatten(0, 1), micro.batch.labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def test_states_at_a_depth_are_those_of_the_checkpoint_that_ends_there_to_the_bit() -> None:
    model, ids = model_of(), batch().batch.input_ids
    for depth, states in zip((1, 3, 5), model.hidden_at((1, 3, 5), ids), strict=True):
        assert torch.equal(states, shorten(model, range(depth)).hidden(ids))


def test_loss_and_gradients_are_the_mean_over_the_nested_checkpoints() -> None:
    micro, model = batch(), model_of()
    loss = NestedCrossEntropy((1, 3))(model, micro)
    loss.total.backward()
    expected: dict[str, float] = {}
    gradients: dict[str, torch.Tensor] = {}
    for name, depth in {"exit_1": 1, "exit_3": 3, "exit_last": 5}.items():
        short = shorten(model_of(), range(depth))
        of_depth = plain_loss(short, micro)
        of_depth.backward()
        expected[name] = of_depth.item()
        for parameter, tensor in short.named_parameters():
            assert tensor.grad is not None
            gradients[parameter] = gradients.get(parameter, torch.zeros(())) + tensor.grad / 3
    assert loss.total.item() == pytest.approx(sum(expected.values()) / 3, rel=1e-6)
    assert {name: value.item() for name, value in loss.figures.items()} == pytest.approx(expected, rel=1e-6)
    for parameter, tensor in model.named_parameters():
        torch.testing.assert_close(tensor.grad, gradients[parameter], rtol=1e-4, atol=1e-5)


def test_held_out_text_is_measured_by_the_whole_model_and_at_each_exit() -> None:
    micro, model = batch(), model_of()
    found, whole = CrossEntropyAtExits((2,))(model, micro), CrossEntropy()(model, micro)
    assert found.total.item() == pytest.approx(whole.total.item(), rel=1e-6)
    assert torch.allclose(found.tokens, whole.tokens, atol=1e-6)
    short = plain_loss(shorten(model, range(2)), micro)
    assert found.figures["exit_2"].item() == pytest.approx(short.item(), rel=1e-6)


def test_the_stage_logs_every_exit_and_learns_at_each(places: dict[str, Path], tmp_path: Path) -> None:
    outcome, _ = train(places, tmp_path / "run", held_out=True, exits=[1], max_steps=12)
    lines = steps(tmp_path / "run")
    for line in lines:
        assert line["loss"] == pytest.approx((line["exit_1"] + line["exit_last"]) / 2, rel=1e-5)
    assert lines[-1]["exit_1"] < lines[0]["exit_1"] - 0.3
    assert lines[-1]["exit_last"] < lines[0]["exit_last"] - 0.3
    written = pretrained.load(outcome.outputs["model"], dtype="float32")
    assert len(written.spec.blocks) == 2
    figures = outcome.metrics
    assert figures["after.en.exit_1"] < math.log(320) - 0.3


def test_without_exits_a_run_is_the_same_to_the_bit(places: dict[str, Path], tmp_path: Path) -> None:
    plain, _ = train(places, tmp_path / "plain")
    empty, _ = train(places, tmp_path / "empty", exits=[])
    for name, tensor in weights(plain).items():
        assert torch.equal(tensor, weights(empty)[name]), name


def test_exits_that_are_only_measured_change_no_bit(places: dict[str, Path], tmp_path: Path) -> None:
    plain, _ = train(places, tmp_path / "plain", held_out=True)
    measured, _ = train(places, tmp_path / "measured", held_out=True, exits=[1], exit_loss="measured")
    for name, tensor in weights(plain).items():
        assert torch.equal(tensor, weights(measured)[name]), name
    short = shorten(pretrained.load(measured.outputs["model"], dtype="float32"), [0])
    pretrained.save(short, tmp_path / "short")
    again, _ = train({**places, "model": tmp_path / "short"}, tmp_path / "again", held_out=True, max_steps=1)
    assert measured.metrics["after.en.exit_1"] == pytest.approx(again.metrics["before.en.loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"exits": [2, 1]}, "rise from 1"),
        ({"exits": [0]}, "rise from 1"),
        ({"exit_loss": "measured"}, "means nothing without exits"),
        ({"exits": [1], "objective": "dpo"}, "exits means nothing with objective 'dpo'"),
        ({"exits": [1], "sharding": "full"}, "sharding 'full'"),
    ],
)
def test_exits_that_cannot_be_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(PunaError) as error:
        validate(Train, {**SMALL, **given}, where="test")
    assert words in str(error.value)


def test_an_exit_behind_the_last_layer_is_refused(places: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(PunaError, match="below the last"):
        train(places, tmp_path, exits=[2])


def test_the_plan_counts_the_head_at_every_exit() -> None:
    method, lora = Method(), Method(r=4, target=("q_proj",))
    head = SPEC.vocab_size * SPEC.hidden_size
    assert exit_operations(SPEC, method) == 6 * head
    assert exit_operations(SPEC, lora) == 4 * head
    assert memory(SPEC, method, "float32", 64, exits=2) > memory(SPEC, method, "float32", 64)
