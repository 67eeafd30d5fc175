"""Sharded and replicated training over gloo: equal weights, counted collectives, planned bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from little_checkpoints import stored

from puna.core.errors import PunaError
from puna.core.stage import Cost
from puna.model.spec import LlamaSpec
from puna.run.devices import profile
from puna.run.planner import Shapes
from puna.run.planner import plan as predict
from puna.run.shapes import known
from puna.train import plan
from puna.train.metrics import read_metrics
from puna.train.sharded_plan import shard_bytes, sharded_memory
from puna.train.stages import Train
from puna.train.train_plan import plan_train

HERE = Path(__file__).parent
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
METHODS = {"full": plan.Method(), "lora": plan.Method(3, 0.0, ALL, ("embed_tokens", "norm"))}
END = Path("checkpoints") / "checkpoint-00000020"


def processes(scenario: str, config: dict[str, Any], out: Path, *sizes: int) -> Path:
    environment = {**os.environ, "PYTHONPATH": f"{HERE}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, str(HERE / "little_processes.py"), scenario, repr(config), str(out)]
    subprocess.run([*command, *map(str, sizes)], env=environment | {"OMP_NUM_THREADS": "1"}, check=True)
    return out


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    names = [name for name in expected if name.startswith("weights/")]
    assert names and names == [name for name in expected if name in found and name.startswith("weights/")]
    for name in names:
        assert (found[name] - expected[name]).abs().max() < 1e-5, name


def test_one_two_and_four_processes_agree_and_go_on_from_each_other(
    tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    """20 steps, uneven shares of rows and of weights; two processes' half-way goes on with one and four."""
    processes("agree", tiny_config, tmp_path, 2, 1, 4)
    for method in METHODS:
        alone = stored(tmp_path / "1" / f"none-{method}" / END)
        lines = read_metrics(tmp_path / "1" / f"none-{method}" / "metrics.jsonl")
        assert lines[-2]["loss"] < lines[1]["loss"]
        for name in (f"none-{method}", f"full-{method}"):
            for size, folder in ((2, name), (4, name), (4, f"{name}-resumed"), (1, f"{name}-resumed")):
                assert_close(stored(tmp_path / str(size) / folder / END), alone)
                last = read_metrics(tmp_path / str(size) / folder / "metrics.jsonl")[-1]
                for figure in ("nl.loss", "nl.bits_per_byte"):
                    assert last[figure] == pytest.approx(lines[-1][figure], abs=1e-5)


