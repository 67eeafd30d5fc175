"""Sketches on disk: what a global operator stored of each shard, read when it asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray

from puna.data.curate.documents import Documents
from puna.data.curate.gates import characters_of
from puna.data.curate.layout import read_table, strings, write_table
from puna.data.curate.operator import SketchColumns
from puna.data.curate.pipeline import Step

_ID = "#id"
_CHARACTERS = characters_of("")


class StoredSketch:
    """The sketch of one shard; nothing of it is kept in memory."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.count = int(pyarrow.parquet.read_metadata(file).num_rows)

    def ids(self) -> list[str]:
        """The documents' ids."""
        return strings(read_table(self.file, [_ID])[_ID])

    def characters(self) -> NDArray[numpy.int64]:
        """[count] characters of the documents."""
        return self.read(_CHARACTERS)

    def read(self, name: str) -> NDArray[Any]:
        """[count, ...] a stored column."""
        column = read_table(self.file, [name])[name].combine_chunks()
        if not pyarrow.types.is_fixed_size_list(column.type):
            return numpy.asarray(column.to_numpy(zero_copy_only=False))
        values = column.flatten().to_numpy(zero_copy_only=False)
        return numpy.asarray(values).reshape(len(column), column.type.list_size)

    def ragged(self, name: str) -> tuple[NDArray[Any], NDArray[numpy.int64]]:
        """A stored ragged column: its values [n] and the bounds [count + 1] of each document's."""
        column = read_table(self.file, [name])[name].combine_chunks()
        bounds = column.offsets.to_numpy().astype(numpy.int64)
        return column.flatten().to_numpy(zero_copy_only=False), bounds - bounds[0]


def write_sketch(file: Path, step: Step, documents: Documents, batches: Sequence[tuple[int, int]]) -> None:
    """Sketch the documents of a shard for a global operator, batch by batch."""
    assert step.operator is not None
    made: list[SketchColumns] = []
    for start, stop in batches or [(0, 0)]:  # An empty shard has a sketch, too.
        whole = stop - start == documents.texts.count
        texts = documents.texts if whole else documents.texts.take(numpy.arange(start, stop))
        made.append(step.operator.function.sketch(texts, step.settings))
        texts.forget()
    columns: dict[str, pyarrow.ChunkedArray] = {}
    for name in made[0]:
        columns[name] = pyarrow.chunked_array([_array(columns_[name]) for columns_ in made])
    columns[_ID] = documents.ids
    columns[_CHARACTERS] = pyarrow.array(documents.texts.lengths)
    write_table(file, pyarrow.table(columns))


def _array(values: Any) -> pyarrow.Array:
    if isinstance(values, tuple):
        inside, bounds = values
        offsets = pyarrow.array(bounds, pyarrow.int64())
        return pyarrow.LargeListArray.from_arrays(offsets, pyarrow.array(inside))
    values = numpy.ascontiguousarray(values)
    if values.ndim == 1:
        return pyarrow.array(values)
    return pyarrow.FixedSizeListArray.from_arrays(
        pyarrow.array(values.reshape(-1)), int(numpy.prod(values.shape[1:]))
    )
