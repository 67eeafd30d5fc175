"""Decoding on the CPU: puna against transformers, llama.cpp and openvino-genai on the same token ids.

    python -m benchmarks.decoding [--work decode-4bit ...] [--model FILE.gguf] [--runs 3] [--threads 2]
                               [--json FILE]
    python -m benchmarks.decoding --quality

Every run of a side is a fresh process that answers the same requests (benchmarks/peers/decoding.py); sides
take turns, and ratios are medians over pairs of runs. puna and llama.cpp open the same GGUF, of
SmolLM2-135M-Instruct if nothing else is said, with 4-bit layers and an 8-bit head; in bfloat16 both sides
open the same weights. llama.cpp runs by its batch interface with a slot for each request, as its server
does, without that server's HTTP in between: the Python package has a server that answers one request at a
time, which would flatter puna. Peers that are not installed are left out and told. Memory is the most that
a whole process had resident, imports included.

The limit of decoding is what the memory gives: bytes of weights and stored keys that a step reads, over the
read bandwidth that torch measures on a large array. What stays in the last cache between steps comes on top,
so a small model may pass it. The limit of prefill is the operations over what torch's matrix product does in
bfloat16.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.training import Ratio, environment, measured_peak, ratio, run

console = Console(width=int(os.environ.get("COLUMNS", "150")))
MODEL = "smollm2-135m-instruct"
MODULES = {
    "transformers": "transformers",
    "llama.cpp": "llama_cpp",
    "openvino": "openvino_genai",
}
BANDWIDTH = """
import json, sys, time, torch
torch.set_num_threads(int(sys.argv[1]))
numbers, best = torch.ones(64 << 20), 0.0
for _ in range(12):
    start = time.perf_counter()
    numbers.sum()
    best = max(best, numbers.nbytes / (time.perf_counter() - start))
