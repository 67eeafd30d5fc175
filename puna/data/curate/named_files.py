"""Files that the settings of steps name (models, lists of words): what a pool's signals depend on, too.

A pool that was made with a model is not one for the model that was trained anew into the same file: hashes
of files stand among what the names of a pool's folders are made of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from puna.core.errors import PunaError
from puna.core.files import sha256_of
from puna.data.curate.pipeline import Pipeline

_LONGEST = 1024  # characters of a path


def files_of(pipeline: Pipeline) -> dict[str, str]:
    """SHA-256 by path of every file that a step's settings name; one that is not there is an error.

    A setting of a path, and ``model``, has to be one; another text is one if there is such a file.
    """
    found: dict[str, str] = {}
    for step in pipeline.steps:
        if step.settings is None:
            continue
        for key, value in step.settings:
            wanted = isinstance(value, Path) or (key == "model" and isinstance(value, str))
            wanted = wanted or (key == "words" and isinstance(value, str) and Path(value).suffix != "")
            if wanted and not Path(value).exists():
                raise PunaError("no such file", where=f"step {step.label}: {key}", found=value)
            for file in named(str(value) if isinstance(value, Path) else value):
                found[str(file)] = sha256_of(file)
    return found


def named_in(pipeline: Path) -> list[Path]:
    """The files that a pipeline's own file names; none if it is not valid, which is told where it is read."""
    try:
        return list(named(yaml.safe_load(pipeline.read_bytes())))
    except yaml.YAMLError:
        return []


def named(value: Any) -> Iterator[Path]:
    """The files that plain values name, in mappings and lists too; of a folder those right in it."""
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from named(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from named(inner)
    elif isinstance(value, str) and ("." in value or "/" in value) and len(value) <= _LONGEST:
        path = Path(value)
        try:
            if path.is_file():
                yield path
            elif path.is_dir() and value.strip("./"):
                yield from sorted(file for file in path.iterdir() if file.is_file())
        except (OSError, ValueError):  # not a path on this system
            return
