"""Processes of one training, forked from one that has torch loaded: much faster than starting each.

``python little_processes.py SCENARIO CONFIG OUT`` runs a function of this file for 2, 1 and 4 processes.
"""

from __future__ import annotations

import os
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from little_rows import MIXED, rows
from torch.utils._python_dispatch import TorchDispatchMode

from puna.core.files import write_json
from puna.core.seeds import torch_generator
from puna.model.adapters import LoraSettings, add_lora
from puna.model.llama import Llama
from puna.model.spec import LlamaSpec
from puna.train.distributed import World, world
from puna.train.held_out import HeldOut, HeldOutCorpus
from puna.train.loader import Feed
from puna.train.loop import Loop, LoopSettings
from puna.train.objectives import CrossEntropy
from puna.train.optimizer import Optimizer, OptimizerSettings
from puna.train.schedule import preset
from puna.train.sharding import is_shard, local_part, shard

STEPS = 20
HALF = 10
SHARDINGS = ("none", "full")
METHODS = ("full", "lora")


def make_loop(
    config: dict[str, Any],
    out: Path,
    here: World,
    sharding: str,
    method: str,
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.0,
    stop_after: int | None = None,
) -> Loop:
    """A loop of 20 steps over uneven shares; the process ends as if killed after ``stop_after`` steps."""
    model = Llama(LlamaSpec.from_config(config), generator=torch_generator(0, "tiny")).to(dtype)
    if method == "lora":
        add_lora(model, LoraSettings(r=3, dropout=dropout, full=("embed_tokens", "norm")), seed=1)
    if sharding == "full":
        shard(model, here)
    # A row of four tokens in each micro-batch at least: shares of one, two and three micro-batches.
    feed = Feed(
        rows(MIXED, share=0.4),
        batch_tokens=64,
        micro_batch_tokens=40,
        seed=1,
        rank=here.rank,
        size=here.size,
    )
    steps, tokens = feed.count(max_steps=STEPS)
    settings = LoopSettings(steps, tokens, preset("cosine", steps), seed=3, eval_steps=HALF, save_steps=HALF)
    held_out = HeldOut({"nl": HeldOutCorpus(rows([9, 20, 31, 6, 14], mode="wrap"), 100)}, 32, here)

    def evaluate(model: Llama) -> dict[str, float]:
        return held_out.measure(model)

    optimizer = Optimizer(model.named_parameters(), OptimizerSettings(1e-3, weight_decay=0.1))
    return Loop(
        model, feed, CrossEntropy(), optimizer, settings, out=out, recipe={}, world=here, evaluate=evaluate
    )


def agree(here: World, config: dict[str, Any], out: Path) -> None:
    """20 steps of each way; and what two processes had after 10 steps, gone on with by one and four."""
    for method in METHODS:
        for sharding in SHARDINGS:
            name = f"{sharding}-{method}"
            if here.size == 1 and sharding == "full":
                continue  # the stage shares out nothing to one process
            folder = out / str(here.size) / name
            loop = make_loop(config, folder, here, sharding, method)
            shares = [sum(1 for _ in loop.feed.micro_batches(step)) for step in loop.feed.steps(0)]
            rounds = [loop.feed.rounds(step) for step in loop.feed.steps(0)]
            uneven = here.total(torch.tensor(float(shares != rounds), dtype=torch.float64))
            assert here.size == 1 or uneven > 0
            loop.run()
            here.wait()
            if here.size == 2:
                continue
            # Either way of two processes goes on alone; alone there is only one way.
            for before in SHARDINGS if here.size == 1 else (sharding,):
                resumed = folder.with_name(f"{before}-{method}-resumed")
                place = Path("checkpoints") / f"checkpoint-{HALF:08d}"
                if here.is_main:
                    shutil.copytree(out / "2" / f"{before}-{method}" / place, resumed / place)
                here.wait()
                again = make_loop(config, resumed, here, sharding, method)
                again.run()
                assert again.state.step == STEPS


class Counting(TorchDispatchMode):
    """Counts collective operations, and the bytes of those that carry more than a few figures."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.found[func._schema.name.removeprefix("c10d::").strip("_")] += 1
        return func(*args, **(kwargs or {}))


def count(here: World, config: dict[str, Any], out: Path) -> None:
    """Collectives of one step, and the bytes that tensors of the optimiser and the model take."""
    for method in METHODS:
        for sharding in SHARDINGS[: 1 if here.size == 1 else 2]:
            for dtype in (torch.float32, torch.bfloat16):
                loop = make_loop(config, out, here, sharding, method, dtype)
                step = max(loop.feed.steps(0), key=loop.feed.rounds)
                loop._step(step)
                with Counting() as counting:
                    loop._step(step)
                found = {
                    "collectives": dict(counting.found),
                    "rounds": loop.feed.rounds(step),
                    "bytes": held(loop),
                    "sharded": all(is_shard(p) for p in loop.model.parameters()),
                }
                name = f"{sharding}-{method}-{str(dtype).removeprefix('torch.')}"
                write_json(out / f"{name}-{here.size}-{here.rank}.json", found)


def held(loop: Loop) -> dict[str, int]:
    """Bytes of this process's parts, each storage once."""
    optimizer = loop.optimizer

    def size(tensors: Any) -> int:
        parts = [local_part(tensor.detach()) for tensor in tensors]
        return sum(part.numel() * part.element_size() for part in parts)

    own = {
        name
        for name, parameter in optimizer.parameters.items()
        if optimizer.sharded or parameter is optimizer.masters[name]
    }
    return {
        "weights": size(loop.model.parameters()),
        "masters": size(tensor for name, tensor in optimizer.weights().items() if name not in own),
        "moments": size(optimizer.moments().values()),
        "gradient": size([optimizer.gradient]),
    }


def dropped(here: World, config: dict[str, Any], out: Path) -> None:
    """With dropout: uninterrupted, and gone on with from half-way by as many processes."""
    for sharding in SHARDINGS[: 1 if here.size == 1 else 2]:
        folder = out / str(here.size) / sharding
        make_loop(config, folder, here, sharding, "lora", torch.bfloat16, 0.3).run()
        resumed = folder.with_name(f"{sharding}-resumed")
        place = Path("checkpoints") / f"checkpoint-{HALF:08d}"
        if here.is_main:
            shutil.copytree(folder / place, resumed / place)
        here.wait()
        make_loop(config, resumed, here, sharding, "lora", torch.bfloat16, 0.3).run()


def fork(size: int, work: Callable[[World], None]) -> None:
    """Run ``work`` in ``size`` processes that are joined; raises if one fails."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    children = []
    for rank in range(size):
        child = os.fork()
        if child:
            children.append(child)
            continue
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        try:
            with world() as here:
                work(here)
            code = 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stderr.flush()
        os._exit(code)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * size


if __name__ == "__main__":
    scenario = {"agree": agree, "count": count, "dropped": dropped}[sys.argv[1]]
    config, out = eval(sys.argv[2]), Path(sys.argv[3])
    assert not dist.is_initialized()
    for size in map(int, sys.argv[4:]):
        fork(size, lambda here: scenario(here, config, out))
