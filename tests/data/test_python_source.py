"""Python code as a source: files as documents, functions as conversations, several wordings, mistakes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from puna.core.errors import PunaError
from puna.data.sources.python_code import functions_of

CODE = '''"""A module."""


class Pot:
    """A pot."""

    def stir(self, times: int = 3) -> int:
        """Stir the pot
        gently.

        And tell how often.
        """
        for _ in range(times):
            self.turn()
        return times

    def turn(self):
        """Only a docstring."""


async def cook(
    pot,
):
    "Cook it."
    # a comment
    await pot
'''


def test_functions_come_with_signature_purpose_and_what_is_left() -> None:
    stir, cook = sorted(functions_of(CODE), key=lambda function: function.code.startswith("async"))
    assert (
        stir.signature == "def stir(self, times: int = 3) -> int:" and stir.purpose == "Stir the pot gently."
    )
    assert stir.code.startswith("def stir(self") and '"""' not in stir.code
    assert stir.code.endswith("return times") and "    for _ in" in stir.code
    assert cook.signature == "async def cook( pot, ):" and cook.purpose == "Cook it."
    assert cook.code == "async def cook(\n    pot,\n):\n    # a comment\n    await pot"
    assert all(compile(function.code, "code", "exec") for function in (stir, cook))


def test_a_file_is_a_document_and_a_function_a_conversation(
    read: Callable[..., Any], wheel: Callable[..., Path]
) -> None:
    path = str(wheel("pots", **{"pots/a.py": CODE, "pots/deep/b.py": "x = 1\n", "pots/c.txt": "no"}))
    items, reading = read("documents", format="python", path=path)
    assert [item.key for item in items] == ["pots/a.py", "pots/deep/b.py"]
    assert items[0].row["text"] == CODE and reading.facts["files"] == 2
    items, _ = read("documents", format="python", path=path, below="pots/deep")
    assert [item.key for item in items] == ["pots/deep/b.py"]
    items, _ = read("messages", format="python", path=path)
    said = {item.key: [message["content"] for message in item.row["messages"]] for item in items}
    assert said.keys() == {"pots/a.py#0", "pots/a.py#1"}
    assert any(ask.endswith("\nStir the pot gently.") for ask, _ in said.values())
    items, _ = read("messages", format="python", path=path, ask="{code}\nWhat for?", answer="{purpose}")
    assert {item.row["messages"][1]["content"] for item in items} == {"Stir the pot gently.", "Cook it."}


def test_one_of_several_wordings_is_drawn_for_each_function(
    read: Callable[..., Any], write: Callable[..., Path]
) -> None:
    many = "\n".join(f'def f{n}():\n    """Number {n}."""\n    return {n}\n' for n in range(40))
    path = str(write("many.py", many))
    ask = ["One: {signature}", "Two: {signature}", "Three: {signature}"]
    items, _ = read("messages", path=path, ask=ask)
    first = [item.row["messages"][0]["content"].partition(":")[0] for item in items]
    assert set(first) == {"One", "Two", "Three"}
    assert first == [
        item.row["messages"][0]["content"].partition(":")[0]
        for item in read("messages", path=path, ask=ask)[0]
    ]


def test_mistakes_are_told(read: Callable[..., Any], write: Callable[..., Path], tmp_path: Path) -> None:
    path = str(write("odd.py", "def f(:\n"))
    with pytest.raises(PunaError, match="not Python"):
        read("messages", path=path)
    assert read("messages", path=path, on_bad_row="skip")[1].tally.dropped == {"bad row": 1}
    (tmp_path / "none").mkdir()
    with pytest.raises(PunaError, match="no Python file here"):
        read("documents", format="python", path=str(tmp_path / "none"))
    with pytest.raises(PunaError, match="already holds its answer"):
        read("messages", path=path, ask="{code} {purpose}", answer="{purpose}")
    with pytest.raises(PunaError, match="none of"):
        read("messages", path=path, ask="Write something.")
