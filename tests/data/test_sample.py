"""The stage ``sample``: part of a corpus, equal for all who learn from it."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.core.stage import Context, Outcome, get_stage, validate
from puna.data.corpus import Corpus, write_corpus
from puna.text.encode import encode_document
from puna.text.pretrained import required_tokenizer

TEXTS = [f"{'tekst ' * (1 + place % 5)}{place}" for place in range(40)]


def corpus_of(folder: Path) -> Corpus:
    rows = [
        {"id": f"r{place}", "text": text, "source": "made", "language": "nl"}
        for place, text in enumerate(TEXTS)
    ]
    return write_corpus(
        folder, "documents", rows, provenance=[{"source": "made", "licence": "MIT"}], ledger={}
    )


def sampled(
    folder: Path, out: Path, run_seed: int = 0, tokenizer: Path | None = None, **parameters: Any
) -> Outcome:
    found = get_stage("sample")
    given_parameters = validate(found.parameters, parameters, where="test")
    inputs = {"corpus": folder} | ({} if tokenizer is None else {"tokenizer": tokenizer})
    return found.function(Context("s", out, inputs, seed=run_seed), given_parameters)


def draw(folder: Path, out: Path, run_seed: int = 0, **parameters: Any) -> list[str]:
    outcome = sampled(folder, out, run_seed, **parameters)
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


def test_what_was_not_drawn_is_the_rest(tmp_path: Path) -> None:
    corpus_of(tmp_path / "all")
    outcome = sampled(tmp_path / "all", tmp_path / "a", rows=7)
    sides = [list(Corpus.open(outcome.outputs[name]).texts()) for name in ("corpus", "rest")]
    assert sorted(sides[0] + sides[1]) == sorted(TEXTS)
    assert sides[1] == [text for text in TEXTS if text not in sides[0]]
    assert "rest" not in sampled(tmp_path / "all", tmp_path / "b", rows=len(TEXTS)).outputs


def test_the_first_rows_are_taken_as_they_stand(tmp_path: Path) -> None:
    corpus_of(tmp_path / "all")
    assert draw(tmp_path / "all", tmp_path / "a", rows=7, take="first") == TEXTS[:7]


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A folder with a tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer.save(folder)
    return folder


@pytest.mark.parametrize("take", ["drawn", "first"])
@pytest.mark.parametrize("tokens", [9, 40, 101, 163, 240])
def test_so_many_tokens_are_drawn_exactly(tiny_folder: Path, tmp_path: Path, tokens: int, take: str) -> None:
    corpus_of(tmp_path / "all")
    outcome = sampled(tmp_path / "all", tmp_path / "a", tokenizer=tiny_folder, tokens=tokens, take=take)
    drawn = list(Corpus.open(outcome.outputs["corpus"]).texts())
    tokenizer = required_tokenizer(tiny_folder)
    assert outcome.metrics["tokens"] == sum(len(encode_document(tokenizer, text)) for text in drawn) == tokens
    cut = [text for text in drawn if text not in TEXTS]
    assert len(cut) <= 1 and all(any(text.startswith(part) for text in TEXTS) for part in cut)


def test_more_tokens_than_there_are_take_everything(tiny_folder: Path, tmp_path: Path) -> None:
    corpus_of(tmp_path / "all")
    outcome = sampled(tmp_path / "all", tmp_path / "a", tokenizer=tiny_folder, tokens=10**6)
    assert outcome.metrics["rows.drawn"] == len(TEXTS) and outcome.metrics["tokens"] < 10**6


def test_tokens_need_a_tokenizer_and_a_tokenizer_needs_tokens(tiny_folder: Path, tmp_path: Path) -> None:
    corpus_of(tmp_path / "all")
    with pytest.raises(PunaError, match="under a tokenizer"):
        sampled(tmp_path / "all", tmp_path / "a", tokens=10)
    with pytest.raises(PunaError, match="counts nothing"):
        sampled(tmp_path / "all", tmp_path / "b", tokenizer=tiny_folder, rows=10)
    with pytest.raises(PunaError, match="seed means nothing"):
        validate(get_stage("sample").parameters, {"rows": 1, "take": "first", "seed": 1}, where="test")
