"""The pages that follow from stages and recipes are those that ``python -m puna.run.docs`` writes."""

from __future__ import annotations

import pytest

from puna.run import docs


def test_the_generated_pages_are_fresh(capsys: pytest.CaptureFixture[str]) -> None:
    assert docs.main(["--check"]) == 0, capsys.readouterr().out


def test_no_page_is_left_of_a_system_that_is_gone() -> None:
    assert set(docs.SNAPSHOTS.glob("*.md")) <= set(docs.pages())
