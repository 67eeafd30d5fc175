"""Plain text files and tables of rows: jsonl, json, csv, tsv and Parquet, by path or glob."""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

import pydantic

from puna.core.errors import PunaError
from puna.core.progress import say
from puna.data.detect import Detection, Languages, detect
from puna.data.kinds import UNDETERMINED, BadRowError, Kind
from puna.data.sources.common import Item, Reading, SourceSettings, source


class FileSettings(SourceSettings):
    """Local files by path or glob (``*``, ``?``, ``**``)."""

    path: str
    """Path of a file, or a glob; files are read in the order of their names."""
    language: str | None = None
    """Language tag of the text, where a row does not tell its own."""

    def default_name(self) -> str:
        """The file's name up to its first dot, or that of the glob's folder."""
        path = Path(self.path)
        return path.parent.name or path.name if glob.has_magic(path.name) else path.name.split(".")[0]

    def files(self) -> list[Path]:
        """The files of the path or glob, sorted; none is an error."""
        if Path(self.path).is_file():
            return [Path(self.path)]
        found = sorted(Path(name) for name in glob.glob(self.path, recursive=True) if Path(name).is_file())
        if not found:
            raise PunaError("no file has this path", where=self.path)
        return found


class TextSettings(FileSettings):
    """Plain UTF-8 text."""

    format: Literal["text"] = "text"
    split_on: str | None = pydantic.Field(None, min_length=1)
    """Cut each file into rows at this string, such as an empty line ("\\n\\n"); else a file is one row."""


class TableSettings(FileSettings):
    """A table whose format of rows is told from its columns."""

    columns: dict[str, str] = pydantic.Field(default_factory=dict)
    """From a name that a format uses to the table's own name of that column."""
    task_column: str | None = None
    """A column that names the task of a row: caps by task go by it."""
    source_language: str = UNDETERMINED
    """Language tag of the source side of sentence pairs."""
    target_language: str = UNDETERMINED
    """Language tag of the target side of sentence pairs."""


class JsonlSettings(TableSettings):
    """One JSON object a line, plain or gzipped; a .json file holds a list of objects."""

    format: Literal["jsonl"] = "jsonl"


class CsvSettings(TableSettings):
    """Comma-separated values with a header line; tabs separate in files called .tsv."""

    format: Literal["csv"] = "csv"
    delimiter: str | None = None
    """The separating character, if neither a comma nor a tab."""


class ParquetSettings(TableSettings):
    """Parquet."""

    format: Literal["parquet"] = "parquet"


@source(TextSettings, "documents")
def read_text(settings: TextSettings, reading: Reading) -> Iterator[Item]:
    """Text files: a file is a source document and, unless it is cut, one row."""
    language = settings.language or reading.language
    for file, name in _named(settings, reading):
        if not reading.wants(name):
            continue
        with _decoded(file) as stream:
            text = stream.read()
        pieces = [text] if settings.split_on is None else text.split(settings.split_on)
        for index, piece in enumerate(pieces):
            if piece.strip():
                reading.tally.keep()
                place = None if settings.split_on is None else index
                yield Item(name, {"text": piece.strip("\n"), "language": language}, place)
            else:
                reading.tally.drop("empty")


_KINDS: tuple[Kind, ...] = ("documents", "messages", "preferences", "sentence_pairs", "labelled_texts")


@source(JsonlSettings, *_KINDS, "labelled_words")
def read_jsonl(settings: JsonlSettings, reading: Reading) -> Iterator[Item]:
    """JSON lines: a line is a source document."""
    return _table(settings, reading, _json_rows)


@source(CsvSettings, *_KINDS)
def read_csv(settings: CsvSettings, reading: Reading) -> Iterator[Item]:
    """CSV: a record is a source document."""

    def rows(file: Path) -> Iterator[tuple[str, Any]]:
        default = "\t" if ".tsv" in file.suffixes else ","
        return _csv_rows(file, settings.delimiter or default)

    return _table(settings, reading, rows)


@source(ParquetSettings, *_KINDS, "labelled_words")
def read_parquet(settings: ParquetSettings, reading: Reading) -> Iterator[Item]:
    """Parquet: a row is a source document."""
    return _table(settings, reading, _parquet_rows)


