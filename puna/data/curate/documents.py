"""The documents of a shard on their way through phases, in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import pyarrow
from numpy.typing import NDArray

from puna.data.curate.layout import strings
from puna.data.curate.texts import Texts


@dataclass
class Documents:
    """The documents of a shard as they come to a phase: those at ``rows`` of ``count`` in the shard."""

    count: int
    rows: NDArray[numpy.int64]
    ids: pyarrow.ChunkedArray
    sources: pyarrow.ChunkedArray
    texts: Texts
    sizes: NDArray[numpy.int64]
    contents: Sequence[bytes | None]
    """Raw pages, which only the first phase sees."""
    media: Sequence[str]

    @classmethod
    def of_table(cls, table: pyarrow.Table, rows: NDArray[numpy.int64], *, raw: bool) -> Documents:
        """The documents at ``rows`` of a shard's table as they were read; ``raw``: with their raw pages."""
        count = len(table)
        chosen = table if len(rows) == count else table.take(rows)
        columns = (strings(chosen[name]) for name in ("text", "language", "url", "meta"))
        pages = raw and chosen["content"].null_count < len(chosen)
        return cls(
            count,
            rows,
            chosen["id"],
            chosen["source"],
            Texts(*columns),
            chosen["bytes"].to_numpy().copy(),
            chosen["content"].to_pylist() if pages else [None] * len(rows),
            strings(chosen["media"]) if pages else [""] * len(rows),
        )

    def kept(
        self,
        dropped: NDArray[numpy.bool_],
        texts: Sequence[str | None],
        languages: Sequence[str | None],
        sizes: NDArray[numpy.int64],
    ) -> Documents:
        """The documents that are not ``dropped``, with what a phase made of them (None: as it was)."""
        places = numpy.flatnonzero(~dropped)
        before = self.texts
        after = before.replaced(texts).take(places)
        for new, place in enumerate(places.tolist()):
            tag = languages[place]
            if tag is not None:
                after.languages[new] = tag
        nothing: list[Any] = [None] * len(places)
        return Documents(
            self.count,
            self.rows[places],
            self.ids.take(places),
            self.sources.take(places),
            after,
            sizes[places],
            nothing,
            [""] * len(places),
        )
