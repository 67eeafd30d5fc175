"""Fixtures: a recipe over little stages, run in an empty folder."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import little_stages
import pytest

from puna.core import stage as registry

RECIPE = """\
name: little
title: A little recipe
device: cpu
stages:
  dutch:
    use: letters
    count: 5
  english:
    use: letters
    count: 7
  lora:
    use: learn
    in: {corpus: dutch.train, held_out: {nl: dutch.held_out}}
    learning_rate: 1e-3
    lora: {r: 4}
  scores:
    use: measure
    in: {models: {tuned: lora}, corpora: {nl: dutch.held_out, en: english}}
scales:
  demo: {set: {lora.steps: 2}}
  paper: {set: {lora.steps: 9, lora.lora.r: 64}}
claims:
  - name: sizes-fall
    says: Sizes are below a thousand
    value: scores["size.nl.tuned"] / 1000
    at_most: 1.0
    baseline: a thousand
"""


@pytest.fixture(scope="session")
def quick_garbage() -> Iterator[None]:
    """The runner collects garbage before each stage; what the test session imported need not be looked at."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def little(quick_garbage: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Only the little stages, bare endings, an empty current folder."""
    stages = registry.all_stages()  # All of them, lest a room registers its own among the little ones later.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PUNA_CACHE", str(tmp_path / "cache"))
    little_stages.install()
    little_stages.install_endings(lambda name, module: monkeypatch.setitem(sys.modules, name, module))
    yield
    registry._STAGES.clear()
    registry._STAGES.update(stages)


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """``recipe()`` writes the little recipe; ``recipe((old, new), ...)`` with replacements."""

    def write(*changes: tuple[str, str]) -> Path:
        text = RECIPE
        for old, new in changes:
            assert old in text, old
            text = text.replace(old, new)
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def executed(tmp_path: Path) -> Callable[[], list[str]]:
    """``executed()`` lists the stages that ran in runs/little since it was last asked."""

    def read(folder: Any = None) -> list[str]:
        log = (folder or tmp_path / "runs" / "little") / "executed.log"
        names = log.read_text().split() if log.exists() else []
        log.unlink(missing_ok=True)
        return names

    return read
