"""Corpora on disk: Parquet shards of one kind of rows, and ``corpus.json`` that tells all about them."""

from __future__ import annotations

import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from puna.core.errors import PunaError
from puna.core.files import fingerprint, folder_aside, read_json, sha256_of, write_json
from puna.core.rows import META, read_shards
from puna.data.kinds import (
    COLUMNS,
    BadRowError,
    Kind,
    check_row,
    known_kind,
    labels_of,
    languages_of,
    texts_of,
)
from puna.data.ledger import Ledger, unbalanced

KINDS: tuple[Kind, ...] = tuple(COLUMNS)
_FORMAT = 1
_ROWS_PER_GROUP = 2_000
_ROWS_PER_SHARD = 200_000
_NEEDED = {"format": int, "kind": str, "counts": dict, "shards": list, "provenance": list, "ledger": dict}


class Corpus:
    """Rows of one declared kind in a folder. Made by :func:`write_corpus`, opened by :meth:`open`."""

    def __init__(self, path: Path, kind: Kind, meta: dict[str, Any]) -> None:
        self.path = path
        self.kind = kind
        self.meta = meta
        """What ``corpus.json`` holds: counts, also by source, language and label, provenance, shards."""

    @classmethod
    def open(cls, path: Path | str, *, kind: str | None = None) -> Corpus:
        """Open the corpus in the folder ``path``; with ``kind``, one of another kind is an error.

        Sizes of the shards are compared with ``corpus.json``; :meth:`verify` compares their bytes.
        """
        folder = Path(path)
        if not (folder / META).is_file():
            fix = "make a corpus first: puna stage corpus" if folder.exists() else "check the path"
            raise PunaError(
                "not a corpus: a folder with corpus.json and Parquet shards", where=folder, fix=fix
            )
        meta = read_json(folder / META)
        _check_meta(folder / META, meta)
        found = known_kind(meta["kind"], where=folder / META)
        if kind is not None and found != kind:
            raise PunaError(
                "a corpus of another kind is needed here", where=folder, found=found, expected=kind
            )
        for shard in meta["shards"]:
            file = folder / shard["file"]
            size = file.stat().st_size if file.is_file() else None
            if size != shard["bytes"]:
                raise PunaError(
                    "a shard of the corpus is missing or not whole",
                    where=file,
                    found="no file" if size is None else f"{size:,} bytes",
                    expected=f"{shard['bytes']:,} bytes",
                    fix="make the corpus again",
                )
        return cls(folder, found, meta)

    @property
    def count(self) -> int:
        """Number of rows."""
        return int(self.meta["counts"]["rows"])

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the kind and the content of the rows."""
        return fingerprint([self.kind, [shard["sha256"] for shard in self.meta["shards"]]])

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that its rows have, sorted; a corpus without labels is an error."""
        if not self.kind.startswith("labelled"):
            raise PunaError(
                "the rows of this corpus have no labels",
                where=self.path,
                found=self.kind,
                expected="labelled_texts or labelled_words",
            )
        return tuple(sorted(self.meta["labels"]))

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows in order, as dictionaries with the columns of the kind."""
        columns = list(COLUMNS[self.kind])
        shards = (self.path / shard["file"] for shard in self.meta["shards"])
        for values in read_shards(shards, columns):
            yield dict(zip(columns, values, strict=True))

    def texts(self) -> Iterator[str]:
        """The text of every document; a corpus of another kind is an error."""
        if self.kind != "documents":
            raise PunaError("only documents have one text", where=self.path, found=self.kind)
        for row in self.rows():
            yield row["text"]

    def verify(self) -> None:
        """Compare every shard's SHA-256 with the one noted; a difference is a :class:`PunaError`."""
        for shard in self.meta["shards"]:
            found = sha256_of(self.path / shard["file"])
            if found != shard["sha256"]:
                raise PunaError(
                    "a shard of the corpus was changed",
                    where=self.path / shard["file"],
                    found=found,
                    expected=shard["sha256"],
                    fix="make the corpus again",
                )