print(json.dumps(best))
"""


@dataclass(frozen=True)
class Side:
    """One way to answer the requests of a work."""

    name: str
    settings: dict[str, Any]
    at_least: float | None = None  # puna's figure over this one's; None: for information

    @property
    def label(self) -> str:
        """Name and settings."""
        shown = ", ".join(str(value) for value in self.settings.values())
        return f"{self.name} {shown}".strip()


@dataclass(frozen=True)
class Work:
    """Requests as (prompt tokens, tokens to produce, arrival in seconds), and who answers them."""

    name: str
    says: str
    requests: tuple[tuple[int, int, float], ...]
    puna: Side
    peers: tuple[Side, ...]
    figure: str  # decode, prefill, output or first: see figure_of


INT4, BF16 = Side("puna", {"quantize": "int4"}), Side("puna", {})
MIXED = tuple((64 + 173 * i % 448, 64 + 89 * i % 192, 0.0) for i in range(16))
WORKS = (
    Work(
        "decode-4bit",
        "one text, 256 tokens after 512, 4-bit weights",
        ((512, 256, 0.0),),
        INT4,
        (Side("llama.cpp", {}, 1.3), Side("openvino", {})),
        "decode",
    ),
    Work(
        "decode-bf16",
        "one text, 256 tokens after 512, bfloat16",
        ((512, 256, 0.0),),
        BF16,
        (Side("transformers", {}, 5.0),),
        "decode",
    ),
    Work(
        "concurrent-4bit",
        "16 requests of mixed length at once, output tokens/s, 4-bit weights",
        MIXED,
        INT4,
        (Side("llama.cpp", {}, 2.0),),
        "output",
    ),
    Work(
        "concurrent-bf16",
        "16 requests of mixed length at once, output tokens/s, bfloat16",
        MIXED,
        BF16,
        (Side("transformers", {}, 4.0),),
        "output",
    ),
    Work(
        "prefill-4bit",
        "a prompt of 4096 tokens, 4-bit weights",
        ((4096, 1, 0.0),),
        INT4,
        (Side("llama.cpp", {}, 3.0), Side("openvino", {})),
        "prefill",
    ),
    Work(
        "first-token",
        "40 requests, two a second: 99th percentile of the time to the first token, 4-bit weights",
        tuple((64 + 173 * i % 448, 32, 0.5 * i) for i in range(40)),
        INT4,
        (Side("llama.cpp", {}, 1.0),),
        "first",
    ),
)


@dataclass(frozen=True)
class Result:
    """What one process did: the times of each request, and its peak of memory in bytes."""

    served: list[dict[str, float]]
    peak: int


def figure_of(work: Work, result: Result) -> float:
    """Tokens per second; of "first", requests per second of waiting, so that more is better everywhere."""
    served = result.served
    if work.figure == "decode":
        return (work.requests[0][1] - 1) / (served[0]["last"] - served[0]["first"])
    if work.figure == "prefill":
        return work.requests[0][0] / served[0]["first"]
    if work.figure == "output":
        return sum(tokens for _, tokens, _ in work.requests) / max(one["last"] for one in served)
    return 1 / first_token(work, result, 0.99)


def first_token(work: Work, result: Result, share: float) -> float:
    """Seconds from arrival to first token that this share of the requests did not exceed."""
    waits = sorted(
        one["first"] - arrives for one, (_, _, arrives) in zip(result.served, work.requests, strict=True)
    )
    return waits[min(len(waits) - 1, int(share * len(waits)))]


def run_side(side: Side, work: Work, ids: Sequence[int], paths: dict[str, str], threads: int) -> Result:
    """One fresh process."""
    requests = [
        {"ids": list(ids[place * 97 : place * 97 + length]), "tokens": tokens, "arrives": arrives}
        for place, (length, tokens, arrives) in enumerate(work.requests)
    ]
    with tempfile.TemporaryDirectory(prefix="decoding-benchmark-") as name:
        job, result = Path(name) / "job.json", Path(name) / "result.json"
        content = {"side": side.name, "settings": side.settings, "threads": threads, "requests": requests}
        job.write_text(json.dumps({**content, **paths, "result": str(result)}))
        command = [sys.executable, "-m", "benchmarks.peers.decoding", str(job)]
        peak = run(command, threads)
        return Result(json.loads(result.read_text()), peak)


def prepare(name: str, folder: Path) -> tuple[list[int], dict[str, str]]:
    """Token ids of real text, and the checkpoints that the sides open: of an asset or a GGUF file."""
    from pydoc_data.topics import topics

    import torch

    from puna.core import assets
    from puna.text.pretrained import load, save

    model = load(name, dtype=torch.bfloat16)
    assert model.tokenizer is not None
    text = "\n\n".join(topics[name] for name in sorted(topics))[:120_000]
    save(model, folder / "bf16", format="hf")
    file = name if name.endswith(".gguf") else str(assets.fetch(name))
    return model.tokenizer.encode(text), {"folder": str(folder / "bf16"), "gguf": file, "model": name}


@dataclass(frozen=True)
class Comparison:
    """All runs of one work."""

    work: Work
    sides: dict[str, list[Result]]  # by label; puna's first

    def figures(self, label: str) -> list[float]:
        """A side's figure of each run."""
        return [figure_of(self.work, result) for result in self.sides[label]]

    def ratio(self, label: str) -> Ratio:
        """puna's figure to this side's, run by run."""
        return ratio(self.figures(self.work.puna.label), self.figures(label))


def compare(work: Work, ids: Sequence[int], paths: dict[str, str], runs: int, threads: int) -> Comparison:
    """Run the sides of a work in turn."""
    console.print(f"{work.name}: {work.says}")
    sides = [work.puna]
    for peer in work.peers:
        if importlib.util.find_spec(MODULES[peer.name]) is None:
            console.print(f"  {peer.name} is not installed and left out")
        else:
            sides.append(peer)
    comparison = Comparison(work, {side.label: [] for side in sides})
    for number in range(runs):
        for side in sides:
            try:
                result = run_side(side, work, ids, paths, threads)
            except SystemExit as error:
                if side is work.puna or side.at_least is not None:
                    raise
                console.print(
                    f"  {side.label} could not do it and is left out: {str(error).splitlines()[-1]}"
                )
                sides = [other for other in sides if other is not side]
                del comparison.sides[side.label]
                continue
            comparison.sides[side.label].append(result)
            console.print(f"  run {number + 1}: {side.label}: {told(work, result)}")
    return comparison


def told(work: Work, result: Result) -> str:
    """A run in one line."""
    memory = f"{result.peak / 1e9:.2f} GB"
    if work.figure == "first":
        middle, last = (first_token(work, result, share) for share in (0.5, 0.99))
        return f"first token after {1000 * middle:.0f} ms (median), {1000 * last:.0f} ms (99%), {memory}"
    wait = first_token(work, result, 0.5)
    first = f"first token after {1000 * wait:.0f} ms, " if wait else ""  # not every side tells
    return f"{figure_of(work, result):.1f} tokens/s, {first}{memory}"


