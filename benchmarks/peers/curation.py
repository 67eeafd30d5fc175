"""One side of the curation benchmark in a process of its own: it curates the files of a job.

    python benchmarks/peers/curation.py JOB.json RESULT.json

It runs under the interpreter of the peer, which knows nothing of puna: what a side needs is imported in it.
A job names the side, the work, the JSON lines to read, a folder to write to and how many workers may run.
What is written is what the work took, from the first document read to the last survivor written: seconds,
seconds of processor time (of this process and of its workers), peak memory (of the largest process, and of
all at once as far as they are started one by one), and seconds of each step as the side itself tells them.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

Steps = dict[str, float]
Side = Callable[[dict[str, Any]], Callable[[], Steps]]


def puna(job: dict[str, Any]) -> Callable[[], Steps]:
    """The stage ``curate``, as a user has it, up to the corpus of survivors."""
    from puna.data.curate.account import account, corpus_of
    from puna.data.curate.curation import CurateParameters, Curation
    from puna.data.curate.operator import all_operators

    all_operators()
    folder = Path(job["out"])
    parameters = CurateParameters(
        sources=[{"format": "jsonl", "path": file, "name": Path(file).stem} for file in job["files"]],
        pipeline=job["pipeline"],
        executor="here" if job["workers"] == 1 else "processes",
        workers=job["workers"],
    )

    def run() -> Steps:
        pool = Curation(parameters, folder / "pool").run()
        counts = account(pool)
        corpus_of(pool, folder / "corpus", counts)
        return {label: count.seconds for label, count in counts.items() if count.seconds}

    return run


def datatrove(job: dict[str, Any]) -> Callable[[], Steps]:
    """datatrove's pipeline on its local executor, with spaCy's words or, patched in, those of str.split."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.filters import (
        GopherQualityFilter,
        GopherRepetitionFilter,
        gopher_quality_filter,
        gopher_repetition_filter,
    )
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.text import split_into_words

    if job["words"] == "white_space":
        for module in (gopher_quality_filter, gopher_repetition_filter):
            module.split_into_words = lambda text, language: text.split()
    else:
        split_into_words("Words are split once before the clock runs.", "eng")
    folder = Path(job["files"][0]).parent
    out = Path(job["out"])
    executor = LocalPipelineExecutor(
        pipeline=[
            JsonlReader(str(folder), glob_pattern="*.jsonl", text_key="text", id_key="id"),
            GopherQualityFilter(),
            GopherRepetitionFilter(),
            JsonlWriter(str(out / "kept"), compression=None),
        ],
        tasks=len(job["files"]),
        workers=job["workers"],
        logging_dir=str(out / "logs"),
    )

    def run() -> Steps:
        stats = executor.run()
        return {step.name: step.time_stats.total for step in stats.stats}

    return run


def data_juicer(job: dict[str, Any]) -> Callable[[], Steps]:
    """py-data-juicer's operators one after another, as its executor runs them, fused or not.

    Its models and lists of words are those that puna has; nothing is fetched. Every operator runs over a few
    documents before the clock does, since the first one imports what all need.
    """
    home = Path(job["out"]) / "home"
    (home / "models").mkdir(parents=True)
    (home / "assets").mkdir()
    (home / "models" / "lid.176.bin").symlink_to(job["model"])
    (home / "assets" / "flagged_words.json").symlink_to(job["words"])
    os.environ.update(DATA_JUICER_CACHE_HOME=str(home), HF_HUB_OFFLINE="1")

    import datasets
    from data_juicer.core.data import NestedDataset
    from data_juicer.ops import load_ops
    from data_juicer.ops.op_fusion import fuse_operators
    from loguru import logger

    logger.remove()
    datasets.disable_caching()
    datasets.disable_progress_bars()
    shared = {"num_proc": job["workers"], "auto_op_parallelism": False}
    recipe = [{name: {**values, **shared}} for step in job["recipe"] for name, values in step.items()]
    operators = load_ops(recipe)
    operators = fuse_operators(operators) if job["fused"] else operators
    few = [{"text": f"The committee met on day {n} to speak about roads and schools."} for n in range(50)]
    warm = NestedDataset(datasets.Dataset.from_list(few))
    for operator in load_ops(recipe):
        warm = operator.run(warm) if len(warm) else NestedDataset(datasets.Dataset.from_list(few))

    def run() -> Steps:
        read = datasets.load_dataset(
            "json", data_files=job["files"], split="train", cache_dir=str(home / "hf")
        )
        data, steps = NestedDataset(read), {}
        for operator in operators:
            started = _used()[1]
            data = operator.run(data)
            steps[operator._name] = _used()[1] - started
        (Path(job["out"]) / "kept").mkdir()
        data.to_json(str(Path(job["out"]) / "kept" / "kept.jsonl"))
        return steps

    return run


def _duplicates() -> dict[str, Side]:
    """The sides of the benchmark of MinHash, in the file beside this one."""
    sys.path.insert(0, str(Path(__file__).parent))
    from duplicates import SIDES

    return dict(SIDES)


SIDES: dict[str, Side] = {
    "puna": puna,
    "datatrove": datatrove,
    "data_juicer": data_juicer,
    **_duplicates(),
}


def _used() -> tuple[float, float]:
    """Wall and processor seconds so far, those of finished children included."""
    each = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(usage.ru_utime + usage.ru_stime for usage in each)


def _resident() -> int:
    """Bytes that this process and its children hold now."""
    total, todo = 0, [str(threading.main_thread().native_id)]
    while todo:
        process = todo.pop()
        try:
            total += int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize()
            for thread in Path(f"/proc/{process}/task").iterdir():
                todo += (thread / "children").read_text().split()
        except OSError:  # it has ended meanwhile
            continue
    return total


def _warm_up(job: dict[str, Any]) -> None:
    """Run the side over a few documents: what is imported and built on first use is no document's cost."""
    few = Path(job["out"]) / "few"
    (few / "in").mkdir(parents=True)
    with open(job["files"][0], encoding="utf-8") as lines:
        (few / "in" / "0.jsonl").write_text("".join(islice(lines, 100)), encoding="utf-8")
    SIDES[job["side"]]({**job, "files": [str(few / "in" / "0.jsonl")], "out": str(few / "out")})()


def main() -> None:
    """Do the job and write the result."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if job["side"] != "data_juicer":  # It has its own few.
        _warm_up(job)
    run = SIDES[job["side"]](job)
    before = _resident()
    peak, done = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.1):
            peak = max(peak, _resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    wall, processor = _used()
    steps = run()
    wall_after, processor_after = _used()
    done.set()
    watcher.join()
    result = {
        "seconds": wall_after - wall,
        "processor": processor_after - processor,
        "peak": peak,
        "before": before,
        "steps": steps,
    }
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
