"""The stage ``sample``: part of a corpus, equal for all who learn from it."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.core.stage import Context, get_stage, validate
from puna.data.corpus import Corpus, write_corpus

TEXTS = [f"{'tekst ' * (1 + place % 5)}{place}" for place in range(40)]


def corpus_of(folder: Path) -> Corpus:
    rows = [
        {"id": f"r{place}", "text": text, "source": "made", "language": "nl"}
        for place, text in enumerate(TEXTS)
    ]
    return write_corpus(
        folder, "documents", rows, provenance=[{"source": "made", "licence": "MIT"}], ledger={}
    )


def draw(folder: Path, out: Path, run_seed: int = 0, **parameters: Any) -> list[str]:
    found = get_stage("sample")
    given_parameters = validate(found.parameters, parameters, where="test")
    outcome = found.function(Context("s", out, {"corpus": folder}, seed=run_seed), given_parameters)
    return list(Corpus.open(outcome.outputs["corpus"]).texts())


@settings(max_examples=20, deadline=None)
@given(limit=st.integers(1, 800), seed=st.integers(0, 5))
def test_no_more_bytes_than_asked_for_and_the_next_row_would_not_have_fit(
    tmp_path_factory: pytest.TempPathFactory, limit: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("sample")
    corpus_of(folder / "all")
    drawn = draw(folder / "all", folder / "out", run_seed=seed, bytes=limit)
    size = sum(len(text.encode()) for text in drawn)
    longest = max(len(text.encode()) for text in TEXTS)
    assert len(drawn) == 1 or size <= limit
    assert len(drawn) == len(TEXTS) or size > limit - longest
    assert drawn == [text for text in TEXTS if text in set(drawn)]  # the order of the corpus is kept


def test_rows_are_drawn_by_seed(tmp_path: Path) -> None:
    corpus_of(tmp_path / "all")
    first = draw(tmp_path / "all", tmp_path / "a", rows=7)
    assert len(first) == 7
    assert draw(tmp_path / "all", tmp_path / "b", rows=7) == first
    assert draw(tmp_path / "all", tmp_path / "c", run_seed=1, rows=7) != first
    assert draw(tmp_path / "all", tmp_path / "d", rows=7, seed=1) != first


def test_what_was_not_drawn_is_counted(tmp_path: Path) -> None:
    corpus_of(tmp_path / "all")
    draw(tmp_path / "all", tmp_path / "a", rows=7)
    ledger = Corpus.open(tmp_path / "a" / "corpus").meta["ledger"]
    assert ledger["sample"] == {"unit": "rows", "read": 40, "kept": 7, "dropped": {"not drawn": 33}}


def test_a_draw_without_a_limit_is_refused() -> None:
    with pytest.raises(PunaError, match="say how much is drawn"):
        validate(get_stage("sample").parameters, {}, where="test")
