"""Global operators over batches in memory: for scripts, tests and measurements that need no pool."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy
from numpy.typing import NDArray

from puna.data.curate.operator import Resolved, SketchColumns, checked, get_operator
from puna.data.curate.texts import Texts


class HeldSketch:
    """The sketch of one batch, held in memory."""

    def __init__(self, columns: SketchColumns, texts: Texts, ids: list[str] | None = None) -> None:
        self.columns = columns
        self.count = texts.count
        self._ids = ids if ids is not None else list(map(str, range(texts.count)))
        for name, column in columns.items():
            rows = len(column[1]) - 1 if isinstance(column, tuple) else len(column)
            if rows != texts.count:
                raise ValueError(f"{name}: {rows} rows for {texts.count} documents")

    def ids(self) -> list[str]:
        """The documents' ids: their numbers in the batch, if none were given."""
        return self._ids

    def read(self, name: str) -> NDArray[Any]:
        """[count, ...] a stored column."""
        return numpy.asarray(self.columns[name])

    def ragged(self, name: str) -> tuple[NDArray[Any], NDArray[numpy.int64]]:
        """A stored ragged column: its values [n] and the bounds [count + 1] of each document's."""
        column = self.columns[name]
        if not isinstance(column, tuple):
            raise ValueError(f"{name}: not a ragged column")
        return column


def over_batches(name: str, batches: Iterable[Texts], **settings: Any) -> Iterator[Resolved]:
    """What the global operator ``name`` says of each batch, in order; the batches may come from a generator.

    What was derived of a batch is let go when it has been sketched, so that memory holds the sketches and
    one batch, besides what the operator says.
    """
    operator = get_operator("global", name)
    chosen = operator.settings(**settings)
    sketches = []
    for texts in batches:
        sketches.append(HeldSketch(operator.function.sketch(texts, chosen), texts))
        texts.forget()
    with TemporaryDirectory() as work:
        resolved = operator.function.resolve(sketches, chosen, Path(work))
        for told, sketch in zip(resolved, sketches, strict=True):
            yield Resolved(checked(operator, told.signals, sketch.count), told.cut)
