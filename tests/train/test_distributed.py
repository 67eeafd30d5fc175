"""One, two and three processes: the same losses and weights, with uneven shares."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from little_checkpoints import stored

from puna.core.errors import PunaError
from puna.train.distributed import World, world
from puna.train.metrics import read_metrics

# Started once for each process, as torchrun would: RANK, WORLD_SIZE, MASTER_* are in the environment.
SCRIPT = """
    import sys
    from pathlib import Path
    from little_rows import MIXED, rows
    from puna.core.seeds import torch_generator
    from puna.model.llama import Llama
    from puna.model.spec import LlamaSpec
    from puna.train.distributed import world
    from puna.train.held_out import HeldOut, HeldOutCorpus
    from puna.train.loader import Feed
    from puna.train.loop import Loop, LoopSettings
    from puna.train.objectives import CrossEntropy
    from puna.train.optimizer import Optimizer, OptimizerSettings
    from puna.train.schedule import preset

    with world() as here:
        model = Llama(LlamaSpec.from_config(eval(sys.argv[1])), generator=torch_generator(0, "tiny"))
        feed = Feed(rows(MIXED, share=0.4), batch_tokens=64, micro_batch_tokens=40, seed=1,
                    rank=here.rank, size=here.size)
        steps, tokens = feed.count(epochs=2)
        shares = [sum(len(m.rows) for m in feed.micro_batches(step)) for step in feed.steps(0)]
        rows_of = [len(step.rows) for step in feed.steps(0)]
        assert here.size == 1 or any(here.size * own != whole for own, whole in zip(shares, rows_of)), "even"
        settings = LoopSettings(steps, tokens, preset("cosine", steps), eval_steps=4, save_steps=3)
        held_out = HeldOut({"nl": HeldOutCorpus(rows([9, 20, 31, 6, 14], mode="wrap"), 100)}, 32, here)
        optimizer = Optimizer(model.named_parameters(), OptimizerSettings(3e-3))
        loop = Loop(model, feed, CrossEntropy(), optimizer, settings,
                    out=Path(sys.argv[2]), recipe={}, world=here,
                    evaluate=held_out.measure)
        loop.run()
"""


def start(config: dict[str, Any], out: Path, size: int, port: int) -> None:
    processes = []
    for rank in range(size):
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parent),
            "OMP_NUM_THREADS": "1",
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        command = [sys.executable, "-c", textwrap.dedent(SCRIPT), repr(config), str(out)]
        processes.append(subprocess.Popen(command, env=environment))
    assert [process.wait(timeout=100) for process in processes] == [0] * size


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_one_two_and_three_processes_agree(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    for size in (1, 2, 3):
        start(tiny_config, tmp_path / str(size), size, free_port())
    alone = read_metrics(tmp_path / "1" / "metrics.jsonl")
    end = sorted((tmp_path / "1" / "checkpoints").iterdir())[-1]
    weights = stored(end)
    for size in (2, 3):
        lines = read_metrics(tmp_path / str(size) / "metrics.jsonl")
        assert [(line["step"], line["kind"], line["tokens"]) for line in lines] == [
            (line["step"], line["kind"], line["tokens"]) for line in alone
        ]
        for line, reference in zip(lines, alone, strict=True):
            for key in ("loss", "grad_norm", "nl.loss", "nl.bits_per_byte"):
                assert line.get(key) == pytest.approx(reference.get(key), abs=1e-5)
        folder = tmp_path / str(size) / "checkpoints" / end.name
        found = stored(folder)
        for name, tensor in weights.items():
            if name.startswith("weights/"):
                assert (tensor - found[name]).abs().max() < 1e-5, name
        assert [name for name in sorted(found) if name.startswith("cpu/")] == [
            f"cpu/{rank}" for rank in range(size)
        ]


def test_a_single_process_needs_no_group() -> None:
    with world() as here:
        assert here == World() and here.is_main
        tensor = torch.ones(2)
        assert here.sum_(tensor) is tensor and here.gather(tensor) == [tensor]
        here.wait()


def test_more_processes_than_gpus_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "99")
    with pytest.raises(PunaError, match="more processes than GPUs"), world("cuda"):
        pytest.fail("the group was joined")
