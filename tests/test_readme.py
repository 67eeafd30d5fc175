"""The README's commands are run as they stand; only the two that build environments are looked up instead."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    asked = [words[1] for words in commands() if words[0] == "make"]
    assert asked == ["demo", "test"]
    assert set(asked) <= set(targets)


@pytest.mark.smollm
@pytest.mark.parametrize("words", [words for words in commands() if words[0] != "make"], ids=" ".join)
def test_a_command_of_the_readme_succeeds(words: list[str], tmp_path: Path, smollm_path: Path) -> None:
    assert words[0] == "puna"
    done = subprocess.run(
        [sys.executable, "-m", "puna.cli", *words[1:]], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.smollm
def test_the_python_of_the_readme_runs(tmp_path: Path, smollm_path: Path) -> None:
    (block,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert (tmp_path / "out/smollm2.gguf").stat().st_size > 200e6
