"""Files that are either whole or absent, and the fingerprints of what they hold."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from puna.core.errors import PunaError

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}\.(part|old)")


@contextlib.contextmanager
def room_for(path: Path | str, *, needed: int | None = None, fix: str | None = None) -> Iterator[None]:
    """A block that writes ``path``; a disk without room for it is told as a :class:`PunaError`.

    ``needed`` is how many bytes it writes, where that is known; ``fix`` is what to do besides making
    room. A quota and a limit on the size of files count as a full disk. safetensors tells the system's
    error in its message alone.
    """
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else _number_in(error)
        if number not in _NO_ROOM:
            raise
        target = Path(path).absolute()
        folder = next(place for place in target.parents if place.is_dir())
        free = f"{shutil.disk_usage(folder).free:,} bytes are free in {folder}"
        raise PunaError(
            "there is no room to write this",
            where=path,
            found=f"{os.strerror(number)}; {free}",
            expected=None if needed is None else f"room for {needed:,} bytes",
            fix="make room on this disk" + (f"; {fix}" if fix else ""),
        ) from error


def _number_in(error: Exception) -> int | None:
    """The system's number of an error that came through Rust."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def clear_leftovers(folder: Path | str) -> None:
    """Remove what processes that were killed while they wrote left aside in ``folder``.

    Only for a folder that nobody else writes to.
    """
    for path in Path(folder).glob(".*"):
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def write_aside(path: Path | str, *, sync: bool = True) -> Iterator[Path]:
    """Yield a path beside ``path``; when the block ends well, its file takes the name at once.

    A crash leaves the old file, or none: never half a file. Without ``sync`` that holds for a crash of the
    process, not of the machine: for many files that can be made again.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        yield aside
        if sync:
            _sync(aside)
        os.replace(aside, target)
        if sync:
            _sync(target.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_aside(path: Path | str) -> Iterator[Path]:
    """Like :func:`write_aside` for a folder: ``path`` is replaced whole, or not touched."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    old = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.old")
    aside.mkdir()
    try:
        yield aside
        for file in aside.rglob("*"):
            if file.is_file():
                _sync(file)
        if target.exists():
            os.rename(target, old)
        os.rename(aside, target)
        _sync(target.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if old.exists() and not target.exists():
            os.rename(old, target)
        shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path | str, text: str) -> None:
    """Write a UTF-8 text file aside and rename it into place."""
    with write_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: Any) -> None:
    """Write ``value`` as readable JSON, keys in the order given."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path | str) -> Any:
    """Read a JSON file; a missing or broken one is a :class:`PunaError` with file and line."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PunaError("file not found", where=path) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PunaError(
            "not valid JSON", where=path, found=error, fix="restore the file or write it again"
        ) from None


def sha256_of(path: Path | str) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """16 hexadecimal digits that change with the content of a JSON-like ``value``."""
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
