from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from puna.core.stage import Outcome, Parameters, PlanOnly, Stage, all_stages
from puna.run import fingerprints

Code = Callable[[str], str]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package with a file in each room."""
    for room in fingerprints.ROOMS:
        (tmp_path / room).mkdir()
        (tmp_path / room / "stages.py").write_text("answer = 42\n")
    monkeypatch.setattr(fingerprints, "PACKAGE", tmp_path)
    fingerprints._of_source.cache_clear()
    yield tmp_path
    fingerprints._of_source.cache_clear()


@pytest.fixture
def code(package: Path, monkeypatch: pytest.MonkeyPatch) -> Code:
    """``code("train")`` is the fingerprint that a stage of that room has in a new process."""

    def of(room: str) -> str:
        module = ModuleType(f"stages_of_{room}")
        module.__file__ = str(package / room / "stages.py")
        monkeypatch.setitem(sys.modules, module.__name__, module)

        def function(*_: Any) -> Outcome:
            return Outcome()

        function.__module__ = module.__name__
        fingerprints._of_source.cache_clear()
        return fingerprints.code_of(Stage(room, function, Parameters, {}, {}, 1, None, None, False, None, ""))

    return of


def test_a_change_in_a_room_reaches_the_stages_that_build_on_it_and_no_others(
    package: Path, code: Code
) -> None:
    for number, changed in enumerate(fingerprints.ROOMS):
        before = {room: code(room) for room in fingerprints.ROOMS}
        (package / changed / "stages.py").write_text("answer = 43\n")
        after = {room: code(room) for room in fingerprints.ROOMS}
        assert [room for room in before if before[room] != after[room]] == list(fingerprints.ROOMS[number:])


def test_comments_and_docstrings_do_not_count_and_new_files_do(package: Path, code: Code) -> None:
    before = code("train")
    (package / "model" / "stages.py").write_text('"""What it is about."""\n\nanswer = (\n    42  # why\n)\n')
    (package / "model" / "__pycache__").mkdir()
    (package / "model" / "__pycache__" / "stages.pyc").write_bytes(b"compiled")
    assert code("train") == before
    (package / "model" / "more.py").write_text("")
    assert code("train") != before


def test_the_layers_are_those_that_imports_keep_to() -> None:
    settings = tomllib.loads((fingerprints.PACKAGE.parent / "pyproject.toml").read_text())
    layers = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    assert [f"puna.{room}" for room in reversed(fingerprints.ROOMS)] == layers[layers.index("puna.run") :]
    rooms = {stage.function.__module__.split(".")[1] for stage in all_stages().values()}
    assert rooms <= set(fingerprints.ROOMS)


@pytest.mark.parametrize("use", ["corpus", "sample", "instructions"])
def test_tokens_that_a_recipe_expects_are_for_plans_only(use: str) -> None:
    field = all_stages()[use].parameters.model_fields["expected_tokens"]
    assert any(isinstance(mark, PlanOnly) for mark in field.metadata)
