"""The stages that measure Data-Juicer's and Setu's claims, on little text; a classifier is trained."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from puna.cli import app
from puna.core.errors import PunaError
from puna.data.corpus import write_corpus
from puna.data.curate.checks_juicer import duplicate_figures, order_figures, pareto_figures, sigma_figures
from puna.data.curate.checks_setu import box_figures, flag_figures
from puna.run.alone import run_stage

PROSE = "The committee of the house number {n} met in the morning to speak about roads, bridges and schools."


@pytest.fixture
def corpus(tmp_path):
    rows = [
        {
            "id": str(n),
            "text": " ".join([PROSE.format(n=n)] * (1 + n % 3)),
            "source": "made",
            "language": "en",
        }
        for n in range(150)
    ]
    write_corpus(tmp_path / "corpus", "documents", rows, provenance=[], ledger={})
    return tmp_path / "corpus"


def test_checks_of_orders_find_no_disagreement():
    batches = [[PROSE.format(n=n) * (1 + n % 4) for n in range(60)]]
    found = order_figures("data-juicer-refine-stackexchange", batches, 3, 0)
    assert found["order.disagreements"] == 0
    assert 0 <= found["order.kept"] <= 60


def test_checks_of_draws_and_deviations():
    assert pareto_figures(20_000, 0)["pareto.errors_0.5"] < 5
    assert abs(sigma_figures(20_000, 0)["sigma.kept"] - 0.9973) < 0.002


def test_checks_of_planted_duplicates():
    texts = [" ".join(f"word{n * 50 + i}" for i in range(50)) for n in range(60)]
    found = duplicate_figures(texts, 40, 0)
    assert found["minhash.recall"] >= 0.9
    assert found["minhash.lost"] == 0


def test_the_stage_of_checks_measures_all(corpus, tmp_path):
    values = {"preset": "data-juicer-sft", "planted": 20, "draws": 1000, "orders": 1}
    record = run_stage("juicer_checks", {"corpus": str(corpus)}, tmp_path / "out", values)
    assert record.metrics["documents"] == 150
    assert record.metrics["rethreshold.gain"] > 0


def test_too_little_text_is_told(tmp_path):
    rows = [{"id": "0", "text": "one", "source": "made", "language": "en"}]
    write_corpus(tmp_path / "corpus", "documents", rows, provenance=[], ledger={})
    with pytest.raises(PunaError, match="too few"):
        run_stage("juicer_checks", {"corpus": str(tmp_path / "corpus")}, tmp_path / "out", {})


def test_checks_of_setu_hold():
    assert flag_figures() == {"flags.wrong": 0, "flags.checked": 345}
    found = box_figures()
    assert found["boxes.error"] < 1e-12
    assert found["boxes.paragraphs_left"] == 3


def test_a_classifier_is_trained_from_corpora(corpus, tmp_path):
    rows = [
        {"id": str(n), "text": f"buy cheap now {n} click", "source": "made", "language": "en"}
        for n in range(40)
    ]
    write_corpus(tmp_path / "bad", "documents", rows, provenance=[], ledger={})
    out = tmp_path / "model.safetensors"
    arguments = ["data", "quality", "--good", str(corpus), "--bad", str(tmp_path / "bad"), "--out", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert out.is_file()
