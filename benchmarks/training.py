"""Training: puna against trl and transformers on the same rows, whole processes in turn, ratios of medians.

    python -m benchmarks.training [--work lora-sft ...] [--runs 3] [--steps N] [--json FILE]
    python -m benchmarks.training --growth length|size
    python -m benchmarks.training --profile lora-sft

Both sides open the same bfloat16 checkpoint of SmolLM2-135M-Instruct and learn from the same token ids
under the same mask, step by step; the peer's batches are compared with puna's afterwards. puna is run by its
command line, as a user runs it. Speed is supervised tokens per second over all steps but the first; memory is
the most that the whole process had resident, imports and saving included. The peer's settings are its
quickest ones in a trial of a few steps. Needs trl 1.16.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from benchmarks import training_rows as rows_of
from benchmarks.training_work import WORKS, Peer, Prepared, Work, computed_in, operations, prepare
from puna.run.machine import choose_dtype

console = Console(width=int(os.environ.get("COLUMNS", "150")))
STEPS = {"lora-sft": 5, "lora-sft-defaults": 5, "full-cpt": 5, "dpo": 5}
TRIAL_STEPS = 2
PEAK = """
import json, sys, time, torch
torch.set_num_threads(int(sys.argv[1]))
dtype, best = getattr(torch, sys.argv[2]), 0.0
for size in (1024, 2048, 4096):
    left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    left @ right
    for _ in range(6):
        start = time.perf_counter()
        left @ right
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
print(json.dumps(best))
"""


@dataclass(frozen=True)
class Result:
    """What one process did: seconds and targets of each step, losses, bytes at the peak."""

    seconds: list[float]
    targets: list[int]
    losses: list[float]
    peak: int
    fed: list[str] | None = None
    precomputing: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def measured_seconds(self) -> float:
        """Seconds of all steps but the first, with their share of what was computed ahead."""
        ahead = self.precomputing * (len(self.seconds) - 1) / len(self.seconds)
        return sum(self.seconds[1:]) + ahead

    @property
    def speed(self) -> float:
        """Supervised tokens per second without the first step."""
        return sum(self.targets[1:]) / self.measured_seconds


@dataclass(frozen=True)
class Ratio:
    """The median of the ratios of pairs of runs, and their range."""

    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.2f} [{self.low:.2f}-{self.high:.2f}]"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Ours to theirs, pair by pair."""
    found = [one / other for one, other in zip(ours, theirs, strict=True)]
    return Ratio(statistics.median(found), min(found), max(found))


def environment(threads: int) -> dict[str, str]:
    """The environment of either side."""
    here = str(Path(__file__).resolve().parent.parent)
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def run(command: Sequence[str], threads: int, extra: dict[str, str] | None = None) -> int:
    """Run a fresh process to its end; its peak of resident memory in bytes.

    The figure is that of the process itself (wait4), as the system counted it for both sides alike.
    """
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**environment(threads), **(extra or {})}
        )
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{' '.join(command[:6])} ... failed:\n{log.read()[-4000:]}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def values(settings: dict[str, Any]) -> list[str]:
    """Parameters as the command line takes them."""
    return [f"{name}={json.dumps(value)}" for name, value in settings.items()]


def run_puna(prepared: Prepared, count: int, threads: int) -> Result:
    """puna's stage ``train``, by its command line."""
    with tempfile.TemporaryDirectory(prefix="puna-benchmark-") as name:
        out = Path(name) / "run"
        command = [sys.executable, "-m", "puna.cli", "stage", "train"]
        command += ["--in", f"model={prepared.model}", "--in", f"corpus={prepared.corpus}", "--out", str(out)]
        command += ["--dtype", prepared.work.dtype, "--device", "cpu", *values(prepared.work.settings)]
        length = "epochs=1" if prepared.work.kind == "preferences" else f"max_steps={count}"
        peak = run([*command, length], threads)
        metrics = json.loads((out / "stage.json").read_text())["metrics"]
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] == "train"]
    return Result(
        seconds=differences([line["seconds"] for line in lines]),
        targets=[int(value) for value in differences([line["targets"] for line in lines])],
        losses=[line["loss"] for line in lines],
        peak=peak,
        precomputing=metrics.get("reference_seconds", 0.0),
    )


