"""How a corpus lies on disk: ``corpus.json`` beside Parquet shards, read by any room.

The room ``data`` writes corpora and checks them; rooms above it need a column or two.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from puna.core.errors import PunaError
from puna.core.files import read_json

META = "corpus.json"
"""The file that tells about a corpus; its key ``shards`` lists the Parquet files."""


def corpus_kind(folder: Path | str) -> str:
    """The kind of rows in a corpus folder, as its ``corpus.json`` says."""
    meta = read_json(Path(folder) / META)
    if not isinstance(meta, dict) or not isinstance(meta.get("kind"), str):
        raise PunaError("corpus.json names no kind", where=Path(folder) / META, fix="make the corpus again")
    return str(meta["kind"])


def read_columns(folder: Path | str, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """The values of ``columns`` of every row of a corpus, in order; memory does not grow with it."""
    meta = read_json(Path(folder) / META)
    shards = [Path(folder) / shard["file"] for shard in meta.get("shards", ())]
    if not shards:
        raise PunaError("corpus.json names no shards", where=Path(folder) / META, fix="make the corpus again")
    yield from read_shards(shards, columns)


def read_shards(shards: Iterable[Path], columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """The values of ``columns`` of every row of some Parquet files, in order."""
    import pyarrow
    import pyarrow.parquet

    for shard in shards:
        try:
            with pyarrow.parquet.ParquetFile(shard) as opened:
                for batch in opened.iter_batches(columns=list(columns)):
                    yield from zip(*(batch.column(name).to_pylist() for name in columns), strict=True)
        except (pyarrow.ArrowException, OSError, KeyError) as error:
            raise PunaError(
                "a shard of the corpus cannot be read", where=shard, found=error, fix="make the corpus again"
            ) from None
