"""Parts of the sources become shards: records as they are read, cut into tables of documents."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import islice

import pyarrow
import pyarrow.compute

from puna.core.files import write_json
from puna.core.stage import Parameters, validate
from puna.data.curate.layout import DOCUMENTS, write_table
from puna.data.curate.pool import Pool
from puna.data.curate.records import Limits, Record
from puna.data.curate.sources import PoolSource, reader_of


class _Source(Parameters):
    source: PoolSource


def read_part(pool: Pool, number: int) -> Iterator[tuple[str, pyarrow.Table]]:
    """Read a part of the sources into shards: the name of each and its documents, once they are written.

    The part's own file is written when all are there.
    """
    done = pool.part_file(number)
    if done.exists():
        return
    shards: list[str] = []
    counts = {"came": 0, "failed": 0, "bytes": 0}
    seconds, started = 0.0, time.perf_counter()
    for table, failed in _tables(pool, number):
        name = f"{number:06d}-{len(shards):05d}"
        file = pool.documents_file(name)
        if not file.exists():  # A part is read the same each time: what a killed run has written holds.
            write_table(file, table, few=("media", "source", "language", "failed"))
        shards.append(name)
        counts["came"] += len(table)
        counts["failed"] += failed
        counts["bytes"] += int(pyarrow.compute.sum(table["bytes"]).as_py())
        seconds += time.perf_counter() - started
        yield name, table
        started = time.perf_counter()  # What others do with the shard is not reading.
    seconds += time.perf_counter() - started
    write_json(done, {"shards": shards, "counts": {**counts, "seconds": seconds}})


def first_documents(pool: Pool) -> pyarrow.Table:
    """The first documents of the first part, about as many as make up a batch; nothing is written."""
    characters = pool.meta["batch_characters"]
    return next((table for table, _ in _tables(pool, 0, characters)), DOCUMENTS.empty_table())


def _tables(pool: Pool, number: int, size: int | None = None) -> Iterator[tuple[pyarrow.Table, int]]:
    """Tables of the documents of a part, of about ``size`` bytes each, and how many failed in each."""
    part = pool.meta["parts"][number]
    described = pool.meta["sources"][part["source"]]
    settings = validate(_Source, {"source": described}, where="sources").source
    reader = reader_of(settings)
    piece = reader.parts(settings)[part["index"]]
    records = islice(reader.read(settings, piece, Limits(**pool.meta["limits"])), settings.limit)
    for held in _cut(records, size or pool.meta["shard_bytes"]):
        yield _table(held, settings.title), sum(bool(record.failed) for record in held)


def _cut(records: Iterator[Record], size: int) -> Iterator[list[Record]]:
    """Records in lists of about ``size`` bytes."""
    held: list[Record] = []
    total = 0
    for record in records:
        held.append(record)
        total += len(record.text or "") + len(record.content or b"") + len(record.meta) + 200
        if total >= size:
            yield held
            held, total = [], 0
    if held:
        yield held


def _table(records: Sequence[Record], source: str) -> pyarrow.Table:
    columns = {
        "id": [f"{source}/{record.key}" for record in records],
        "text": [None if record.failed else record.text for record in records],
        "content": [record.content for record in records],
        "media": [record.media for record in records],
        "url": [record.url for record in records],
        "source": [source] * len(records),
        "language": [record.language for record in records],
        "meta": [record.meta for record in records],
        "failed": [record.failed or None for record in records],
    }
    arrays = {name: pyarrow.array(values, DOCUMENTS.field(name).type) for name, values in columns.items()}
    sizes = pyarrow.compute.fill_null(pyarrow.compute.binary_length(arrays["text"]), 0)
    arrays["bytes"] = sizes.cast(pyarrow.int64())
    return pyarrow.Table.from_arrays([arrays[name] for name in DOCUMENTS.names], schema=DOCUMENTS)
