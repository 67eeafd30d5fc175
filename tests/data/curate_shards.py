"""Global operators run over shards in memory, without a pool."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from puna.data.curate.operator import Resolved, checked, get_operator
from puna.data.curate.texts import Texts


class Stored:
    """A sketch in memory."""

    def __init__(self, columns: dict[str, Any], texts: Texts) -> None:
        self.columns = columns
        self.count = texts.count
        for name, column in columns.items():
            rows = len(column[1]) - 1 if isinstance(column, tuple) else len(column)
            assert rows == texts.count, name

    def ids(self) -> list[str]:
        raise AssertionError("these operators ask for no ids")

    def read(self, name: str) -> NDArray[Any]:
        return self.columns[name]

    def ragged(self, name: str) -> tuple[NDArray[Any], NDArray[numpy.int64]]:
        return self.columns[name]


def over_shards(name: str, shards: Sequence[Texts], **settings: Any) -> Iterator[Resolved]:
    """What a global operator says of each shard, its signals checked against those it declares."""
    operator = get_operator("global", name)
    chosen = operator.settings(**settings)
    sketches = [Stored(dict(operator.function.sketch(texts, chosen)), texts) for texts in shards]
    for resolved, texts in zip(
        operator.function.resolve(sketches, chosen, Path("unused")), shards, strict=True
    ):
        yield Resolved(checked(operator, resolved.signals, texts.count), resolved.cut)


def signal(name: str, shards: Sequence[Sequence[str]], of: str, **settings: Any) -> NDArray[numpy.float64]:
    """One signal of all documents of all shards."""
    batches = [Texts(shard) for shard in shards]
    return numpy.concatenate([r.signals[of] for r in over_shards(name, batches, **settings)])
