"""The loop: exact token means, evaluation that changes nothing, honest failures, metrics."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from little_rows import MIXED, Replaced, rows
from torch.nn import functional

from puna.core.errors import PunaError
from puna.model.adapters import LoraSettings, add_lora
from puna.text.packing import collate
from puna.train.distributed import World
from puna.train.held_out import HeldOut, HeldOutCorpus
from puna.train.loop import Loop
from puna.train.metrics import MetricsLog, read_metrics
from puna.train.optimizer import OptimizerSettings
from puna.train.schedule import factor, preset

MakeLoop = Callable[..., Loop]


def weights(loop: Loop) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in loop.model.named_parameters()}


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(out / "metrics.jsonl") if line["kind"] == "train"]


def test_eight_rows_at_once_equal_eight_passes_of_one(make_loop: MakeLoop, tmp_path: Path) -> None:
    """Rows of very different target counts: a mean of means would be far off."""
    packed = rows([32] * 8, share=0.4)
    found = []
    for name, micro in (("1x8", 256), ("8x1", 32)):
        loop = make_loop(
            tmp_path / name, packed=packed, batch_tokens=256, micro_batch_tokens=micro, total_steps=3
        )
        loop.run()
        moments = {key: value.clone() for key, value in loop.optimizer.moments().items()}
        found.append((losses(tmp_path / name), moments, weights(loop)))
    (whole_losses, whole_moments, whole), (split_losses, split_moments, split) = found
    assert len(whole_losses) == 3
    assert split_losses == pytest.approx(whole_losses, abs=1e-6)
    for name, tensor in whole_moments.items():  # averages of gradients
        assert (tensor - split_moments[name]).abs().max() < 1e-6, name
    for name, tensor in whole.items():  # AdamW divides by the gradient's size, which magnifies rounding
        assert (tensor - split[name]).abs().max() < 1e-5, name


def test_loss_is_the_mean_over_the_targets_of_the_whole_step(make_loop: MakeLoop, tmp_path: Path) -> None:
    packed = rows(MIXED, share=0.5)
    loop = make_loop(tmp_path, packed=packed, batch_tokens=10_000, micro_batch_tokens=40, total_steps=1)
    batch = collate(packed)
    logits = loop.model(batch.input_ids, batch.positions, batch.segments)
    expected = functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100)
    loop.run()
    assert losses(tmp_path) == pytest.approx([float(expected.detach())], rel=1e-6)
    assert loop.state.tokens == sum(MIXED) and loop.state.targets == batch.targets


def test_a_device_without_float64_gives_the_same_losses(
    make_loop: MakeLoop, tmp_path: Path, without_float64: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    make_loop(tmp_path / "here").run()
    loop = make_loop(tmp_path / "there")
    real = loop.objective
    loop.objective = Replaced(
        lambda *given: dataclasses.replace(real(*given), total=without_float64(real(*given).total))
    )
    loop.run()
    assert losses(tmp_path / "there") == losses(tmp_path / "here")
    sums = torch.ones(2, dtype=torch.float64)
    assert World(device=torch.device("mps")).total(sums) is sums


def test_packed_rows_give_the_loss_of_separate_documents(make_loop: MakeLoop, tmp_path: Path) -> None:
    found = []
    for mode in ("off", "fit"):
        packed = rows(MIXED, mode=mode, share=0.6)
        loop = make_loop(
            tmp_path / mode, packed=packed, batch_tokens=1000, micro_batch_tokens=128, total_steps=2
        )
        loop.run()
        found.append((losses(tmp_path / mode), weights(loop)))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    for name, tensor in found[0][1].items():
        assert (tensor - found[1][1][name]).abs().max() < 1e-5


def test_the_model_learns_its_rows_by_heart(make_loop: MakeLoop, tmp_path: Path) -> None:
    loop = make_loop(tmp_path, packed=rows([12, 9]), total_steps=60)
    loop.run()
    found = losses(tmp_path)
    assert found[0] > 5.5 and found[-1] < 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluation_in_between_changes_nothing(
    make_loop: MakeLoop, tiny_llama: Callable[..., Any], tmp_path: Path, dtype: torch.dtype
) -> None:
    """With LoRA dropout on, a single draw too many would change every later weight."""

    def nosy(model: Any) -> dict[str, float]:
        assert not model.training and not torch.is_grad_enabled()
        model.train()
        torch.rand(7)
        random.random()
        numpy.random.rand()
        return {"seen": float(model.hidden(torch.arange(5)[None]).sum())}

    found = []
    for name, evaluate in (("with", nosy), ("without", None)):
        model = tiny_llama().to(dtype)
        add_lora(model, LoraSettings(r=2, dropout=0.3), seed=1)
        loop = make_loop(tmp_path / name, model=model, evaluate=evaluate, eval_steps=1)
        loop.run()
        found.append((losses(tmp_path / name), weights(loop)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(tensor, found[1][1][name]) for name, tensor in found[0][1].items())
    lines = read_metrics(tmp_path / "with" / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [0, 1, 2, 3, 4, 5, 6]


def test_evaluation_at_both_ends_without_eval_steps(make_loop: MakeLoop, tmp_path: Path) -> None:
    make_loop(tmp_path, evaluate=lambda model: {"x": 1.0}).run()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [0, 6]


def test_dropout_is_seeded_and_leaves_the_callers_generator_alone(
    make_loop: MakeLoop, tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(len(found))
        before = torch.get_rng_state()
        model = tiny_llama()
        add_lora(model, LoraSettings(r=2, dropout=0.5), seed=1)
        loop = make_loop(tmp_path / name, model=model, seed=seed)
        loop.run()
        assert torch.equal(before, torch.get_rng_state())
        found.append(losses(tmp_path / name))
    assert found[0] == found[1] != found[2]


def test_held_out_loss_is_the_plain_mean(tiny_llama: Callable[..., Any]) -> None:
    packed = rows(MIXED, mode="wrap")
    model = tiny_llama()
    found = HeldOut({"nl": HeldOutCorpus(packed, 1000)}, 40, World()).measure(model)
    batch = collate(packed)
    with torch.no_grad():
        logits = model(batch.input_ids, batch.positions, batch.segments)
    nats = functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")
    assert found["nl.loss"] == pytest.approx(float(nats) / batch.targets, rel=1e-6)
    assert found["nl.bits_per_byte"] == pytest.approx(float(nats) / numpy.log(2) / 1000, rel=1e-6)


@pytest.mark.parametrize("spoilt", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_with_step_and_rows(
    make_loop: MakeLoop, tmp_path: Path, spoilt: str
) -> None:
    loop = make_loop(tmp_path, batch_tokens=32, micro_batch_tokens=32, save_steps=1)
    plain = loop.objective
    third = loop.feed.steps(0)[2]
    calls = 0

    def objective(model: Any, micro: Any) -> Any:
        nonlocal calls
        calls += loop.state.step == 2
        loss = plain(model, micro)
        if loop.state.step < 2:
            return loss
        if spoilt == "gradient":
            loss.total.register_hook(lambda gradient: gradient * float("nan"))
            return loss
        return dataclasses.replace(loss, total=loss.total * float("nan"))

    loop.objective = Replaced(objective)
    with pytest.raises(PunaError, match=f"{spoilt} is not finite") as error:
        loop.run()
    assert "step 3" in str(error.value) and calls > 0
    named = {loop.feed.rows[int(row)].slices[0].document.source for row in third.rows}
    assert any(name in str(error.value) for name in named)
    assert all(parameter.isfinite().all() for parameter in loop.model.parameters())
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir())[-1] == "checkpoint-00000002"


def test_metrics_hold_every_logged_step_and_follow_the_schedule(make_loop: MakeLoop, tmp_path: Path) -> None:
    schedule = preset("linear", 7, warmup_steps=2)
    loop = make_loop(tmp_path, total_steps=7, logging_steps=3, schedule=schedule)
    loop.run()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [3, 6, 7]
    assert [line["learning_rate"] for line in lines] == pytest.approx(
        [3e-3 * factor(step - 1, schedule) for step in (3, 6, 7)]
    )
    assert lines[-1]["tokens"] == loop.state.tokens
    assert lines[-1]["seconds"] == loop.state.seconds
    for line in lines:
        assert line["tokens_per_second"] > line["targets_per_second"] > 0
        assert line["grad_norm"] > 0 and line["peak_memory"] > 1e7
    every = tmp_path / "every"
    make_loop(every, total_steps=7, schedule=schedule).run()
    detailed = read_metrics(every / "metrics.jsonl")
    counts = numpy.diff([0, *(line["targets"] for line in detailed)])
    mean = sum(line["loss"] * n for line, n in zip(detailed[:3], counts, strict=False)) / counts[:3].sum()
    assert lines[0]["loss"] == pytest.approx(mean)


def test_metrics_beyond_the_checkpoint_and_a_torn_line_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, after_step=0)
    for step in (1, 2, 3):
        log.write(step, "train", {"loss": step / 3})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 4, "kind": "tr')
    log = MetricsLog(path, after_step=2)
    log.write(3, "train", {"loss": 7.0})
    log.close()
    lines = read_metrics(path)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["loss"] for line in lines] == [1 / 3, 2 / 3, 7.0]


def test_a_broken_line_in_the_middle_is_an_error_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(PunaError, match=r"metrics.jsonl:2"):
        read_metrics(path)


def test_tensorboard_gets_the_same_figures(make_loop: MakeLoop, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    make_loop(tmp_path, tensorboard=True).run()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    logged = [event.value for event in events.Scalars("train/loss")]
    assert logged == pytest.approx(losses(tmp_path), rel=1e-6)


def test_clipping_and_frozen_weights_reach_the_loop(
    make_loop: MakeLoop, tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny_llama()
    add_lora(model, LoraSettings(r=2), seed=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    make_loop(tmp_path, model=model, optimizer=OptimizerSettings(1e-2, max_grad_norm=1e-4)).run()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (".lora_" not in name), name
