"""One engine over JSON lines, in a process of its own: the same operators on batches, survivors written.

Called by :mod:`benchmarks.curation_engines` with a job as JSON; prints what it did as JSON.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

BATCH = 1000  # documents that an engine hands to the operators at once; puna cuts by characters


@cache
def _steps() -> Any:
    from puna.data.curate.pipeline import load_pipeline

    return load_pipeline("gopher").steps


def keep(texts: Sequence[str | None]) -> list[bool]:
    """Whether each document passes the preset ``gopher``."""
    from puna.data.curate.execute import execute
    from puna.data.curate.texts import Texts

    mask = [False] * len(texts)
    for row in execute(_steps(), Texts([text or "" for text in texts])).rows.tolist():
        mask[row] = True
    return mask


GROWN = [
    {"map": "text.newlines"},
    {"score": "data_juicer.text_length"},
    {"gate": {"name": "length", "signal": "data_juicer.text_length.characters", "minimum": 6000}},
    {"global": "dedup.exact"},
    {"gate": {"name": "copies", "signal": "dedup.exact.duplicate", "maximum": 0, "null": "keep"}},
]
"""A pipeline of every kind of step that costs little beside reading and writing."""


def puna(files: list[str], workers: int, out: Path, pipeline: Any = "gopher") -> int:
    """puna's own engine, which stores all signals and can go on after a kill."""
    from puna.core.stage import validate
    from puna.data.curate.account import account, corpus_of
    from puna.data.curate.curation import Curation
    from puna.data.curate.settings import CurateParameters

    sources = [{"path": file} for file in files]
    given = {"sources": sources, "pipeline": pipeline, "workers": workers}
    pool = Curation(validate(CurateParameters, given, where="job"), out / "pool").run()
    return corpus_of(pool, out / "corpus", account(pool)).count


def puna_grown(files: list[str], workers: int, out: Path) -> int:
    """puna's own engine with the pipeline ``GROWN``."""
    return puna(files, workers, out, GROWN)


def plain(files: list[str], workers: int, out: Path) -> int:
    """multiprocessing over files, pyarrow's reader of JSON, a Parquet file each."""
    with multiprocessing.get_context("spawn").Pool(workers) as processes:
        return sum(
            processes.starmap(_file, [(file, str(out / f"{Path(file).stem}.parquet")) for file in files], 1)
        )


def _file(file: str, target: str) -> int:
    import pyarrow
    import pyarrow.json
    import pyarrow.parquet

    pyarrow.set_cpu_count(1)
    options = pyarrow.json.ReadOptions(use_threads=False, block_size=8 << 20)
    table = pyarrow.json.read_json(file, options).select(["id", "text"])
    kept = []
    for start in range(0, len(table), BATCH):
        part = table.slice(start, BATCH)
        kept.append(part.filter(pyarrow.array(keep(part["text"].to_pylist()))))
    left = pyarrow.concat_tables(kept)
    pyarrow.parquet.write_table(left, target, compression="zstd")
    return len(left)


try:
    from daft import DataType, method
except ImportError:  # The other engines do without.
    pass
else:

    class _Passing:
        """The operators as Daft calls them."""

        @method.batch(return_dtype=DataType.bool(), batch_size=BATCH)
        def __call__(self, texts: Any) -> list[bool]:
            return keep(texts.to_pylist())


def daft(files: list[str], workers: int, out: Path) -> int:
    """Daft's local engine; the operators as a class with an instance in each of several processes."""
    return _daft(files, out, use_process=True, max_concurrency=workers)


def daft_threads(files: list[str], workers: int, out: Path) -> int:
    """Daft's local engine; the operators in its own process."""
    return _daft(files, out, use_process=False)


def _daft(files: list[str], out: Path, **settings: Any) -> int:
    import daft as engine

    passing = engine.cls(_Passing, **settings)()
    # Without this its reader of JSON hands over one to three rows at a time (measured: 1.8 on average).
    frame = engine.read_json(files).select("id", "text").into_batches(BATCH)
    written = frame.where(passing(frame["text"])).write_parquet(str(out))
    return sum(_rows(Path(path)) for path in written.to_pydict()["path"])


def polars(files: list[str], workers: int, out: Path) -> int:
    """polars' streaming engine; the operators by ``map_batches``, on its threads."""
    import polars as engine

    def passing(texts: engine.Series) -> engine.Series:
        mask: list[bool] = []
        for start in range(0, len(texts), BATCH):
            mask += keep(texts[start : start + BATCH].to_list())
        return engine.Series(mask, dtype=engine.Boolean)

    frame = engine.scan_ndjson(files).select("id", "text")
    test = engine.col("text").map_batches(passing, return_dtype=engine.Boolean, is_elementwise=True)
    frame.filter(test).sink_parquet(out / "kept.parquet", engine="streaming")
    return _rows(out / "kept.parquet")


def _rows(file: Path) -> int:
    import pyarrow.parquet

    return int(pyarrow.parquet.read_metadata(file).num_rows)


ENGINES: dict[str, Callable[[list[str], int, Path], int]] = {
    "puna": puna,
    "multiprocessing": plain,
    "daft": daft,
    "daft, threads": daft_threads,
    "polars": polars,
}


def grown(size: int, files: Sequence[str]) -> Iterator[str]:
    """Texts of about ``size`` characters in all: stretches of 20 to 239 lines of real ones, drawn anew."""
    from puna.core.seeds import numpy_generator

    rows = Path(files[0]).read_text(encoding="utf-8").splitlines()
    texts = [json.loads(row)["text"] for row in rows]
    lines = [line for text in texts for line in text.split("\n") if line.strip()]
    draws = numpy_generator(0, "benchmark", "grown")
    made = 0
    while True:
        counts = draws.integers(20, 240, 4096).tolist()
        starts = draws.integers(0, len(lines) - 240, 4096).tolist()
        for count, start in zip(counts, starts, strict=True):
            text = "\n".join(lines[start : start + count])
            made += len(text)
            yield text
            if made >= size:
                return


def main() -> None:
    """Do the job given as the one argument."""
    job = json.loads(sys.argv[1])
    out = Path(job["out"])
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    # Under its own name, so that what other processes are sent can be found there.
    module = importlib.import_module("benchmarks.peers.curation_engines")
    engines = {**module.ENGINES, "puna, grown": module.puna_grown}
    kept = engines[job["engine"]](job["files"], job["workers"], out)
    seconds = time.perf_counter() - started
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    processor = sum(usage.ru_utime + usage.ru_stime for usage in used)
    print(json.dumps({"kept": kept, "seconds": seconds, "processor": processor}))


if __name__ == "__main__":
    main()