def differences(sums: Sequence[float]) -> list[float]:
    """What each step added to a running sum."""
    return [value - before for value, before in zip(sums, [0, *sums], strict=False)]


def run_peer(prepared: Prepared, peer: Peer, count: int, threads: int) -> Result:
    """The peer in a process of its own."""
    settings = prepared.work.settings
    with tempfile.TemporaryDirectory(prefix="peer-benchmark-") as name:
        folder = Path(name)
        job = {
            **asdict(peer),
            "model": str(prepared.model),
            "steps": str(prepared.steps_file),
            "count": count,
            "threads": threads,
            "learning_rate": settings["learning_rate"],
            "lora": settings.get("lora"),
            "beta": settings.get("beta"),
            "out": str(folder / "out"),
            "result": str(folder / "result.json"),
        }
        (folder / "job.json").write_text(json.dumps(job))
        command = [sys.executable, "-m", "benchmarks.peers.training", str(folder / "job.json")]
        # A cache of its own: reference log-probabilities of an earlier run would be taken from there.
        peak = run(command, threads, {"HF_DATASETS_CACHE": str(folder / "cache")})
        found = json.loads((folder / "result.json").read_text())
    targets = [rows_of.counted([step])["targets"] for step in prepared.steps[:count]]
    return Result(targets=targets, peak=peak, **found)


def measured_peak(threads: int, dtype: str) -> float:
    """Operations per second of large matrix products, the best of several, in a fresh process."""
    command = [sys.executable, "-c", PEAK, str(threads), dtype]
    done = subprocess.run(command, env=environment(threads), capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout))


def trial(prepared: Prepared, threads: int) -> tuple[Peer, list[tuple[Peer, Result]]]:
    """The candidate of the peer that is quickest over a few steps, and what all of them did."""
    tried = list[tuple[Peer, Result]]()
    if len(prepared.work.peers) == 1:
        return prepared.work.peers[0], tried
    for peer in prepared.work.peers:
        count = min(TRIAL_STEPS, len(prepared.steps))
        tried.append((peer, run_peer(prepared, peer, count, threads)))
        console.print(f"  trial: {peer.name}: {tried[-1][1].speed:.0f} tokens/s")
    best = max((pair for pair in tried if pair[0].comparable), key=lambda pair: pair[1].speed)
    return best[0], tried


def trial_table(work: Work, tried: Sequence[tuple[Peer, Result]], taken: Peer) -> Table:
    """What the candidates of the peer did."""
    table = Table(title=f"{work.name}: the peer's settings, {TRIAL_STEPS} steps each")
    for column in ("settings", "tokens/s", "peak GB", "first loss", "arguments", ""):
        table.add_column(column)
    for peer, result in tried:
        note = "taken" if peer is taken else "" if peer.comparable else "for information: another precision"
        arguments = ", ".join(f"{name}={value}" for name, value in peer.arguments.items())
        cells = [f"{result.speed:.0f}", f"{result.peak / 1e9:.2f}", f"{result.losses[0]:.4f}"]
        table.add_row(peer.name, *cells, arguments, note)
    return table


def share_of_limit(prepared: Prepared, result: Result, spec: Any, peak: float) -> float:
    """Operations that the measured steps need over what the machine's matrix product does in their time."""
    steps = prepared.steps[1 : len(result.seconds)]
    return operations(spec, prepared.work, steps) / result.measured_seconds / peak


def spec_of(model: Path) -> Any:
    """The shapes of a checkpoint."""
    from puna.model.spec import LlamaSpec

    return LlamaSpec.from_config(json.loads((model / "config.json").read_text()))