def test_gradients_are_told_once_a_step_and_bytes_are_those_planned(
    tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    """Replicas sum one buffer; shards gather weights for each micro-batch, and scatter gradients once."""
    processes("count", tiny_config, tmp_path, 1, 2, 4)
    spec = LlamaSpec.from_config(tiny_config)
    groups = tiny_config["num_hidden_layers"] + 1  # and the root
    for method in METHODS:
        for dtype in ("float32", "bfloat16"):
            for size in (2, 4):
                told = json.loads((tmp_path / f"none-{method}-{dtype}-{size}-0.json").read_text())
                assert told["collectives"] == {"allreduce": 2}  # gradients; losses
                told = json.loads((tmp_path / f"full-{method}-{dtype}-{size}-0.json").read_text())
                rounds = told["rounds"]
                assert rounds > 1 or size == 4
                assert told["sharded"]
                assert told["collectives"] == {
                    # forward and backward; the root's stay for both
                    "allgather_base": rounds * (2 * (groups - 1) + 1),
                    "reduce_scatter_base": groups,
                    "allreduce": 2,  # losses; the norm
                }
                expected = shard_bytes(spec, METHODS[method], dtype, size)
                assert told["bytes"] == {
                    "weights": expected.weights,
                    "masters": 0,
                    "moments": expected.moments,
                    "gradient": expected.gradient,
                }
                parts = [
                    json.loads((tmp_path / f"full-{method}-{dtype}-{size}-{rank}.json").read_text())["bytes"]
                    for rank in range(size)
                ]
                trained = plan.trained_parameters(spec, METHODS[method])
                assert sum(part["gradient"] for part in parts) == 4 * trained
                assert sum(part["moments"] for part in parts) == 8 * trained
            alone = json.loads((tmp_path / f"none-{method}-{dtype}-1-0.json").read_text())
            assert alone["collectives"] == {}


def test_dropout_goes_on_to_the_bit_with_as_many_processes(
    tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    processes("dropped", tiny_config, tmp_path, 2)
    for sharding in ("none", "full"):
        whole = stored(tmp_path / "2" / sharding / END)
        resumed = stored(tmp_path / "2" / f"{sharding}-resumed" / END)
        assert whole.keys() == resumed.keys() and "cpu/1" in whole
        assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


@pytest.mark.parametrize("method", METHODS)
def test_memory_of_a_process_falls_with_their_number(tiny_config: dict[str, Any], method: str) -> None:
    spec = LlamaSpec.from_config(tiny_config)
    for dtype in ("float32", "bfloat16"):
        parts = [shard_bytes(spec, METHODS[method], dtype, size) for size in (1, 2, 4, 8, 10**6)]
        totals = [part.total for part in parts]
        assert totals == sorted(totals, reverse=True) and len(set(totals)) == len(totals)
        assert parts[1].total >= ceil(parts[0].total / 2)
        trained = plan.trained_parameters(spec, METHODS[method])
        assert parts[0].moments == 8 * trained and parts[0].gradient == 4 * trained
        frozen = spec.parameter_count() + plan.lora_parameters(spec, METHODS[method]) - trained
        assert parts[0].weights == 4 * trained + plan.BYTES[dtype] * frozen
        peaks = [
            sharded_memory(spec, METHODS[method], dtype, 64, size, accumulates=False) for size in (2, 4, 8)
        ]
        assert peaks == sorted(peaks, reverse=True)
        assert peaks[0] - peaks[1] == pytest.approx(parts[1].total - parts[2].total)
        more = sharded_memory(spec, METHODS[method], dtype, 64, 2, accumulates=True)
        assert more - peaks[0] == pytest.approx(4 * trained)


def test_a_plan_ends_where_the_run_is_stopped() -> None:
    spec = known("llama-2-7b")
    assert spec is not None
    shapes = Shapes({"model": spec}, {"corpus": 1e9}, ("model", "corpus"), profile("h100"), "bfloat16")
    whole = plan_train(Train(max_steps=10), shapes)
    assert plan_train(Train(max_steps=10, stop_after=4), shapes) == plan_train(Train(max_steps=4), shapes)
    assert plan_train(Train(max_steps=10, stop_after=20), shapes) == whole
    by_tokens = plan_train(Train(max_tokens=10 * Train().batch_tokens, stop_after=4), shapes)
    assert by_tokens.tokens == pytest.approx(0.4 * whole.tokens)


def test_processes_share_training_out_and_sharding_lowers_what_each_of_them_holds() -> None:
    def planned(processes: int, **settings: Any) -> Cost:
        lengths = {"batch_tokens": 131_072, "micro_batch_tokens": 4096, "max_length": 4096}
        spec = known("llama-2-7b")
        assert spec is not None
        shapes = Shapes(
            {"model": spec},
            {"corpus": 1e9},
            ("model", "corpus"),
            profile("h100"),
            "bfloat16",
            processes=processes,
        )
        return plan_train(Train(max_steps=10, **lengths, **settings), shapes)

    alone, replicas = planned(1, recompute=0), planned(8, recompute=0)
    shards = planned(8, sharding="full")
    assert replicas.seconds == pytest.approx(alone.seconds / 8) == pytest.approx(shards.seconds)
    assert replicas.memory == alone.memory == planned(1, sharding="full", recompute=0).memory
    assert shards.memory < replicas.memory / 2
    # 32 processes do one micro-batch a step: nothing is kept whole in between
    assert planned(16, sharding="full").memory - planned(32, sharding="full").memory > 4 * 6.7e9
    assert any(
        "8 processes" in line for line in predict("chocollama", device="h100", processes=8).assumptions
    )
    with pytest.raises(PunaError, match="at least one process"):
        predict("chocollama", device="h100", processes=0)
