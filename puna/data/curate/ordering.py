"""Survivors in the order of a signal, for curricula: sorted in two passes, with memory for one shard.

The place of each survivor is found over the signal alone, a number per document. The first pass cuts each
shard by the places its rows go to, the second puts the cuts of each new shard together and sorts them.
Equal values keep the order in which the documents were read; null values come last.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy
import pyarrow
import pyarrow.compute
import pyarrow.parquet
from numpy.typing import NDArray

from puna.core.errors import PunaError, unknown_name
from puna.data.curate.layout import read_table, write_table
from puna.data.curate.operator import Spans
from puna.data.curate.order import Order
from puna.data.curate.pool import Pool

Counts = Mapping[tuple[str, str], Mapping[str, int]]


def in_order(pool: Pool, order: Order, work: Path) -> list[tuple[Path, Counts]]:
    """Files of survivors in order below ``work``, with their counts by (source, language)."""
    signals = pool.pipeline.signals()
    if order.signal not in signals:
        raise unknown_name("signal", order.signal, signals, where="order")
    if signals[order.signal]:
        raise PunaError("survivors are ordered by one number each", where="order", found=order.signal)
    shards = [shard for shard in pool.shards() if _rows(pool, shard)]
    sizes = [_rows(pool, shard) for shard in shards]
    values = numpy.concatenate([_values(pool, shard, order) for shard in shards] or [numpy.zeros(0)])
    places = numpy.empty(len(values), dtype=numpy.int64)
    places[numpy.argsort(values, kind="stable")] = numpy.arange(len(values))
    each = max(-(-len(values) // max(len(shards), 1)), 1)
    shutil.rmtree(work, ignore_errors=True)
    start = 0
    for shard, size in zip(shards, sizes, strict=True):
        mine = places[start : start + size]
        table = read_table(pool.survivors_file(shard)).append_column("place", pyarrow.array(mine))
        for bucket in numpy.unique(mine // each).tolist():
            cut = table.filter(pyarrow.array(mine // each == bucket))
            write_table(work / f"{bucket:05d}" / f"{shard}.parquet", cut)
        start += size
    return [_sorted(folder) for folder in sorted(work.iterdir())] if shards else []


def _sorted(folder: Path) -> tuple[Path, Counts]:
    table = pyarrow.concat_tables([read_table(file) for file in sorted(folder.iterdir())])
    table = table.sort_by("place").drop_columns(["place"])
    file = folder.with_suffix(".parquet")
    write_table(file, table)
    shutil.rmtree(folder)
    return file, counts_of(table)


def counts_of(table: pyarrow.Table) -> Counts:
    """Rows, words and bytes of a table of documents by (source, language), with "" for all of them."""
    counts: dict[tuple[str, str], dict[str, int]] = {}
    columns = (table[name].to_pylist() for name in ("text", "source", "language"))
    for text, source, language in zip(*columns, strict=True):
        words, size = len(text.split()), len(text.encode("utf-8"))
        for key in (("", ""), (source, ""), ("", language)):
            total = counts.setdefault(key, {"rows": 0, "words": 0, "bytes": 0})
            total["rows"] += 1
            total["words"] += words
            total["bytes"] += size
    return counts


def _rows(pool: Pool, shard: str) -> int:
    return int(pyarrow.parquet.read_metadata(pool.survivors_file(shard)).num_rows)


def _values(pool: Pool, shard: str, order: Order) -> NDArray[numpy.float64]:
    """[survivors] what a shard's survivors are ordered by, the least first."""
    stored = pool.signal(shard, order.signal)
    assert not isinstance(stored, Spans)
    ids = read_table(pool.documents_file(shard), ["id"])["id"]
    rows = pyarrow.compute.index_in(read_table(pool.survivors_file(shard), ["id"])["id"], value_set=ids)
    values: NDArray[numpy.float64] = stored[rows.to_numpy()]
    return -values if order.descending else values
