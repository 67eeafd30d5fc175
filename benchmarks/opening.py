"""Starting and opening: whole processes, puna and transformers in turn, medians and ratios.

    python benchmarks/opening.py [--runs 3]

Each figure is one fresh process, from start to a model that can be called; both sides get the machine alone.
The work is the same: SmolLM2-135M-Instruct out of its GGUF file (Q4_1), dequantised to float32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

PUNA = """
import puna, torch
model = puna.load({path!r})
"""
TRANSFORMERS = """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({folder!r}, gguf_file={file!r}, dtype=torch.float32)
"""
REPORT = """
import json, resource, time
with torch.no_grad():
    logits = model(torch.tensor([[1, 2, 3, 4]]))
logits = getattr(logits, "logits", logits)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"peak": peak, "sum": float(logits.double().sum())}))
"""


def measure(code: str) -> tuple[float, dict[str, float]]:
    """Seconds of a fresh process that runs ``code``, and what it reports."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - start
    lines = done.stdout.strip().splitlines()
    return seconds, json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}


def main() -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    from puna.core import assets

    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--runs", type=int, default=3)
    runs = arguments.parse_args().runs
    path = Path(assets.fetch("smollm2-135m-instruct"))
    sides = {
        "puna": PUNA.format(path=str(path)) + REPORT,
        "transformers": TRANSFORMERS.format(folder=str(path.parent), file=path.name) + REPORT,
    }
    figures: dict[str, list[tuple[float, dict[str, float]]]] = {name: [] for name in sides}
    for _ in range(runs):
        for name, code in sides.items():
            figures[name].append(measure(code))
    table = Table(title=f"open SmolLM2-135M's GGUF, median of {runs} fresh processes each, in turn")
    for column in ("", "seconds", "peak memory", "sum of logits"):
        table.add_column(column)
    medians = {name: statistics.median(seconds for seconds, _ in found) for name, found in figures.items()}
    for name, found in figures.items():
        peak = statistics.median(report["peak"] for _, report in found)
        table.add_row(name, f"{medians[name]:.2f}", f"{peak / 1e9:.2f} GB", f"{found[0][1]['sum']:.6f}")
    ratio = statistics.median(
        theirs / ours for (ours, _), (theirs, _) in zip(figures["puna"], figures["transformers"], strict=True)
    )
    console = Console()
    console.print(table)
    console.print(f"transformers / puna: {ratio:.1f}x")
    alone = Table(title=f"start, median of {runs} fresh processes")
    alone.add_column("")
    alone.add_column("seconds")
    for name, code in {
        "python": "pass",
        "import puna": "import puna",
        "puna --help": "import sys; sys.argv = ['puna', '--help']; from puna.cli import main; main()",
    }.items():
        seconds = statistics.median(measure_quietly(code) for _ in range(runs))
        alone.add_row(name, f"{seconds:.3f}")
    console.print(alone)


def measure_quietly(code: str) -> float:
    """Seconds of a fresh process whose exit code does not matter."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
