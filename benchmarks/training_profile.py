"""Where a step of puna's training spends its time, by group of operators, against the machine's limit.

The steps run through the same stage as in the benchmark, in a fresh process, with torch's profiler around
two of them. Operators are told apart by what encloses them and by their shapes, so that the groups stay right
when operators are fused or renamed; what no rule knows is shown as such.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.training_work import LORA, Work, operations, prepare

FIRST, LAST = 2, 3  # the steps that are profiled
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mkldnn_linear", "mkldnn::_linear")
GROUPS = (
    "matrix products",
    "attention",
    "head and loss",
    "norms, gates, rotation, sums",
    "adapter",
    "optimiser",
)


def enclosing(event: Any) -> Iterator[str]:
    """Names of an event and of all events around it."""
    while event is not None:
        yield event.name
        event = event.cpu_parent


def shapes_of(event: Any) -> list[list[int]]:
    """Shapes of the operator's tensors."""
    return [
        list(shape) for shape in event.input_shapes or [] if shape and all(isinstance(n, int) for n in shape)
    ]


def group_of(names: Sequence[str], shapes: Sequence[Sequence[int]], rank: int) -> str:
    """The group of an operator by its own name, those around it, and its shapes."""
    joined = " ".join(names).lower()
    if "optimizer" in joined or "benchmark: optimiser" in joined:
        return "optimiser"
    if "crossentropy" in joined or "cross_entropy" in joined or "log_softmax" in joined:
        return "head and loss"
    if "attention" in joined:
        return "attention"
    if "lora" in joined or "adapter" in joined or any(rank in shape[-2:] for shape in shapes):
        return "adapter"
    if names[0] in PRODUCTS:
        return "matrix products"
    return "norms, gates, rotation, sums"


def product_operations(name: str, shapes: Sequence[Sequence[int]]) -> float:
    """Operations of a matrix product, from its shapes; 0 of anything else."""
    if name not in PRODUCTS:
        return 0.0
    matrices = [shape for shape in shapes if len(shape) >= 2]
    if len(matrices) < 2:
        return 0.0
    if "linear" in name:
        left, right = matrices[0], matrices[1]
        rows = 1.0
        for size in left:
            rows *= size
        return 2.0 * rows * right[0]
    left, right = matrices[-2], matrices[-1]
    batch = left[0] if len(left) == 3 else 1
    return 2.0 * batch * left[-2] * left[-1] * right[-1]


def grouped(events: Iterable[Any], rank: int) -> dict[str, dict[str, float]]:
    """Seconds and operations of products, for each group."""
    found: dict[str, dict[str, float]] = defaultdict(lambda: {"seconds": 0.0, "operations": 0.0})
    for event in events:
        names, shapes = list(enclosing(event)), shapes_of(event)
        group = group_of(names, shapes, rank)
        found[group]["seconds"] += event.self_cpu_time_total / 1e6
        found[group]["operations"] += product_operations(event.name, shapes)
    return {name: dict(values) for name, values in found.items()}


def recorded(function: Callable[..., Any], label: str) -> Callable[..., Any]:
    """The function inside an event of the profiler with this label."""
    import torch

    def inside(*arguments: Any, **named: Any) -> Any:
        with torch.profiler.record_function(label):
            return function(*arguments, **named)

    return inside


def measure(job: dict[str, Any]) -> None:
    """In a process of its own: run the stage, profile two of its steps, write what was found."""
    import time

    import torch
    from torch.profiler import ProfilerActivity

    from puna.core.files import write_json
    from puna.run.alone import run_stage
    from puna.train.loop import Loop
    from puna.train.optimizer import Optimizer

    torch.set_num_threads(job["threads"])
    whole_step, seen = Loop._step, {"step": 0, "seconds": 0.0}
    profiler = torch.profiler.profile(activities=[ProfilerActivity.CPU], record_shapes=True)

    def step(loop: Any, one: Any) -> Any:
        seen["step"] += 1
        if seen["step"] == FIRST:
            profiler.start()
        start = time.perf_counter()
        done = whole_step(loop, one)
        if FIRST <= seen["step"] <= LAST:
            seen["seconds"] += time.perf_counter() - start
        if seen["step"] == LAST:
            profiler.stop()
        return done

    Loop._step = step  # type: ignore[method-assign]
    for name in ("step", "gradient_norm"):
        setattr(Optimizer, name, recorded(getattr(Optimizer, name), "benchmark: optimiser"))
    given = {"model": job["model"], "corpus": job["corpus"]}
    settings = {**job["settings"], "max_steps": LAST}
    run_stage("train", given, job["out"], settings, device="cpu", dtype=job["dtype"])
    groups = grouped(profiler.events() or [], job["rank"])
    write_json(Path(job["result"]), {"groups": groups, "seconds": seen["seconds"]})


def profile(work: Work, folder: Path, threads: int) -> None:
    """Run :func:`measure` in a fresh process and print the table."""
    from benchmarks.training import console, environment, has_objective, measured_peak, spec_of

    if not has_objective(work.settings["objective"]):
        console.print(f"skipped: puna's stage train has no objective {work.settings['objective']!r} yet")
        return
    peak = measured_peak(threads, work.dtype)
    prepared = prepare(work, folder, LAST)
    with tempfile.TemporaryDirectory(prefix="puna-profile-") as name:
        result = Path(name) / "result.json"
        job = {
            "model": str(prepared.model),
            "corpus": str(prepared.corpus),
            "settings": work.settings,
            "dtype": work.dtype,
            "rank": LORA["r"] if "lora" in work.settings else -1,
            "threads": threads,
            "out": str(Path(name) / "run"),
            "result": str(result),
        }
        (Path(name) / "job.json").write_text(json.dumps(job))
        command = [sys.executable, "-m", "benchmarks.training_profile", str(Path(name) / "job.json")]
        subprocess.run(command, env=environment(threads), check=True, stdout=subprocess.DEVNULL)
        found = json.loads(result.read_text())
    needed = operations(spec_of(prepared.model), work, prepared.steps[FIRST - 1 : LAST])
    share = needed / peak / found["seconds"]
    console.print(profile_table(work.name, found, peak, LAST - FIRST + 1))
    console.print(
        f"the work needs {needed / 1e12:.2f} TFLOP, {needed / peak:.1f} s at {peak / 1e9:.0f} GFLOP/s; "
        f"under the profiler it took {found['seconds']:.1f} s: {share:.0%} of the limit"
    )


def profile_table(name: str, found: dict[str, Any], peak: float, steps: int) -> Table:
    """Seconds per step of each group, and how near its products are to the machine's limit."""
    table = Table(title=f"{name}: a step of puna by group of operators (mean of {steps} steps, profiled)")
    for column in ("group", "seconds", "share", "GFLOP of products", "of the limit"):
        table.add_column(column)
    groups, whole = found["groups"], found["seconds"]
    rest = max(0.0, whole - sum(values["seconds"] for values in groups.values()))
    for group in GROUPS:
        values = groups.get(group, {"seconds": 0.0, "operations": 0.0})
        seconds, work = values["seconds"], values["operations"]
        limit = f"{work / seconds / peak:.0%}" if work and seconds else "-"
        cells = (f"{seconds / steps:.2f}", f"{seconds / whole:.0%}", f"{work / steps / 1e9:.0f}", limit)
        table.add_row(group, *cells)
    table.add_row("Python and between operators", f"{rest / steps:.2f}", f"{rest / whole:.0%}", "-", "-")
    return table


if __name__ == "__main__":
    measure(json.loads(Path(sys.argv[1]).read_text()))
