"""Exact resume: 2N steps equal N, a SIGKILL, and N more, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from little_checkpoints import stored
from little_rows import Replaced

from puna.core.errors import PunaError
from puna.core.files import fingerprint
from puna.train.loop import Loop
from puna.train.metrics import read_metrics

MakeLoop = Callable[..., Loop]
SHARD = "shard-00001-model-00001-of-00001.safetensors"
TIMES = {"seconds", "tokens_per_second", "targets_per_second", "peak_memory"}

# Trains the tiny model with LoRA and dropout in an own process; dies by SIGKILL after step argv[3].
SCRIPT = """
    import os, signal, sys
    from pathlib import Path
    import torch
    from little_rows import MIXED, rows
    from puna.core.seeds import torch_generator
    from puna.model.adapters import LoraSettings, add_lora
    from puna.model.llama import Llama
    from puna.model.spec import LlamaSpec
    from puna.train.loader import Feed
    from puna.train.loop import Loop, LoopSettings
    from puna.train.objectives import CrossEntropy
    from puna.train.optimizer import Optimizer, OptimizerSettings
    from puna.train.schedule import preset

    config, out, kill_after, dtype = eval(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.manual_seed(os.getpid())  # whatever the process started with must not matter
    model = Llama(LlamaSpec.from_config(config), generator=torch_generator(0, "tiny"))
    model.to(getattr(torch, dtype))
    add_lora(model, LoraSettings(r=4, dropout=0.3, full=("embed_tokens",)), seed=1)
    feed = Feed(rows(MIXED, share=0.7), batch_tokens=64, micro_batch_tokens=32, seed=1)
    steps, tokens = feed.count(max_steps=12)
    schedule = preset("cosine", steps, warmup_steps=3)
    settings = LoopSettings(steps, tokens, schedule, seed=5, logging_steps=2, eval_steps=3, save_steps=3)

    def evaluate(model):
        if loop.state.step == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"sum": float(model.hidden(torch.arange(5)[None]).sum())}

    optimizer = Optimizer(model.named_parameters(), OptimizerSettings(1e-2, weight_decay=0.1))
    loop = Loop(model, feed, CrossEntropy(), optimizer, settings,
                out=out, recipe={"lr": 1e-2}, evaluate=evaluate)
    loop.run()