@dataclass(frozen=True)
class Comparison:
    """All pairs of runs of one work."""

    prepared: Prepared
    peer: Peer
    ours: list[Result]
    theirs: list[Result]
    peak: float
    tried: list[tuple[Peer, Result]]

    @property
    def speed(self) -> Ratio:
        """puna's tokens per second to the peer's."""
        return ratio([one.speed for one in self.ours], [one.speed for one in self.theirs])

    @property
    def memory(self) -> Ratio:
        """puna's peak to the peer's."""
        return ratio([one.peak for one in self.ours], [one.peak for one in self.theirs])

    def as_json(self) -> dict[str, Any]:
        """Everything, to be kept."""
        work = self.prepared.work
        return {
            "work": work.name,
            "peer": asdict(self.peer),
            "machine_peak": self.peak,
            "speed": {"at_least": work.speed, **asdict(self.speed)},
            "memory": {"at_most": work.memory, **asdict(self.memory)},
            "puna": [asdict(one) for one in self.ours],
            "theirs": [asdict(one) for one in self.theirs],
            "tried": [{"peer": asdict(peer), **asdict(result)} for peer, result in self.tried],
        }


def compare(prepared: Prepared, runs: int, count: int, threads: int, peak: float) -> Comparison:
    """Run both sides in turn."""
    work = prepared.work
    for note in prepared.notes:
        console.print(f"  {note}")
    peer, tried = trial(prepared, threads)
    if tried:
        console.print(trial_table(work, tried, peer))
    ours, theirs = list[Result](), list[Result]()
    for number in range(runs):
        ours.append(run_puna(prepared, count, threads))
        theirs.append(run_peer(prepared, peer, count, threads))
        console.print(
            f"  run {number + 1}: puna {ours[-1].speed:.0f} tokens/s, {ours[-1].peak / 1e9:.2f} GB; "
            f"peer {theirs[-1].speed:.0f} tokens/s, {theirs[-1].peak / 1e9:.2f} GB"
        )
    comparison = Comparison(prepared, peer, ours, theirs, peak, tried)
    check_equal_work(comparison)
    console.print(losses_table(comparison))
    return comparison


def check_equal_work(comparison: Comparison) -> None:
    """Stop unless both sides learnt from the same ids under the same mask."""
    ours, theirs = comparison.ours[0], comparison.theirs[0]
    steps = comparison.prepared.steps[: len(theirs.seconds)]
    if not _same_rows(comparison, steps, theirs):
        raise SystemExit(f"{comparison.prepared.work.name}: the peer did not learn from puna's rows")
    pairs = comparison.prepared.work.kind == "preferences"
    if not pairs and ours.targets != theirs.targets:
        raise SystemExit(f"targets per step differ: puna {ours.targets}, peer {theirs.targets}")
    same = "over the run" if pairs else "in every step"
    console.print(f"  the same token ids and masks on both sides {same}: compared by fingerprint and count")
    if comparison.peer.arguments.get("packing_strategy") == "wrapped":
        console.print("  packing 'wrapped' lets a conversation see those before it in its row: losses differ")


def _same_rows(comparison: Comparison, steps: Sequence[rows_of.Step], theirs: Result) -> bool:
    if theirs.fed is None:
        return False
    if comparison.peer.arguments.get("packing_strategy") == "wrapped" or comparison.peer.trainer == "plain":
        # Nothing in these batches tells where documents end: whole rows are compared.
        steps = [tuple((joined(row),) for row in step) for step in steps]
    return rows_of.same_documents(steps, theirs.fed)


def joined(row: rows_of.Row) -> rows_of.Document:
    """A row as one document."""
    ids = tuple(token for document in row for token in document.ids)
    mask = tuple(t and place > 0 for document in row for place, t in enumerate(document.trained))
    return rows_of.Document(ids, mask)


def losses_table(comparison: Comparison, most: int = 4) -> Table:
    """Losses of both sides over the steps: the first is before any update and equal but for rounding."""
    ours, theirs = comparison.ours[0].losses, comparison.theirs[0].losses
    apart = [abs(one - other) for one, other in zip(ours, theirs, strict=False)]
    title = f"{comparison.prepared.work.name}: losses (mean difference {statistics.mean(apart):.4f})"
    table = Table(title=title)
    for column in ("step", "puna", "peer", "difference"):
        table.add_column(column)
    shown = [place for place in range(len(apart)) if place < most or place >= len(apart) - most]
    for place in shown:
        cells = (f"{ours[place]:.4f}", f"{theirs[place]:.4f}", f"{ours[place] - theirs[place]:+.4f}")
        table.add_row(str(place + 1), *cells)
    return table


