"""Readers of plain files: JSON lines, Parquet, text, corpora, and whatever ``puna.data.sources`` reads.

Large plain JSON lines are cut into ranges of bytes and Parquet files into ranges of rows, so that several
workers read one file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pydantic

from puna.core.errors import PunaError
from puna.core.rows import META
from puna.data.curate.records import (
    Bomb,
    Limits,
    Part,
    Record,
    lines_of,
    opened,
    readable,
    reader,
    too_large,
)
from puna.data.ledger import Tally
from puna.data.sources import SOURCES
from puna.data.sources.common import Reading, SourceSettings
from puna.data.sources.files import FileSettings

_RANGE = 128 << 20  # bytes of plain JSON lines that one part holds
_BESIDE = Limits()  # of what is told beside a text
_ROWS = 1 << 16  # rows of a Parquet file that one part holds


class RowSettings(FileSettings):
    """Rows with a text in one column."""

    text_column: str = "text"
    """Column that holds the text."""
    url_column: str | None = "url"
    """Column that holds the page's address, if there is such a column."""
    language_column: str | None = "language"
    """Column that holds the language tag, if there is such a column."""
    meta_columns: list[str] = pydantic.Field(default_factory=list)
    """Columns that are kept beside the text, as JSON, for operators that read them."""


class JsonLinesSettings(RowSettings):
    """One JSON object a line; plain, .gz or .zst."""

    format: Literal["jsonl"] = "jsonl"


class ParquetRowsSettings(RowSettings):
    """Parquet files."""

    format: Literal["parquet"] = "parquet"


class PlainSettings(FileSettings):
    """Plain UTF-8 text, a file each or cut; plain, .gz or .zst."""

    format: Literal["text"] = "text"
    split: Literal["file", "line"] = "file"
    """What a document is."""


class CorpusSettings(SourceSettings):
    """A corpus of documents that puna made."""

    format: Literal["corpus"] = "corpus"
    path: str
    """Its folder."""

    def default_name(self) -> str:
        """The folder's name."""
        return Path(self.path).name

    def files(self) -> list[Path]:
        """The file that lists its shards with their hashes."""
        return [Path(self.path) / META]


def file_parts(settings: FileSettings) -> list[Part]:
    """A part for each file, named so that the names do not depend on where the files lie."""
    files = settings.files()
    base = files[0].parent
    while not all(file.is_relative_to(base) for file in files):
        base = base.parent
    return [Part(str(file), file.relative_to(base).as_posix()) for file in files]


def _line_parts(settings: JsonLinesSettings) -> list[Part]:
    parts: list[Part] = []
    for part in file_parts(settings):
        size = Path(part.file).stat().st_size
        if Path(part.file).suffix in (".gz", ".zst", ".bz2", ".lz4") or size <= _RANGE:
            parts.append(part)
        else:
            parts += [Part(part.file, part.name, at, min(at + _RANGE, size)) for at in range(0, size, _RANGE)]
    return parts


def _row_parts(settings: ParquetRowsSettings) -> list[Part]:
    import pyarrow.parquet

    parts: list[Part] = []
    for part in file_parts(settings):
        try:
            with pyarrow.parquet.ParquetFile(part.file) as file:
                sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        except (pyarrow.ArrowException, OSError) as error:
            raise PunaError("not a readable Parquet file", where=part.file, found=error) from None
        start = rows = 0
        for group, size in enumerate(sizes):
            rows += size
            if rows >= _ROWS or group == len(sizes) - 1:
                parts.append(Part(part.file, part.name, start, group + 1))
                start, rows = group + 1, 0
    return parts


@reader(JsonLinesSettings, _line_parts)
def read_json_lines(settings: JsonLinesSettings, part: Part, limits: Limits) -> Iterator[Record]:
    """JSON lines of a file, or those that begin in a range of its bytes."""
    with opened(part.file, limits) as stream:
        if part.start:
            # A line belongs to the part in which it begins: one that runs into this part is another's.
            stream.seek(part.start - 1)
            while piece := stream.readline(1 << 20):
                if piece.endswith(b"\n"):
                    break
        for place, line in guarded_lines(stream, limits, part):
            if isinstance(line, str):
                yield Record(f"{part.name}:{place}", failed=line)
            elif line.strip():
                yield _json_record(settings, f"{part.name}:{place}", line, limits)


def guarded_lines(stream: Any, limits: Limits, part: Part) -> Iterator[tuple[int, bytes | str]]:
    """Lines, or why one failed: too large, or a packed file that is broken or unpacks to too much."""
    stop = part.stop
    last = -1
    try:
        for place, line in lines_of(stream, limits, stop):
            last = place
            yield place, too_large(limits) if line is None else line
    except Bomb as bomb:
        yield last + 1, str(bomb)
    except (OSError, EOFError, ValueError) as error:
        yield last + 1, f"the rest of the file cannot be unpacked: {error}"


