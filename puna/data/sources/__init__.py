"""Sources of rows: what is read is told by settings, one class for each format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import pydantic

from puna.core import assets
from puna.data.sources.bigbench import BigbenchSettings
from puna.data.sources.brown import BrownSettings
from puna.data.sources.chatterbot import ChatterbotSettings
from puna.data.sources.common import SOURCES, Item, Reading, Source, SourceSettings, known_asset
from puna.data.sources.debian_descriptions import DebianDescriptionsSettings
from puna.data.sources.files import CsvSettings, JsonlSettings, ParquetSettings, TextSettings
from puna.data.sources.gettext import GettextSettings
from puna.data.sources.huggingface import HuggingfaceSettings
from puna.data.sources.libreoffice_help import LibreofficeHelpSettings
from puna.data.sources.obo import OboSettings
from puna.data.sources.python_code import PythonSettings

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
    ".obo": "obo",
    ".py": "python",
}


def with_format(value: Any) -> Any:
    """A source's mapping with its ``format``, which the name of its file may tell."""
    if not isinstance(value, Mapping) or "format" in value:
        return value
    if "installed" in value:
        return {**value, "format": "gettext"}
    file = str(value.get("path", ""))
    if "asset" in value:
        file = assets.file_name(assets.describe(known_asset(str(value["asset"]))))
    for suffix in reversed(Path(file).suffixes):
        if suffix in _BY_SUFFIX:
            return {**value, "format": _BY_SUFFIX[suffix]}
    formats = ", ".join(sorted(found.format for found in SOURCES.values()))
    raise ValueError(f"its format cannot be told from a file's name; add format: one of {formats}")


AnySource = Annotated[
    TextSettings
    | JsonlSettings
    | CsvSettings
    | ParquetSettings
    | GettextSettings
    | LibreofficeHelpSettings
    | DebianDescriptionsSettings
    | HuggingfaceSettings
    | ChatterbotSettings
    | BigbenchSettings
    | OboSettings
    | BrownSettings
    | PythonSettings,
    pydantic.Field(discriminator="format"),
    pydantic.BeforeValidator(with_format),
]
"""Settings of any source, for the parameters of stages; ``format`` may be left out where a name tells it."""

__all__ = ["SOURCES", "AnySource", "Item", "Reading", "Source", "SourceSettings", "with_format"]
