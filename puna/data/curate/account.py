"""What became of all documents: the ledger of a pool, step by step, and the corpus of what is kept."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from puna.core import assets
from puna.core.files import read_json
from puna.data.corpus import Corpus, assemble_corpus
from puna.data.curate.execute import Count
from puna.data.curate.layout import told_with
from puna.data.curate.order import Order
from puna.data.curate.ordering import in_order
from puna.data.curate.pool import Pool
from puna.data.curate.shard import ordered

READ = "read"
WRITE = "not empty"


def account(pool: Pool) -> dict[str, Count]:
    """What came to each step and what became of it, over all shards, in the order in which steps are run.

    The first entry is what was read, the last what was left without text at the end. What one step keeps
    comes to the next.
    """
    total = {READ: Count()}
    for number in range(len(pool.meta["parts"])):
        read = pool.part(number)["counts"]
        failed = int(read["failed"])
        came = int(read["came"])
        total[READ].add(Count(came, came - failed, 0, failed, read["seconds"], int(read["bytes"])))
    orders = pool.meta.get("order") or {}
    for phase in pool.phases:
        if phase.entry is not None and phase.entry.kind == "global":
            before = list(total.values())[-1]
            seconds = read_json(pool.folder("resolved", phase.index) / "seconds.json")
            total[phase.entry.label] = Count(before.kept, before.kept, 0, 0, seconds, before.bytes)
        for step in ordered(phase, orders.get(str(phase.index))):
            total[step.label] = Count()
        for shard in pool.shards():
            for label, count in pool.counts_of(phase.index, shard).items():
                total[label].add(Count(**count))  # type: ignore[arg-type]
    total[WRITE] = Count()
    for shard in pool.shards():
        told = told_with(pool.survivors_file(shard))
        rows = told["counts"].get("/", {"rows": 0, "bytes": 0})
        empty = int(told["empty"])
        total[WRITE].add(Count(rows["rows"] + empty, rows["rows"], empty, 0, 0.0, rows["bytes"]))
    return total


def ledger_of(counts: Mapping[str, Count]) -> dict[str, Any]:
    """An account as the ledger of a corpus, with seconds and bytes."""
    return {
        label: {
            "unit": "documents",
            "read": count.came,
            "kept": count.kept,
            "dropped": _without_zero({"gate": count.dropped, "failed": count.failed}),
            "seconds": round(count.seconds, 4),
            "bytes": count.bytes,
        }
        for label, count in counts.items()
    }


def _without_zero(numbers: dict[str, int]) -> dict[str, int]:
    return {name: number for name, number in numbers.items() if number}


def corpus_of(pool: Pool, folder: Path, counts: Mapping[str, Count], order: Order | None = None) -> Corpus:
    """The survivors of a pool as a corpus of documents, as they were read or in an ``order``."""
    provenance, ledger = _provenance(pool), ledger_of(counts)
    work = pool.path / "ordered"
    if order is not None:
        shards = in_order(pool, order, work)
    else:
        shards = []
        for shard in pool.shards():
            told = told_with(pool.survivors_file(shard))["counts"]
            by_key = {(source, tag): number for (source, tag), number in _keys(told)}
            shards.append((pool.survivors_file(shard), by_key))
    corpus = assemble_corpus(folder, "documents", shards, provenance=provenance, ledger=ledger)
    shutil.rmtree(work, ignore_errors=True)
    return corpus


def _keys(told: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], dict[str, int]]]:
    """Counts by (source, language), which are written as ``source/`` and ``/language``."""
    for key, number in told.items():
        source, _, language = key.rpartition("/")
        yield (source, language), number


def _provenance(pool: Pool) -> list[dict[str, Any]]:
    """Where the documents came from, with the pipeline they went through."""
    told = []
    for settings in pool.meta["sources"]:
        asset = settings.get("asset")
        licence = settings.get("licence") or (assets.describe(asset).licence if asset else "unknown")
        told.append({"source": settings.get("name") or settings.get("path") or asset, "licence": licence})
        told[-1] |= {"format": settings["format"], "pipeline": pool.pipeline.name, "settings": settings}
    return told