"""


def train(config: dict[str, Any], out: Path, kill_after: int, dtype: str) -> int:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), repr(config), str(out), str(kill_after), dtype]
    return subprocess.run(command, env=environment, timeout=100, check=False).returncode


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_killed_and_resumed_equals_uninterrupted(
    tiny_config: dict[str, Any], tmp_path: Path, dtype: str
) -> None:
    """Killed at step 9, after its line but before its checkpoint: the run goes on from step 6.

    Twelve steps are three epochs, and lines come every second step, so data position, epoch and
    half a window of metrics have to come back as well.
    """
    assert train(tiny_config, tmp_path / "whole", -1, dtype) == 0
    assert train(tiny_config, tmp_path / "killed", 9, dtype) == -signal.SIGKILL
    newest = sorted((tmp_path / "killed" / "checkpoints").iterdir())[-1]
    assert newest.name == "checkpoint-00000006"
    assert read_metrics(tmp_path / "killed" / "metrics.jsonl")[-1]["step"] == 8
    assert train(tiny_config, tmp_path / "killed", -1, dtype) == 0
    ends = [tmp_path / name / "checkpoints" / "checkpoint-00000012" for name in ("whole", "killed")]
    whole, resumed = (stored(end) for end in ends)
    assert whole.keys() == resumed.keys()
    assert {name.partition("/")[0] for name in whole} == {"weights", "first", "second", "cpu"}
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
    states = [json.loads((end / "state.json").read_text())["state"] for end in ends]
    for state in states:
        assert state.pop("seconds") > 0
    assert states[0] == states[1] and states[0]["epoch"] >= 2
    lines = [
        [{key: value for key, value in line.items() if key not in TIMES} for line in read_metrics(folder)]
        for folder in (tmp_path / "whole" / "metrics.jsonl", tmp_path / "killed" / "metrics.jsonl")
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 6 + 5


def stopped_at(make_loop: MakeLoop, out: Path, step: int, **settings: Any) -> None:
    """Run a loop that an error ends during step ``step`` + 1."""
    loop = make_loop(out, **settings)
    plain = loop.objective

    def objective(*inputs: Any) -> Any:
        if loop.state.step == step:
            raise KeyboardInterrupt
        return plain(*inputs)

    loop.objective = Replaced(objective)
    with pytest.raises(KeyboardInterrupt):
        loop.run()


def final(loop: Loop) -> dict[str, torch.Tensor]:
    loop.run()
    return loop.optimizer.weights()


def test_two_checkpoints_are_kept(make_loop: MakeLoop, tmp_path: Path) -> None:
    make_loop(tmp_path, total_steps=7, save_steps=2).run()
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["checkpoint-00000006", "checkpoint-00000007"]


def test_without_save_steps_the_clock_decides(make_loop: MakeLoop, tmp_path: Path) -> None:
    make_loop(tmp_path / "rarely").run()
    assert [p.name for p in (tmp_path / "rarely" / "checkpoints").iterdir()] == ["checkpoint-00000006"]
    stopped_at(make_loop, tmp_path / "always", 4, save_seconds=0.0)
    names = sorted(path.name for path in (tmp_path / "always" / "checkpoints").iterdir())
    assert names == ["checkpoint-00000003", "checkpoint-00000004"]


def test_a_finished_run_only_reads_its_result(make_loop: MakeLoop, tmp_path: Path) -> None:
    first = final(make_loop(tmp_path))
    loop = make_loop(tmp_path)
    loop.objective = Replaced(lambda *inputs: pytest.fail("a finished run was trained on"))
    second = final(loop)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert loop.state.step == 6


@pytest.mark.parametrize(
    ("file", "spoil"),
    [
        (SHARD, "cut"),
        (SHARD, "flip"),
        ("generators.safetensors", "remove"),
        ("state.json", "cut"),
        ("state.json", "flip"),
    ],
)
def test_a_broken_newest_checkpoint_is_named_and_the_one_before_used(
    make_loop: MakeLoop, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, spoil: str
) -> None:
    expected = final(make_loop(tmp_path / "whole", save_steps=2))
    stopped_at(make_loop, tmp_path / "run", 5, save_steps=2)
    path = tmp_path / "run" / "checkpoints" / "checkpoint-00000004" / file
    content = bytearray(path.read_bytes())
    if spoil == "remove":
        path.unlink()
    elif spoil == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[-20] ^= 1
        path.write_bytes(content)
    found = final(make_loop(tmp_path / "run", save_steps=2))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    told = "".join(capsys.readouterr().err.split())
    assert "checkpoint-00000004" in told and file in told


def test_a_half_written_folder_is_not_taken_for_a_checkpoint(make_loop: MakeLoop, tmp_path: Path) -> None:
    expected = final(make_loop(tmp_path / "whole", save_steps=2))
    stopped_at(make_loop, tmp_path / "run", 3, save_steps=2)
    folder = tmp_path / "run" / "checkpoints"
    (folder / ".checkpoint-00000004.0badcafe.part").mkdir()
    found = final(make_loop(tmp_path / "run", save_steps=2))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_only_broken_checkpoints_are_an_error_not_a_fresh_start(make_loop: MakeLoop, tmp_path: Path) -> None:
    stopped_at(make_loop, tmp_path, 3, save_steps=1)
    for path in (tmp_path / "checkpoints").rglob("state.json"):
        path.write_text("{")
    with pytest.raises(PunaError, match="every checkpoint is broken"):
        make_loop(tmp_path).run()


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"learning_rate": 2e-3}, "learning_rate"),
        ({"learning_rate": 1e-3, "new": [1]}, "new"),
        ({}, "learning_rate"),
    ],
)
def test_a_changed_recipe_is_refused_by_key(
    make_loop: MakeLoop, tmp_path: Path, changed: dict[str, Any], key: str
) -> None:
    recipe = {"learning_rate": 1e-3}
    stopped_at(make_loop, tmp_path, 3, save_steps=2, recipe=recipe)
    with pytest.raises(PunaError, match=f"{key!r} has changed") as error:
        make_loop(tmp_path, recipe=changed).run()
    assert "checkpoint-00000002" in str(error.value) and "remove" in str(error.value)
    make_loop(tmp_path, recipe={"learning_rate": 0.001}).run()


def test_frozen_weights_are_not_in_a_checkpoint(
    make_loop: MakeLoop, tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    from puna.model.adapters import LoraSettings, add_lora

    model = tiny_llama()
    add_lora(model, LoraSettings(r=2), seed=1)
    make_loop(tmp_path, model=model).run()
    tensors = stored(tmp_path / "checkpoints" / "checkpoint-00000006")
    del tensors["cpu/0"]
    assert tensors and all(
        ".lora_" in name and tensor.dtype == torch.float32 for name, tensor in tensors.items()
    )


def test_no_pickle_is_in_a_checkpoint(make_loop: MakeLoop, tmp_path: Path) -> None:
    make_loop(tmp_path).run()
    files = sorted(path.name for path in (tmp_path / "checkpoints" / "checkpoint-00000006").iterdir())
    assert files == ["generators.safetensors", SHARD, "state.json"]


def test_generators_of_another_number_of_processes_are_derived_anew_and_the_same_each_time(
    make_loop: MakeLoop, tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    from puna.model.adapters import LoraSettings, add_lora

    def adapted(out: Path, **settings: Any) -> Loop:
        model = tiny_llama()
        add_lora(model, LoraSettings(r=2, dropout=0.5), seed=1)
        return make_loop(out, model=model, save_steps=2, **settings)

    uninterrupted = final(adapted(tmp_path / "whole"))
    ends = []
    for processes, out in ((1, "as before"), (4, "first"), (4, "second")):
        stopped_at(adapted, tmp_path / out, 3)
        state = tmp_path / out / "checkpoints" / "checkpoint-00000002" / "state.json"
        content = json.loads(state.read_text())
        assert content["processes"] == 1
        content.pop("seal")
        content["processes"] = processes
        state.write_text(json.dumps({**content, "seal": fingerprint(content)}))
        ends.append(final(adapted(tmp_path / out)))
    for name, tensor in uninterrupted.items():
        assert torch.equal(ends[0][name], tensor)
        assert torch.equal(ends[1][name], ends[2][name])
    assert any(not torch.equal(ends[1][name], tensor) for name, tensor in uninterrupted.items())