def convert_rows(
    settings: TableSettings | Any, reading: Reading, rows: Iterator[tuple[str, Any]], name: str
) -> Iterator[Item]:
    """Items from numbered raw rows: detects the format from the first good row and says which it is.

    ``rows`` gives the place of each row and either its columns or the :class:`BadRowError` it met.
    """
    detections: dict[frozenset[str], Detection] = {}
    languages = Languages(
        settings.language or reading.language, settings.source_language, settings.target_language
    )
    for place, raw in rows:
        if reading.exhausted:
            return
        document = f"{name}:{place}"
        if not reading.wants(document):
            continue
        try:
            if isinstance(raw, BadRowError):
                raise raw
            if not isinstance(raw, Mapping):
                raise BadRowError("a row is an object with named columns", "(row)", repr(raw))
            columns = frozenset(raw)
            if columns not in detections:
                detections[columns] = _detected(raw, settings, reading, document, first=not detections)
            row = detections[columns].convert(raw, languages)
            task = _task(raw, settings.task_column)
        except BadRowError as error:
            reading.bad_row(error, where=document)
            continue
        reading.tally.keep()
        yield Item(document, row, task=task)


def _task(raw: Mapping[str, Any], column: str | None) -> str | None:
    """The task that a row names."""
    if column is None:
        return None
    if not isinstance(raw.get(column), str | int) or not str(raw[column]).strip():
        raise BadRowError("no name of a task", column, repr(raw.get(column)))
    return str(raw[column]).strip()


def _detected(
    raw: Mapping[str, Any], settings: TableSettings | Any, reading: Reading, document: str, *, first: bool
) -> Detection:
    """The format of a row with new columns; if it has none, the first such row shows a wrong table."""
    try:
        found = detect(raw, kind=reading.kind, rename=settings.columns, where=document)
    except PunaError as error:
        if first:
            raise
        raise BadRowError(error.message, "(row)", error.found) from None
    say(f"{document.rpartition(':')[0]}: {found}")
    return found


def _table(settings: TableSettings, reading: Reading, rows: Any) -> Iterator[Item]:
    for file, name in _named(settings, reading):
        yield from convert_rows(settings, reading, rows(file), name)


def _named(settings: FileSettings, reading: Reading) -> Iterator[tuple[Path, str]]:
    """Each file with a name that does not depend on where the files lie on this machine."""
    files = settings.files()
    reading.facts["files"] = len(files)
    base = files[0].parent if len(files) == 1 else _common_parent(files)
    for file in files:
        if reading.exhausted:
            return
        yield file, file.relative_to(base).as_posix()


def _common_parent(files: list[Path]) -> Path:
    parent = files[0].parent
    while not all(file.is_relative_to(parent) for file in files):
        parent = parent.parent
    return parent


@contextmanager
def _decoded(file: Path) -> Iterator[IO[str]]:
    """Open a text file, gzipped or not; bytes that are not UTF-8 or not gzip are a :class:`PunaError`."""
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            yield io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    except UnicodeDecodeError as error:
        raise PunaError(
            "the file is not UTF-8",
            where=file,
            found=f"{error.reason} at byte {error.start} of the part read",
        ) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise PunaError("the gzip file is broken", where=file, found=error) from None


def _json_rows(file: Path) -> Iterator[tuple[str, Any]]:
    with _decoded(file) as stream:
        if ".json" in file.suffixes:
            yield from _json_list(file, stream.read())
            return
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield str(number), _json_or_error(line)


def _json_list(file: Path, text: str) -> Iterator[tuple[str, Any]]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise PunaError(
            "not valid JSON", where=f"{file}:{error.lineno}:{error.colno}", found=error.msg
        ) from None
    except (ValueError, RecursionError) as error:  # A number or a nesting beyond what Python reads.
        raise PunaError("not valid JSON", where=file, found=error) from None
    if not isinstance(values, list):
        raise PunaError("a .json file must hold a list of rows", where=file, found=type(values).__name__)
    yield from ((str(number), value) for number, value in enumerate(values, start=1))


def _json_or_error(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:  # Broken, or a number or nesting beyond what Python reads.
        return BadRowError(f"not valid JSON: {error}", "(line)", line.strip())


def _csv_rows(file: Path, delimiter: str) -> Iterator[tuple[str, Any]]:
    with _decoded(file) as stream:
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        header: list[str] = []
        while True:
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                # After a broken quote the reader cannot know where the next record starts.
                raise PunaError("not valid CSV", where=f"{file}:{reader.line_num}", found=error) from None
            if not header:
                header = values
                if len(set(header)) != len(header):
                    raise PunaError(
                        "two columns have the same name", where=f"{file}:1", found=", ".join(header)
                    )
            elif values and len(values) != len(header):
                counts = f"{len(values)} values for {len(header)} columns"
                yield (
                    str(reader.line_num),
                    BadRowError("the record has another number of values", "(row)", counts),
                )
            elif values:
                yield str(reader.line_num), dict(zip(header, values, strict=True))


def _parquet_rows(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield str(number), row
    except (pyarrow.ArrowException, OSError) as error:
        raise PunaError("not a readable Parquet file", where=file, found=error) from None
