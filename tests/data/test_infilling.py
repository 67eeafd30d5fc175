"""The stage ``infill``: exact shares, every document back, other cuts in every epoch, what is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from puna.core.stage import Context, Outcome, get_stage, validate
from puna.data.corpus import Corpus, write_corpus
from puna.text.infill import Markers, order_of, restore

MARKERS = Markers()


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """Forty documents of code, and one that holds a marker."""
    texts = [f"def f{n}(x):\n    return x + {n}\n" for n in range(40)] + ["# <fim_middle>"]
    rows = [{"id": f"{n}", "text": text, "source": "code", "language": "en"} for n, text in enumerate(texts)]
    about: Any = {"provenance": [{"source": "code", "licence": "CC0-1.0"}], "ledger": {}}
    return write_corpus(tmp_path / "code", "documents", rows, **about).path


def run(corpus: Path, out: Path, *, seed: int = 0, **settings: Any) -> Outcome:
    definition = get_stage("infill")
    context = Context("infilled", out, {"corpus": corpus}, seed=seed)
    return definition.function(context, validate(definition.parameters, settings, where="test"))


def texts(outcome: Outcome) -> dict[str, str]:
    return {row["id"]: row["text"] for row in Corpus.open(outcome.outputs["corpus"]).rows()}


def test_shares_are_exact_and_every_document_comes_back(code: Path, tmp_path: Path) -> None:
    outcome = run(code, tmp_path / "out", rate=0.9, epochs=2)
    metrics = outcome.metrics
    assert metrics["rows"] == 80 and metrics["rate"] == 0.9
    assert metrics["spm"] == pytest.approx(0.5, abs=0.1)  # with an empty prefix PSM is written like SPM
    assert metrics["not_restored"] == 0 and metrics["same_again"] < 0.1
    originals = {str(row["id"]): row["text"] for row in Corpus.open(code).rows()}
    made = texts(outcome)
    assert all(restore(text, MARKERS) == originals[name.partition("@")[0]] for name, text in made.items())
    first, second = (
        {name.partition("@")[0]: order_of(text, MARKERS) for name, text in made.items() if name.endswith(end)}
        for end in ("@0", "@1")
    )
    assert first.keys() == second.keys() and first != second
    ledger = Corpus.open(outcome.outputs["corpus"]).meta["ledger"]
    assert ledger["epoch 1"]["dropped"] == {"holds a marker": 1} and ledger["epoch 1"]["kept"] == 40


def test_a_rate_of_nothing_leaves_documents_alone(code: Path, tmp_path: Path) -> None:
    outcome = run(code, tmp_path / "out", rate=0)
    assert outcome.metrics["rate"] == 0 and not any("<fim" in text for text in texts(outcome).values())


def test_the_draw_follows_the_seed(code: Path, tmp_path: Path) -> None:
    one, again, other = (
        texts(run(code, tmp_path / name, seed=seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert one == again != other


def test_cuts_lie_anywhere_between_characters(code: Path, tmp_path: Path) -> None:
    made = texts(run(code, tmp_path / "out", rate=1, spm=0, epochs=20))
    lengths = {len(text.partition("<fim_prefix>")[2].partition("<fim_suffix>")[0]) for text in made.values()}
    assert len(lengths) > 15  # prefixes of nearly every length there is
