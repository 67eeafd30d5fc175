"""Columns out of a corpus folder, for rooms above the one that makes corpora."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from puna.core.errors import PunaError
from puna.core.files import read_json

_META = "corpus.json"


def corpus_kind(folder: Path | str) -> str:
    """The kind of rows in a corpus folder, as its ``corpus.json`` says."""
    meta = read_json(Path(folder) / _META)
    if not isinstance(meta, dict) or not isinstance(meta.get("kind"), str):
        raise PunaError("corpus.json names no kind", where=Path(folder) / _META, fix="make the corpus again")
    return str(meta["kind"])


def read_columns(folder: Path | str, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """The values of ``columns`` of every row of a corpus, in order; memory does not grow with it."""
    import pyarrow
    import pyarrow.parquet

    meta = read_json(Path(folder) / _META)
    shards = [Path(folder) / shard["file"] for shard in meta.get("shards", ())]
    if not shards:
        raise PunaError(
            "corpus.json names no shards", where=Path(folder) / _META, fix="make the corpus again"
        )
    for shard in shards:
        try:
            with pyarrow.parquet.ParquetFile(shard) as opened:
                for batch in opened.iter_batches(columns=list(columns)):
                    yield from zip(*(batch.column(name).to_pylist() for name in columns), strict=True)
        except (pyarrow.ArrowException, OSError, KeyError) as error:
            raise PunaError(
                "a shard of the corpus cannot be read", where=shard, found=error, fix="make the corpus again"
            ) from None
