"""Sources of rows: what is read is told by settings, one class for each format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import pydantic

from puna.core import assets
from puna.core.errors import PunaError, unknown_name
from puna.core.stage import validate
from puna.data.sources.chatterbot import ChatterbotSettings
from puna.data.sources.common import SOURCES, Item, Reading, Source, SourceSettings
from puna.data.sources.debian_descriptions import DebianDescriptionsSettings
from puna.data.sources.files import CsvSettings, JsonlSettings, ParquetSettings, TextSettings
from puna.data.sources.gettext import GettextSettings
from puna.data.sources.huggingface import HuggingfaceSettings
from puna.data.sources.libreoffice_help import LibreofficeHelpSettings

_BY_SUFFIX = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".po": "gettext",
    ".mo": "gettext",
    ".whl": "gettext",
}


def _parse(value: Any) -> Any:
    """Settings from a mapping: of the ``format`` it names, or the one that its file's name tells."""
    if not isinstance(value, Mapping):
        return value
    by_format = {found.format: found.settings for found in SOURCES.values()}
    where = f"source {dict(value)}"
    asset = value.get("asset")
    if asset is not None and not assets.is_asset(str(asset)):
        raise unknown_name("asset", str(asset), assets.names(), where=where)
    format_ = value.get("format") or _format_by_name(value)
    if format_ not in by_format:
        raise unknown_name("format of a source", str(format_), by_format, where=where)
    return validate(by_format[format_], {**value, "format": format_}, where=where)


def _format_by_name(value: Mapping[str, Any]) -> str:
    if "installed" in value:
        return "gettext"
    asset = str(value.get("asset"))
    file = assets.file_name(assets.describe(asset)) if assets.is_asset(asset) else str(value.get("path", ""))
    for suffix in reversed(Path(file).suffixes):
        if suffix in _BY_SUFFIX:
            return _BY_SUFFIX[suffix]
    raise PunaError(
        "the format of a source cannot be told from its file's name",
        where=f"source {dict(value)}",
        expected=f"format: one of {', '.join(sorted(found.format for found in SOURCES.values()))}",
    )


AnySource = Annotated[
    TextSettings
    | JsonlSettings
    | CsvSettings
    | ParquetSettings
    | GettextSettings
    | LibreofficeHelpSettings
    | DebianDescriptionsSettings
    | HuggingfaceSettings
    | ChatterbotSettings,
    pydantic.Field(discriminator="format"),
    pydantic.BeforeValidator(_parse),
]
"""Settings of any source, for the parameters of stages; ``format`` may be left out where a name tells it."""

__all__ = ["SOURCES", "AnySource", "Item", "Reading", "Source", "SourceSettings"]