def limit_of(work: Work, file: str, threads: int, bandwidth: float, peak: float) -> float | None:
    """Tokens per second that memory or matrix products allow; None where neither says much."""
    from puna.model.checkpoint import read_weights
    from puna.model.native.stepper import NativeStepper

    if work.figure not in ("decode", "prefill"):
        return None
    import torch

    model = read_weights(Path(file), dtype=torch.bfloat16)
    spec = model.spec
    length, tokens, _ = work.requests[0]
    stepper = NativeStepper(
        model, quantize=work.puna.settings.get("quantize"), cache_tokens=16, threads=threads
    )
    if work.figure == "decode":
        stored = stepper.pool.bytes_per_block / 16 * (length + tokens / 2)
        # Of an embedding that is not also the head, a step reads a row.
        unread = 0 if spec.tied else 2 * spec.vocab_size * spec.hidden_size
        return bandwidth / (stepper.weight_bytes - unread + stored)
    products = 2 * (spec.parameter_count() - spec.vocab_size * spec.hidden_size)
    keys = sum(2 * 2 * block.heads * block.head_dim for block in spec.blocks) * length / 2
    return peak / (products + keys)


def summary(
    name: str, comparisons: Sequence[Comparison], limits: dict[str, float | None], runs: int
) -> Table:
    """The table of ratios against the bars."""
    table = Table(title=f"{Path(name).stem}, medians of {runs} runs of fresh processes in turn")
    columns = ("work", "tokens/s puna", "peer", "", "ratio", "at least", "first token ms puna", "peer")
    for column in (*columns, "peak GB puna", "peer", "of the limit: puna", "peer"):
        table.add_column(column)
    for one in comparisons:
        for peer in (peer for peer in one.work.peers if peer.label in one.sides):
            table.add_row(*_cells(one, peer, limits.get(one.work.name)))
    return table


def _cells(one: Comparison, peer: Side, limit: float | None) -> list[str]:
    """puna beside one peer. Where the figure is the wait itself, there are no tokens per second to tell."""
    sides = (one.work.puna.label, peer.label)
    waiting = one.work.figure == "first"
    figures = [statistics.median(one.figures(label)) for label in sides]
    waits, peaks = [], []
    for label in sides:
        results = one.sides[label]
        found = [first_token(one.work, result, 0.99 if waiting else 0.5) for result in results]
        waits.append(f"{1000 * statistics.median(found):.0f}" if any(found) else "not told")
        peaks.append(f"{statistics.median(result.peak for result in results) / 1e9:.2f}")
    speeds = ["", ""] if waiting else [f"{figure:.0f}" for figure in figures]
    shares = ["", ""] if limit is None else [f"{figure / limit:.0%}" for figure in figures]
    bar = "" if peer.at_least is None else f"{peer.at_least:.1f}"
    return [
        one.work.name,
        speeds[0],
        speeds[1],
        peer.label,
        str(one.ratio(peer.label)),
        bar,
        *waits,
        *peaks,
        *shares,
    ]


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [work.name for work in WORKS]
    parser.add_argument("--work", nargs="+", choices=names, default=names)
    parser.add_argument("--model", default=MODEL, help="an asset or a .gguf file of a Llama")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quality", action="store_true", help="bits per byte of the formats instead")
    chosen = parser.parse_args()
    if chosen.quality:
        from benchmarks.decoding_quality import quality

        console.print(quality())
        return
    bandwidth = json.loads(
        subprocess.run(
            [sys.executable, "-c", BANDWIDTH, str(chosen.threads)],
            env=environment(chosen.threads),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    peak = measured_peak(chosen.threads, "bfloat16")
    console.print(
        f"memory read {bandwidth / 1e9:.1f} GB/s, matrix product {peak / 1e9:.0f} GFLOP/s in bfloat16"
    )
    with tempfile.TemporaryDirectory(prefix="decoding-benchmark-") as folder:
        # In a process of its own: Linux counts what a process held when it forked among its child's peak.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            ids, paths = pool.submit(prepare, chosen.model, Path(folder)).result()
        works = [work for work in WORKS if work.name in chosen.work]
        comparisons = [compare(work, ids, paths, chosen.runs, chosen.threads) for work in works]
    limits = {work.name: limit_of(work, paths["gguf"], chosen.threads, bandwidth, peak) for work in works}
    console.print(summary(chosen.model, comparisons, limits, chosen.runs))
    if chosen.json:
        content = [
            {
                "work": one.work.name,
                "runs": {label: [vars(run) for run in runs] for label, runs in one.sides.items()},
            }
            for one in comparisons
        ]
        chosen.json.write_text(json.dumps({"bandwidth": bandwidth, "peak": peak, "works": content}, indent=1))


if __name__ == "__main__":
    main()
