"""Any source that a pool can be read from, for the parameters of stages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import pydantic

from puna.data.curate.pages import ArchiveSettings, HtmlSettings, OcrSettings, PdfSettings, WarcSettings
from puna.data.curate.readers import (
    CorpusSettings,
    JsonLinesSettings,
    ParquetRowsSettings,
    PlainSettings,
    read_other,
)
from puna.data.curate.records import READERS, Part, Reader
from puna.data.sources import with_format
from puna.data.sources.common import SourceSettings
from puna.data.sources.debian_descriptions import DebianDescriptionsSettings
from puna.data.sources.files import CsvSettings
from puna.data.sources.gettext import GettextSettings
from puna.data.sources.huggingface import HuggingfaceSettings
from puna.data.sources.libreoffice_help import LibreofficeHelpSettings

_BY_SUFFIX = {
    ".jsonl": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
    ".warc": "warc",
    ".wet": "warc",
    ".html": "html",
    ".htm": "html",
    ".pdf": "pdf",
}


def _told_by_name(value: Any) -> Any:
    """A source's mapping with its ``format``, which the name of its file or folder may tell."""
    if not isinstance(value, Mapping) or "format" in value:
        return value
    path = Path(str(value.get("path", "")))
    for suffix in reversed(path.suffixes):
        if suffix.rstrip("*?") in _BY_SUFFIX:  # as in *.warc*, for packed ones and plain ones
            return {**value, "format": _BY_SUFFIX[suffix.rstrip("*?")]}
    if (path / "corpus.json").is_file():
        return {**value, "format": "corpus"}
    try:
        return with_format(value)
    except ValueError:
        if path.is_dir():
            raise ValueError(
                f"{path} is a folder, but no corpus; name its files: path: {path}/*.jsonl"
            ) from None
        names = ", ".join(FORMATS)
        raise ValueError(
            f"its format cannot be told from a file's name; add format: one of {names}"
        ) from None


PoolSource = Annotated[
    JsonLinesSettings
    | ParquetRowsSettings
    | PlainSettings
    | CorpusSettings
    | WarcSettings
    | HtmlSettings
    | PdfSettings
    | OcrSettings
    | ArchiveSettings
    | CsvSettings
    | GettextSettings
    | LibreofficeHelpSettings
    | DebianDescriptionsSettings
    | HuggingfaceSettings,
    pydantic.Field(discriminator="format"),
    pydantic.BeforeValidator(_told_by_name),
]
"""Settings of any source of documents; ``format`` may be left out where a name tells it."""

FORMATS = sorted(kind.model_fields["format"].default for kind in get_args(get_args(PoolSource)[0]))
"""The names of all formats."""


def reader_of(settings: SourceSettings) -> Reader:
    """What reads a source: its own reader, or the one that ``puna.data.sources`` has, in one part."""
    return READERS.get(type(settings)) or Reader(lambda _: [Part("", settings.title)], read_other)