def summary(comparisons: Sequence[Comparison], runs: int, dtype: str) -> Table:
    """The table of ratios against the bars."""
    table = Table(
        title=f"SmolLM2-135M-Instruct in {dtype}, medians of {runs} pairs of fresh processes in turn"
    )
    columns = ("work", "tokens/s puna", "peer", "ratio", "at least", "peak GB puna", "peer", "ratio")
    for column in (*columns, "at most", "of the limit: puna", "peer"):
        table.add_column(column)
    for one in comparisons:
        work, spec = one.prepared.work, spec_of(one.prepared.model)
        sides = (one.ours, one.theirs)
        speeds = [f"{statistics.median(r.speed for r in side):.0f}" for side in sides]
        peaks = [f"{statistics.median(r.peak for r in side) / 1e9:.2f}" for side in sides]
        shares = [
            f"{statistics.median(share_of_limit(one.prepared, r, spec, one.peak) for r in side):.0%}"
            for side in sides
        ]
        speed, memory = (f"{one.speed}", f"{one.memory}")
        table.add_row(work.name, *speeds, speed, f"{work.speed}x", *peaks, memory, f"{work.memory}x", *shares)
    return table


def has_objective(name: str) -> bool:
    """Whether puna's stage ``train`` has this objective."""
    from puna.train.stages import Train

    return name in get_args(Train.model_fields["objective"].annotation)


def cache(given: Path | None) -> Path:
    """Where model and corpora are kept between calls."""
    from puna.core.assets import cache_folder

    folder = given or cache_folder() / "benchmarks" / "training"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main() -> None:
    """Run what was asked for and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", nargs="+", choices=sorted(WORKS), default=list(WORKS))
    parser.add_argument("--runs", type=int, default=3, help="pairs of runs")
    parser.add_argument("--steps", type=int, help="optimiser steps of a run, at least 2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--json", type=Path, help="keep all figures in this file")
    parser.add_argument("--folder", type=Path, help="where model and rows are kept")
    parser.add_argument("--growth", choices=("length", "size"))
    parser.add_argument("--only", nargs="+", help="with --growth: these lengths or sizes")
    parser.add_argument(
        "--peer-up-to", type=float, help="with --growth: largest length or millions for the peer"
    )
    parser.add_argument("--profile", choices=sorted(WORKS))
    given = parser.parse_args()
    if given.steps is not None and given.steps < 2:
        parser.error("--steps is at least 2: the first is not measured")
    folder = cache(given.folder)
    dtype = choose_dtype(given.dtype, "cpu")
    console.print(f"both sides compute in {dtype}")
    if given.profile:
        from benchmarks.training_profile import profile

        profile(computed_in(dtype, WORKS[given.profile]), folder, given.threads)
        return
    if importlib.util.find_spec("trl") is None:
        raise SystemExit("the peer is not installed: pip install -c constraints.txt trl==1.16.0")
    peak = measured_peak(given.threads, dtype)
    console.print(f"large matrix product, {given.threads} threads: {dtype} {peak / 1e9:.0f} GFLOP/s")
    if given.growth:
        from benchmarks.training_growth import growth

        growth(given, folder, dtype, peak)
        return
    comparisons: list[Comparison] = []
    for name in given.work:
        work, count = computed_in(dtype, WORKS[name]), given.steps or STEPS[name]
        console.rule(name)
        if not has_objective(work.settings["objective"]):
            console.print(f"skipped: puna's stage train has no objective {work.settings['objective']!r} yet")
            continue
        comparisons.append(compare(prepare(work, folder, count), given.runs, count, given.threads, peak))
        if given.json:
            from puna.core.files import write_json

            write_json(given.json, [one.as_json() for one in comparisons])
    if comparisons:
        console.print(summary(comparisons, given.runs, dtype))


if __name__ == "__main__":
    main()