def write_corpus(
    folder: Path | str,
    kind: str,
    rows: Iterable[Mapping[str, Any]],
    *,
    provenance: Sequence[Mapping[str, Any]],
    ledger: Ledger | Mapping[str, Any],
) -> Corpus:
    """Write ``rows`` as a corpus into ``folder``, streamed; the folder appears whole or not at all.

    ``provenance`` says per source where it came from (keys ``source`` and ``licence`` at least);
    ``ledger`` may still be filled while ``rows`` is read. A row that is not of the kind, an id that
    comes twice, no row at all, or a ledger that does not add up is a :class:`PunaError`.
    """
    known = known_kind(kind, where=folder)
    with folder_aside(folder) as aside:
        writer = _Writer(aside, known)
        try:
            for row in rows:
                writer.add(row)
        finally:
            writer.close()
        if not writer.rows:
            raise PunaError(
                "no row is left to write", where=folder, fix="see the ledger for what was dropped"
            )
        counted = ledger.as_json() if isinstance(ledger, Ledger) else dict(ledger)
        _describe(aside, known, writer, provenance, counted)
    return Corpus.open(folder)


def assemble_corpus(
    folder: Path | str,
    kind: str,
    shards: Iterable[tuple[Path, Mapping[tuple[str, str], Mapping[str, int]]]],
    *,
    provenance: Sequence[Mapping[str, Any]],
    ledger: Mapping[str, Any],
) -> Corpus:
    """Make a corpus of Parquet files that hold checked rows of the kind, with their counts.

    Counts are by (source, language), with "" for all of them, as rows, words and bytes. The files are
    linked where that is possible, and copied elsewhere.
    """
    known = known_kind(kind, where=folder)
    with folder_aside(folder) as aside:
        writer = _Writer(aside, known)
        for path, counts in shards:
            rows = counts.get(("", ""), {}).get("rows", 0)
            if not rows:
                continue
            file = aside / f"rows-{len(writer.shards):05d}.parquet"
            try:
                os.link(path, file)
            except OSError:
                shutil.copy2(path, file)
            size = file.stat().st_size
            writer.shards.append({"file": file.name, "rows": rows, "bytes": size, "sha256": sha256_of(file)})
            for key, count in counts.items():
                for unit, number in count.items():
                    writer.counts[key][unit] += number
        if not writer.shards:
            raise PunaError("no row is left", where=folder, fix="see the ledger for what was dropped")
        _describe(aside, known, writer, provenance, ledger)
    return Corpus.open(folder)


def _describe(
    folder: Path,
    kind: Kind,
    writer: _Writer,
    provenance: Sequence[Mapping[str, Any]],
    ledger: Mapping[str, Any],
) -> None:
    """Write ``corpus.json`` about what a writer has written."""
    wrong = unbalanced(ledger)
    if wrong is not None:
        raise PunaError(f"the counts of step {wrong!r} do not add up", where=folder, found=ledger[wrong])
    meta = {
        "format": _FORMAT,
        "kind": kind,
        "schema": COLUMNS[kind],
        "counts": dict(writer.counts["", ""]),
        "sources": writer.counts_by(0),
        "languages": writer.counts_by(1),
        "licences": sorted({str(entry.get("licence", "unknown")) for entry in provenance}),
        "provenance": [dict(entry) for entry in provenance],
        "ledger": dict(ledger),
        "shards": writer.shards,
    }
    if writer.labels:
        meta["labels"] = dict(sorted(writer.labels.items()))
    write_json(folder / META, meta)


