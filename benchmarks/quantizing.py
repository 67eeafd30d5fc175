"""Quantising on the CPU: puna against llm-compressor, GPTQ and AWQ of SmolLM2-135M-Instruct.

    python -m benchmarks.quantizing [--rows 16] [--tokens 512] [--methods gptq awq] [--runs 1] [--bits 4]
                                    [--group 64] [--threads 2] [--peer-python PYTHON] [--json FILE]

Every run of a side is a fresh process (benchmarks/peers/quantizing.py) and sides take turns. Both open the
same float32 checkpoint, calibrate on the same token ids, put all projections on an asymmetric grid with the
same bits and groups, and read the same other tokens afterwards. Seconds are those of quantising alone. llm-
compressor is no dependency of puna: ``--peer-python`` is a Python that has it; without one it is left out
and told.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def run(job: dict[str, Any], python: str, folder: Path) -> dict[str, float] | None:
    """One side, once; None where it fails, and why is printed."""
    file = folder / "job.json"
    file.write_text(json.dumps(job))
    command = [python, "-m", "benchmarks.peers.quantizing", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{job['side']} {job['method']} failed:\n{done.stderr[-1500:]}", file=sys.stderr)
        return None
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def prepare(folder: Path, rows: int, tokens: int, others: int) -> dict[str, Any]:
    """The checkpoint in float32, and ids of the repository's own documentation: the first to calibrate on."""
    import puna
    from puna.text import pretrained

    model = puna.load("smollm2-135m-instruct")
    pretrained.save(model, folder / "model")
    pages = sorted((Path(__file__).parent.parent / "docs").rglob("*.md"))
    ids: list[int] = []
    for page in pages:
        ids += model.tokenizer.encode(page.read_text(encoding="utf-8"))
    wanted = [ids[start : start + tokens] for start in range(0, len(ids) - tokens, tokens)]
    if len(wanted) < rows + others:
        raise SystemExit(f"the documentation has {len(wanted)} rows of {tokens} tokens: ask for fewer")
    return {"model": str(folder / "model"), "rows": wanted[:rows], "others": wanted[-others:]}


def main() -> None:
    """Print the table."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rows", type=int, default=16)
    arguments.add_argument("--tokens", type=int, default=512)
    arguments.add_argument("--others", type=int, default=8)
    arguments.add_argument("--methods", nargs="+", default=["gptq", "awq"])
    arguments.add_argument("--runs", type=int, default=1)
    arguments.add_argument("--bits", type=int, default=4)
    arguments.add_argument("--group", type=int, default=64)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--peer-python")
    arguments.add_argument("--json", type=Path)
    chosen = arguments.parse_args()
    sides = {"puna": sys.executable}
    if chosen.peer_python:
        sides["llm-compressor"] = chosen.peer_python
    else:
        print("llm-compressor is left out: --peer-python names a Python that has it", file=sys.stderr)
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="puna-quantizing-") as name:
        folder = Path(name)
        common = prepare(folder, chosen.rows, chosen.tokens, chosen.others)
        common |= {"bits": chosen.bits, "group": chosen.group, "threads": chosen.threads}
        for _ in range(chosen.runs):
            for method in chosen.methods:
                for side, python in sides.items():
                    measured = run({**common, "side": side, "method": method}, python, folder)
                    if measured is not None:
                        found.setdefault(f"{method} {side}", []).append(measured)
    table = Table("method", "side", "seconds", "nats a token", "peak memory", "times as fast")
    for method in chosen.methods:
        ours = found.get(f"{method} puna", [])
        for side in sides:
            theirs = found.get(f"{method} {side}", [])
            if not theirs:
                continue
            seconds = statistics.median(each["seconds"] for each in theirs)
            pairs = [other["seconds"] / own["seconds"] for own, other in zip(ours, theirs, strict=False)]
            ratio = f"{statistics.median(pairs):.2f}" if pairs and side != "puna" else ""
            peak = max(each["peak"] for each in theirs) / 1e6
            table.add_row(
                method, side, f"{seconds:.1f}", f"{theirs[0]['nats']:.4f}", f"{peak:,.0f} MB", ratio
            )
    Console().print(table)
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
