"""When a stage must run again: the parts of its fingerprint, and what changed between two of them."""

from __future__ import annotations

import ast
import functools
import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from puna.core import assets
from puna.core.errors import PunaError
from puna.core.files import fingerprint, sha256_of
from puna.core.stage import Stage
from puna.run.recipe import StageEntry
from puna.run.references import Reference

PACKAGE = Path(__file__).parent.parent
ROOMS = ("core", "model", "text", "data", "train", "decode", "evaluate", "edit", "run")
"""The rooms in their layers: each builds on those before it."""
CARD = "README.md"
LISTED_WHOLE = 16 * 1024 * 1024


def code_of(stage: Stage) -> str:
    """Fingerprint of the source a stage runs on: its room and all rooms that it builds on.

    Of a stage that is not puna's it is its own file. Comments, docstrings and layout of Python files
    do not count.
    """
    file = Path(sys.modules[stage.function.__module__].__file__ or "").resolve()
    if not file.is_relative_to(PACKAGE):
        return _of_source(file)
    last = ROOMS.index(file.relative_to(PACKAGE).parts[0])
    return fingerprint([_of_source(PACKAGE / room) for room in ROOMS[: last + 1]])


@functools.cache
def _of_source(path: Path) -> str:
    """Fingerprint of a source file or of all files of a room; read once in a process."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return fingerprint(
        [
            (file.relative_to(path.parent).as_posix(), _source(file))
            for file in files
            if "__pycache__" not in file.parts
        ]
    )


def _source(file: Path) -> str:
    if file.suffix != ".py":
        return sha256_of(file)
    tree = ast.parse(file.read_bytes())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [line for line in body if not _is_text(line)]  # type: ignore[attr-defined]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _is_text(statement: ast.AST) -> bool:
    """A bare string: a docstring, or a note under an attribute."""
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def of_files(files: Mapping[str, str]) -> str:
    """Fingerprint of files by relative name and SHA-256; a model card is no part of what it describes."""
    return fingerprint({name: digest for name, digest in files.items() if Path(name).name != CARD})


def of_path(path: Path) -> str:
    """Fingerprint of a file or folder; that of a stage's output is the one its record holds."""
    if path.is_file():
        return of_files({"": sha256_of(path)})
    files = (file for file in path.rglob("*") if file.is_file() and file.name != CARD)
    return of_files({file.relative_to(path).as_posix(): sha256_of(file) for file in files})


def listing(path: Path) -> dict[str, list[int | str | None]]:
    """[bytes, SHA-256] of each file at ``path``; of large files the bytes alone, which cost nothing."""
    if not path.is_dir():
        return {path.name: _seen(path)} if path.is_file() else {}
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != CARD)
    return {file.relative_to(path).as_posix(): _seen(file) for file in files}


def _seen(file: Path) -> list[int | str | None]:
    size = file.stat().st_size
    return [size, sha256_of(file) if size <= LISTED_WHOLE else None]


def changed_files(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between the listings of some inputs, in a few words for each file."""
    words: list[str] = []
    for name in new:
        words += _changes(old.get(name, {}), new[name], f"{name}:")
    return words


def of_reference(reference: Reference) -> str:
    """Fingerprint of an input from outside the run: content of a path, hash of an asset, name on a hub."""
    if reference.origin == "path":
        return of_path(Path(reference.text).expanduser())
    if reference.origin == "asset":
        asset = assets.describe(reference.text)
        return fingerprint([reference.text, asset.source.model_dump(mode="json")])
    return fingerprint(["hub", reference.text])


def of_reads(entry: StageEntry) -> dict[str, str]:
    """Fingerprints of the files outside the run that a stage's parameters point at."""
    if entry.stage.reads is None:
        return {}
    found: dict[str, str] = {}
    for name in entry.stage.reads(entry.parameters):
        path = Path(name).expanduser()
        if not path.exists():
            raise PunaError("file not found", where=f"stage {entry.id}", found=path)
        found[str(path)] = of_path(path)
    return found


def parts_of(
    entry: StageEntry, inputs: Mapping[str, str], *, seed: int, device: str, dtype: str
) -> dict[str, Any]:
    """Everything a stage's result depends on. ``inputs`` are fingerprints by the inputs' names."""
    return {
        "stage": entry.stage.name,
        "version": entry.stage.version,
        "code": code_of(entry.stage),
        "parameters": entry.deciding_settings(),
        "reads": of_reads(entry),
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "inputs": dict(inputs),
    }


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What differs between two sets of parts, in a few words."""
    words: list[str] = []
    for key in new:
        before, after = old.get(key), new[key]
        if before == after:
            continue
        if key == "code":
            words.append("its code changed")
        elif key in ("inputs", "reads"):
            words += _changes(before or {}, after, "input" if key == "inputs" else "file")
        elif key == "parameters":
            words += _settings(before or {}, after)
        else:
            words.append(f"{key} {before} -> {after}")
    return "; ".join(words) or "nothing changed"


def _changes(old: Mapping[str, str], new: Mapping[str, str], what: str) -> list[str]:
    words = [f"{what} {name} is no longer there" for name in old if name not in new]
    words += [f"{what} {name} is new" for name in new if name not in old]
    return words + [f"{what} {name} changed" for name in new if name in old and new[name] != old[name]]


def _settings(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    words: list[str] = []
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            words += _settings(before, after, f"{prefix}{key}.")
        elif before != after:
            words.append(f"{prefix}{key} {_short(before)} -> {_short(after)}")
    return words


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
