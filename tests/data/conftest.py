"""Small sources made on the spot."""

import gzip
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from puna.core.stage import Context, Outcome, validate
from puna.data.ledger import Tally, unbalanced
from puna.data.settings import CorpusParameters
from puna.data.sources import SOURCES, Item, Reading
from puna.data.stages import corpus


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Any], Path]:
    """Writes a file of rows or text below the test's folder, as its name says."""

    def write_file(name: str, content: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, str | bytes):
            content = "".join(json.dumps(row) + "\n" for row in content)
        data = content.encode() if isinstance(content, str) else content
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
        return path

    return write_file


@pytest.fixture
def wheel(tmp_path: Path) -> Callable[..., Path]:
    """Makes a wheel-like zip of the given members."""

    def make(name: str, **members: str | bytes) -> Path:
        path = tmp_path / f"{name}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for member, content in members.items():
                archive.writestr(member, content)
        return path

    return make


@pytest.fixture
def read() -> Callable[..., tuple[list[Item], Reading]]:
    """Reads a source given as in a recipe; returns its items and what was counted."""

    def read_source(kind: str, language: str = "xx", limit: int | None = None, **settings: Any) -> Any:
        parameters = validate(CorpusParameters, {"kind": kind, "sources": [settings]}, where="recipe")
        source = parameters.sources[0]
        reading = Reading(
            kind=kind,  # type: ignore[arg-type]
            tally=Tally("rows"),
            limit=limit,
            on_bad_row=source.on_bad_row,
            language=language,
        )
        items = list(SOURCES[type(source)].read(source, reading))
        assert unbalanced({"read": reading.tally.as_json()}) is None and reading.tally.kept == len(items)
        return items, reading

    return read_source


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., tuple[Outcome, Context]]:
    """Runs the stage ``corpus`` with parameters as in a recipe."""

    def run(name: str = "made", *, seed: int = 0, **parameters: Any) -> tuple[Outcome, Context]:
        context = Context(name=name, out=tmp_path / name, inputs={}, seed=seed)
        return corpus(context, validate(CorpusParameters, parameters, where="recipe")), context

    return run
