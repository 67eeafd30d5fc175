"""Lists of words that users give as files or assets, looked up by the hashes that segments have."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from puna.core import assets
from puna.core.errors import PunaError, unknown_name
from puna.data.curate.texts import hashes_of


def words_of_list(path: Path, language: str | None = None) -> list[str]:
    """The words of a file: one a line, or a JSON file with a list, or with lists by language."""
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise PunaError("cannot read a list of words", where=path, found=error.strerror) from None
    except UnicodeDecodeError as error:
        raise PunaError("a list of words is UTF-8", where=path, found=error.reason) from None
    if path.suffix != ".json":
        if language is not None:
            raise PunaError("only JSON files hold lists by language", where=path, found=language)
        return _filled(content.splitlines(), path)
    try:
        value: Any = json.loads(content)
    except ValueError as error:
        raise PunaError("not valid JSON", where=path, found=error) from None
    if isinstance(value, dict):
        if language is None:
            raise PunaError("lists by language: say which", where=path, expected=", ".join(sorted(value)))
        if language != "all" and language not in value:
            raise unknown_name("language", language, value, where=path)
        lists = value.values() if language == "all" else [value[language]]
        value = [word for words in lists if isinstance(words, list) for word in words]
    elif language is not None:
        raise PunaError("this file holds one list, not lists by language", where=path, found=language)
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise PunaError("a list of words is a list of strings", where=path)
    return _filled(value, path)


def hashes_of_list(path: Path, language: str | None = None) -> NDArray[numpy.uint64]:
    """The hashes of a file's words, sorted; read again only when the file changes."""
    if not path.exists() and assets.is_asset(str(path)):
        path = assets.fetch(str(path))
    try:
        stamp = path.stat().st_mtime_ns
    except OSError as error:
        raise PunaError("cannot read a list of words", where=path, found=error.strerror) from None
    return _hashes(path, language, stamp)


@lru_cache(maxsize=64)
def _hashes(path: Path, language: str | None, stamp: int) -> NDArray[numpy.uint64]:
    return numpy.unique(hashes_of(words_of_list(path, language)))


def _filled(words: list[str], path: Path) -> list[str]:
    filled = [word.strip() for word in words if word.strip()]
    if not filled:
        raise PunaError("a list of words is empty", where=path)
    return filled