class _Writer:
    """Writes rows into Parquet shards and counts rows, words and bytes by source and language."""

    def __init__(self, folder: Path, kind: Kind) -> None:
        self.folder = folder
        self.kind = kind
        self.schema = pyarrow.schema([(name, _ARROW[shape]) for name, shape in COLUMNS[kind].items()])
        self.rows = 0
        self.shards: list[dict[str, Any]] = []
        self.counts: defaultdict[tuple[str, str], dict[str, int]] = defaultdict(_zero)
        self.labels: Counter[str] = Counter()
        self._ids: set[int] = set()
        self._pending: list[Mapping[str, Any]] = []
        self._in_shard = 0
        self._writer: pyarrow.parquet.ParquetWriter | None = None

    def add(self, row: Mapping[str, Any]) -> None:
        try:
            check_row(self.kind, row)
        except BadRowError as error:
            where = f"row {self.rows + 1} ({row.get('id', 'without id')}), field {error.field}"
            raise PunaError(str(error), where=where, found=error.found) from None
        identity = hash(row["id"])
        if identity in self._ids:
            raise PunaError("two rows have the same id", where=f"row {self.rows + 1}", found=row["id"])
        self._ids.add(identity)
        self._count(row)
        self.rows += 1
        self._pending.append(row)
        if len(self._pending) == _ROWS_PER_GROUP:
            self._flush()

    def _count(self, row: Mapping[str, Any]) -> None:
        texts = list(texts_of(self.kind, row))
        words = sum(len(text.split()) for text in texts)
        size = sum(len(text.encode("utf-8")) for text in texts)
        self.labels.update(labels_of(self.kind, row))
        for key in (("", ""), (row["source"], ""), ("", languages_of(self.kind, row))):
            counts = self.counts[key]
            counts["rows"] += 1
            counts["words"] += words
            counts["bytes"] += size

    def counts_by(self, part: int) -> dict[str, dict[str, int]]:
        return {key[part]: dict(counts) for key, counts in sorted(self.counts.items()) if key[part]}

    def _flush(self) -> None:
        if not self._pending:
            return
        if self._writer is None:
            name = f"rows-{len(self.shards):05d}.parquet"
            self.shards.append({"file": name})
            self._writer = pyarrow.parquet.ParquetWriter(self.folder / name, self.schema, compression="zstd")
        self._writer.write_table(pyarrow.Table.from_pylist(self._pending, schema=self.schema))
        self._in_shard += len(self._pending)
        self._pending = []
        if self._in_shard >= _ROWS_PER_SHARD:
            self._finish_shard()

    def _finish_shard(self) -> None:
        if self._writer is not None:
            self._writer.close()
            file = self.folder / self.shards[-1]["file"]
            self.shards[-1].update(rows=self._in_shard, bytes=file.stat().st_size, sha256=sha256_of(file))
            self._writer = None
            self._in_shard = 0

    def close(self) -> None:
        self._flush()
        self._finish_shard()


_ARROW = {
    "text": pyarrow.string(),
    "words": pyarrow.list_(pyarrow.string()),
    "messages": pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])),
}


def _zero() -> dict[str, int]:
    return {"rows": 0, "words": 0, "bytes": 0}


def _check_meta(file: Path, meta: Any) -> None:
    missing = [
        key
        for key, type_ in _NEEDED.items()
        if not isinstance(meta, dict) or not isinstance(meta.get(key), type_)
    ]
    if missing:
        raise PunaError("not the description of a corpus", where=file, found=f"no {missing[0]}")
    if meta["format"] != _FORMAT:
        raise PunaError(
            "the corpus was written by another version", where=file, found=meta["format"], expected=_FORMAT
        )
    for shard in meta["shards"]:
        if not isinstance(shard, dict) or not {"file", "rows", "bytes", "sha256"} <= set(shard):
            raise PunaError("a shard is not described as it should be", where=file, found=shard)
    if sum(shard["rows"] for shard in meta["shards"]) != meta["counts"].get("rows"):
        raise PunaError(
            "the rows of the shards do not add up", where=file, expected=meta["counts"].get("rows")
        )