def _json_record(settings: RowSettings, key: str, line: bytes, limits: Limits) -> Record:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        return Record(key, failed=f"not UTF-8: {error.reason}")
    except (ValueError, RecursionError) as error:  # Broken, or a number or nesting beyond what Python reads.
        return Record(key, failed=f"not valid JSON: {error}"[:200])
    if not isinstance(row, dict):
        return Record(key, failed="the line is no object")
    return _record(settings, key, row, limits)


def _record(settings: RowSettings, key: str, row: dict[str, Any], limits: Limits) -> Record:
    text = row.get(settings.text_column)
    if not isinstance(text, str):
        reason = "is no text" if settings.text_column in row else "is missing"
        return Record(key, failed=f"column {settings.text_column!r} {reason}")
    reason = readable(text, limits)
    if reason:
        return Record(key, failed=reason)
    beside = settings.meta_columns
    return Record(
        key,
        text,
        url=_told(row, settings.url_column),
        language=_told(row, settings.language_column) or settings.language or "",
        meta=json.dumps({name: row.get(name) for name in beside}, default=str) if beside else "",
    )


def _told(row: dict[str, Any], column: str | None) -> str:
    value = row.get(column) if column is not None else None
    return value if isinstance(value, str) and not readable(value, _BESIDE) else ""


@reader(ParquetRowsSettings, _row_parts)
def read_parquet_rows(settings: ParquetRowsSettings, part: Part, limits: Limits) -> Iterator[Record]:
    """Rows of a range of row groups."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(part.file) as file:
        wanted = {settings.text_column, settings.url_column, settings.language_column, *settings.meta_columns}
        columns = [name for name in file.schema_arrow.names if name in wanted]
        if settings.text_column not in columns:
            raise PunaError(
                "the file has no such column",
                where=part.file,
                found=settings.text_column,
                expected=f"one of {', '.join(file.schema_arrow.names)}",
                fix="say which holds the text: text_column",
            )
        number = sum(file.metadata.row_group(group).num_rows for group in range(part.start))
        groups = list(range(part.start, part.stop or 0))
        try:
            for batch in file.iter_batches(1024, row_groups=groups, columns=columns):
                for row in batch.to_pylist():
                    yield _record(settings, f"{part.name}:{number}", row, limits)
                    number += 1
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            yield Record(f"{part.name}:{number}", failed=f"the rest of the part cannot be read: {error}")


@reader(PlainSettings, file_parts)
def read_plain(settings: PlainSettings, part: Part, limits: Limits) -> Iterator[Record]:
    """Text files, whole or line by line."""
    with opened(part.file, limits) as stream:
        if settings.split == "file":
            content = stream.read(limits.document_bytes + 1)
            yield text_record(settings, part.name, content, limits)
            return
        for place, line in guarded_lines(stream, limits, part):
            if isinstance(line, str):
                yield Record(f"{part.name}:{place}", failed=line)
            elif line.strip():
                yield text_record(settings, f"{part.name}:{place}", line.rstrip(b"\r\n"), limits)


def text_record(settings: FileSettings, key: str, content: bytes, limits: Limits) -> Record:
    """Bytes that should be UTF-8 text."""
    if len(content) > limits.document_bytes:
        return Record(key, failed=too_large(limits))
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Record(key, failed=f"not UTF-8: {error.reason}")
    return Record(key, text, language=settings.language or "")


def _corpus_parts(settings: CorpusSettings) -> list[Part]:
    from puna.data.corpus import Corpus

    corpus = Corpus.open(settings.path, kind="documents")
    return [Part(str(corpus.path / shard["file"]), shard["file"]) for shard in corpus.meta["shards"]]


@reader(CorpusSettings, _corpus_parts)
def read_corpus(settings: CorpusSettings, part: Part, limits: Limits) -> Iterator[Record]:
    """Documents of a corpus, under their ids."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(part.file) as file:
        for batch in file.iter_batches(1024, columns=["id", "text", "language"]):
            for row in batch.to_pylist():
                reason = readable(row["text"], limits)
                text = None if reason else row["text"]
                yield Record(row["id"], text, language=row["language"], failed=reason)


def read_other(settings: SourceSettings, part: Part, limits: Limits) -> Iterator[Record]:
    """Documents of a source that ``puna.data.sources`` reads, as it gives them."""
    reading = Reading(
        "documents", Tally("rows"), limit=settings.limit, on_bad_row=settings.on_bad_row, language=""
    )
    for item in SOURCES[type(settings)].read(settings, reading):
        text, language = item.row["text"], item.row["language"]
        reason = readable(text, limits)
        yield Record(item.key, None if reason else text, language=language, failed=reason)
