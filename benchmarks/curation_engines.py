"""Who drives the operators: puna's own processes, plain multiprocessing, Daft, or polars, over the same text.

    python -m benchmarks.curation_engines [--engines puna daft ...] [--workers 1 2] [--shards 8] [--copies 1]
    python -m benchmarks.curation_engines --grow 20          # 20 GB through puna, and the memory it takes

Each engine reads the same JSON lines (:mod:`benchmarks.curation_texts`), puts every document through the
preset ``gopher`` in batches, with the very same operators, and writes what passes as Parquet. puna stores
all signals and the documents besides. A figure is that of a fresh process with its children: seconds from
the start of work to the last file, processor time, and the highest sum of resident memory, looked at ten
times a second (what processes share counts once for each). Daft and polars are installed aside by pip
on the first run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.curation_texts import shards
from benchmarks.peers.curation_engines import ENGINES, grown

_GROWN_FILE = 500_000_000  # bytes of JSON lines in one packed file
PACKAGES = Path.home() / ".cache" / "puna" / "benchmarks" / "engines"
PEERS = ("daft==0.7.26", "polars==2.1.0", "polars-runtime-32==2.1.0")


def packages() -> Path:
    """The folder with Daft and polars, filled on the first run."""
    if not (PACKAGES / "polars").is_dir():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(PACKAGES)]
        subprocess.run([*command, *PEERS], check=True)
    return PACKAGES


def run(engine: str, files: list[str], workers: int) -> dict[str, Any]:
    """One engine in a fresh process: its figures with the peak of memory."""
    with tempfile.TemporaryDirectory() as folder:
        job = {"engine": engine, "files": files, "workers": workers, "out": folder}
        path = os.pathsep.join([str(Path(__file__).parents[1]), str(packages())])
        cores = sorted(os.sched_getaffinity(0))[:workers]
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.peers.curation_engines", json.dumps(job)],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DAFT_PROGRESS_BAR": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if "BENCHMARK_QUIET" in os.environ else None,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        peak = 0
        while process.poll() is None:
            peak = max(peak, _resident(process.pid))
            time.sleep(0.1)
        assert process.stdout is not None
        told = process.stdout.read().decode().strip().splitlines()
        if process.returncode or not told:
            raise SystemExit(f"{engine} failed")
        return {**json.loads(told[-1]), "peak": peak}


def _resident(pid: int) -> int:
    try:
        first = psutil.Process(pid)
        family = [first, *first.children(recursive=True)]
        return sum(one.memory_info().rss for one in family)
    except psutil.NoSuchProcess:
        return 0


def compare(engines: list[str], counts: list[int], files: list[str], rounds: int) -> None:
    """Print a row for each engine and number of workers; engines take turns."""
    documents = sum(Path(file).read_bytes().count(b"\n") for file in files)
    size = sum(Path(file).stat().st_size for file in files)
    print(f"{documents:,} documents, {size / 1e6:.0f} MB of JSON lines, {len(files)} files", flush=True)
    best: dict[tuple[str, int], dict[str, Any]] = {}
    for _ in range(rounds):
        for workers in counts:
            for engine in engines:
                figures = run(engine, files, workers)
                print(f"{engine}, {workers}: {figures}", file=sys.stderr, flush=True)
                old = best.get((engine, workers))
                if old is None or figures["seconds"] < old["seconds"]:
                    best[engine, workers] = figures
    print("engine           workers     docs/s  docs/s of processor   MB/s  seconds  peak MB    kept")
    for (engine, workers), row in best.items():
        speed, own = documents / row["seconds"], documents / row["processor"]
        rate, peak = size / 1e6 / row["seconds"], row["peak"] / 1e6
        print(
            f"{engine:16s} {workers:7d} {speed:10,.0f} {own:20,.0f} {rate:6.1f} {row['seconds']:8.1f}"
            f" {peak:8.0f} {row['kept']:7,d}"
        )
    for engine in engines:
        if {(engine, 1), (engine, 2)} <= set(best):
            gain = best[engine, 1]["seconds"] / best[engine, 2]["seconds"]
            print(f"{engine}: 2 workers are {gain:.2f}x as fast as 1")


def grow(gigabytes: float, workers: int) -> None:
    """``gigabytes`` of text made out of real lines through puna: time and peak memory.

    The text lies packed in files of half a gigabyte; with the pool and the corpus that is as much disk as
    there is text, at most.
    """
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        files, documents, written = _packed(int(gigabytes * 1e9), Path(folder))
        packed = sum(Path(file).stat().st_size for file in files)
        print(
            f"{documents:,} documents, {written / 1e9:.2f} GB of JSON lines, {packed / 1e9:.2f} GB packed in "
            f"{len(files)} files, made in {time.perf_counter() - started:.0f} s",
            flush=True,
        )
        figures = run("puna, grown", files, workers)
        print(
            f"{workers} workers: {figures['seconds']:.0f} s ({figures['processor']:.0f} s of processor time, "
            f"{written / 1e6 / figures['processor']:.0f} MB/s a core), peak {figures['peak'] / 1e9:.2f} GB, "
            f"{figures['kept']:,} documents kept"
        )


def _packed(size: int, folder: Path) -> tuple[list[str], int, int]:
    """Packed files of ``size`` characters of text in all, how many documents, and bytes of JSON lines."""
    import pyarrow

    texts = grown(size, [str(file) for file in shards()])
    files: list[str] = []
    documents = written = 0
    for first in texts:
        files.append(str(folder / f"{len(files):03d}.jsonl.zst"))
        with pyarrow.CompressedOutputStream(files[-1], "zstd") as stream:
            text: str | None = first
            while text is not None:
                line = json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
                stream.write(line)
                documents, written = documents + 1, written + len(line)
                text = next(texts, None) if written < len(files) * _GROWN_FILE else None
    return files, documents, written


def main() -> None:
    """Parse and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--copies", type=int, default=1, help="how often each file is read")
    parser.add_argument("--grow", type=float, help="gigabytes to put through puna instead")
    given = parser.parse_args()
    if given.grow:
        grow(given.grow, max(given.workers))
        return
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for copy in range(given.copies):
            for file in shards()[: given.shards]:
                files.append(str(Path(folder) / f"{copy:02d}-{file.name}"))
                Path(files[-1]).symlink_to(file)
        compare(given.engines, given.workers, files, given.rounds)


if __name__ == "__main__":
    main()
