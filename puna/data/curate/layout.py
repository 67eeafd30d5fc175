"""How a pool lies on disk: Parquet files of columns, row-aligned per shard, and what is told with them.

``documents/`` holds what was read and is written once. Each phase leaves ``signals-K-HASH/`` (edited texts,
signals, failures) and ``decisions-K-HASH/`` (which gate dropped which document), and, where a step needs
all documents, ``sketch-K-HASH/`` and ``resolved-K-HASH/``. The hashes change with all that the content
depends on, so a pool that is worked on with other thresholds keeps what still holds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray

from puna.core.errors import PunaError
from puna.core.files import write_aside
from puna.data.curate.operator import Spans

DOCUMENTS = pyarrow.schema(
    [
        ("id", pyarrow.string()),
        ("text", pyarrow.string()),
        ("content", pyarrow.binary()),
        ("media", pyarrow.string()),
        ("url", pyarrow.string()),
        ("source", pyarrow.string()),
        ("language", pyarrow.string()),
        ("meta", pyarrow.string()),
        ("failed", pyarrow.string()),
        ("bytes", pyarrow.int64()),
    ]
)
_TOLD = b"puna"


def write_table(
    path: Path, table: pyarrow.Table, told: Mapping[str, Any] | None = None, *, few: Sequence[str] = ()
) -> None:
    """Write a table aside and rename it into place; ``told`` lies with it as JSON.

    Columns of a ``few`` different values are written by a list of these; to look for such a list costs more
    than it saves where every value is another.
    """
    if told is not None:
        table = table.replace_schema_metadata({_TOLD: json.dumps(told).encode()})
    with write_aside(path, sync=False) as aside:
        pyarrow.parquet.write_table(
            table, aside, compression="zstd", write_statistics=False, use_dictionary=list(few)
        )


def read_table(path: Path, columns: Sequence[str] | None = None) -> pyarrow.Table:
    """A file's table, or some columns of it; a file that cannot be read is a :class:`PunaError`."""
    try:
        # Without what pays for remote files and many threads: most files of a pool are small.
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            table = file.read(None if columns is None else list(columns), use_threads=False)
        for name in columns or ():
            if name not in table.column_names:
                raise KeyError(name)
        return table
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        raise PunaError(
            "a file of the pool cannot be read", where=path, found=error, fix="remove the file and run again"
        ) from None


def told_with(path: Path) -> dict[str, Any]:
    """What was written with a table."""
    try:
        metadata = pyarrow.parquet.read_schema(path).metadata or {}
    except (pyarrow.ArrowException, OSError) as error:
        raise PunaError(
            "a file of the pool cannot be read", where=path, found=error, fix="remove the file and run again"
        ) from None
    return dict(json.loads(metadata.get(_TOLD, b"{}")))


def strings(column: pyarrow.ChunkedArray, nothing: str = "") -> list[str]:
    """A column of texts; null is ``nothing``."""
    return [nothing if value is None else value for value in column.to_pylist()]


def column_of(values: NDArray[numpy.float64] | Spans, count: int) -> pyarrow.Array:
    """A signal of ``count`` documents as a column: numbers (nan is null), or lists of spans."""
    if not isinstance(values, Spans):
        return pyarrow.array(values, mask=numpy.isnan(values))
    offsets = numpy.searchsorted(values.document, numpy.arange(count + 1)).astype(numpy.int32)
    parts = {"start": values.starts, "end": values.ends}
    arrays = [pyarrow.array(part, pyarrow.int64()) for part in parts.values()]
    arrays.append(pyarrow.array(values.values, mask=numpy.isnan(values.values)))
    return pyarrow.ListArray.from_arrays(
        pyarrow.array(offsets), pyarrow.StructArray.from_arrays(arrays, [*parts, "value"])
    )


def signal_of(column: pyarrow.ChunkedArray) -> NDArray[numpy.float64] | Spans:
    """The inverse of :func:`column_of`."""
    array = column.combine_chunks()
    if not pyarrow.types.is_list(array.type):
        return numpy.asarray(array.to_numpy(zero_copy_only=False), dtype=numpy.float64)
    lengths = numpy.diff(array.offsets.to_numpy())
    inside = array.flatten()
    return Spans(
        numpy.repeat(numpy.arange(len(array)), lengths),
        inside.field("start").to_numpy(zero_copy_only=False).astype(numpy.int64),
        inside.field("end").to_numpy(zero_copy_only=False).astype(numpy.int64),
        inside.field("value").to_numpy(zero_copy_only=False).astype(numpy.float64),
    )


def at_rows(
    values: NDArray[numpy.float64] | Spans, rows: NDArray[numpy.int64], count: int
) -> NDArray[numpy.float64] | Spans:
    """A signal of some documents, at their rows among ``count``; the others have none."""
    if isinstance(values, Spans):
        return Spans(rows[values.document], values.starts, values.ends, values.values)
    column = numpy.full(count, numpy.nan)
    column[rows] = values
    return column


def of_rows(
    values: NDArray[numpy.float64] | Spans, rows: NDArray[numpy.int64], count: int
) -> NDArray[numpy.float64] | Spans:
    """A signal of ``count`` documents, of those at ``rows`` alone: the inverse of :func:`at_rows`."""
    if not isinstance(values, Spans):
        return values[rows]
    place = numpy.full(count, -1)
    place[rows] = numpy.arange(len(rows))
    moved = place[values.document]
    kept = moved >= 0
    return Spans(moved[kept], values.starts[kept], values.ends[kept], values.values[kept])
