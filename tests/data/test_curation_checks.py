"""The stage that measures what filters promise: nothing is found where all is right, made errors are."""

from __future__ import annotations

from dataclasses import replace

import numpy
import pytest

from puna.core.stage import Context, get_stage
from puna.data.corpus import write_corpus
from puna.data.curate import checks_pages
from puna.data.curate.checks_pages import (
    dearest_first,
    importance_figures,
    order_figures,
    same_figures,
    threshold_figures,
    tiles,
)
from puna.data.curate.learned.importance import ImportanceModel
from puna.data.curate.learned.settings import ImportanceParameters
from puna.data.curate.operator import Spans
from puna.data.curate.pipeline import load_pipeline

TEXTS = [
    f"The house number {n} and the roads of the town.\nIt is one of {n} that we have with it."
    for n in range(12)
]


def corpus(folder, texts):
    rows = [{"id": str(n), "text": text, "source": "made", "language": "en"} for n, text in enumerate(texts)]
    return write_corpus(folder, "documents", rows, provenance=[], ledger={})


@pytest.fixture
def families(monkeypatch):
    """Three families of pages, so that a test takes no seconds."""
    few = [f for f in checks_pages.dclm_families() if f.gate in ("dclm symbols", "dclm stop words")]
    monkeypatch.setattr(checks_pages, "dclm_families", lambda: few)
    return few


def test_bounds_of_the_preset_are_found_right_and_missing_families_told(families):
    found = threshold_figures()
    assert found["thresholds.gates"] == 21
    assert found["thresholds.checked"] == 4
    assert found["thresholds.wrong"] == 19  # the gates that have no family here


@pytest.mark.parametrize(("bound", "wrong"), [(0.1, 19), (0.11, 19), (0.05, 20), (0.12, 20)])
def test_a_bound_that_lies_elsewhere_is_an_error(families, monkeypatch, bound, wrong):
    right = load_pipeline("dclm-baseline")
    steps = tuple(
        replace(step, gate=step.gate.model_copy(update={"maximum": bound}))
        if step.gate is not None and step.gate.name == "dclm symbols"
        else step
        for step in right.steps
    )
    monkeypatch.setattr(checks_pages, "load_pipeline", lambda name: replace(right, steps=steps))
    # 5, 6 and 7 of 60 words are marked; looked at are 6 and 7, which are 0.1 and 0.117.
    assert threshold_figures()["thresholds.wrong"] == wrong


def test_orders_keep_the_same_and_the_dearest_comes_first():
    found = order_figures("dclm-pages", [TEXTS, TEXTS[:5]], 1)
    assert found["order.disagreements"] == 0
    assert found["order.gain"] > 0 and found["speed.slowest"] > 0
    steps = [step for step in load_pipeline("dclm-pages").steps if step.kind in ("score", "gate")]
    order = dearest_first(steps, {"dclm.words": 1.0, "dclm.lines": 2.0, "dclm.repetition": 0.5})
    assert [s.label for s in order if s.kind == "score"] == ["dclm.lines", "dclm.words", "dclm.repetition"]
    assert sorted(step.label for step in order) == sorted(step.label for step in steps)


@pytest.mark.parametrize(
    ("document", "starts", "ends", "good"),
    [
        ([0, 0, 1], [0, 3, 0], [3, 5, 2], [True, True, True]),
        ([0, 0, 1], [0, 2, 0], [3, 5, 2], [False, True, True]),  # overlap
        ([0, 0, 1], [0, 4, 0], [3, 5, 2], [False, True, True]),  # gap
        ([0, 0, 1], [0, 3, 0], [3, 4, 2], [False, True, True]),  # ends early
        ([0, 1], [0, 0], [5, 2], [True, True, True]),
        ([0], [0], [5], [True, False, True]),  # nothing of a document with text
    ],
)
def test_spans_that_do_not_cover_a_document_once_are_found(document, starts, ends, good):
    made = Spans(*map(numpy.array, (document, starts, ends)), numpy.zeros(len(document)))
    assert tiles(made, [5, 2, 0]) == good


def test_documents_that_differ_are_counted(tmp_path):
    one, same = corpus(tmp_path / "one", TEXTS), corpus(tmp_path / "same", TEXTS)
    other = corpus(tmp_path / "other", [*TEXTS[:10], "another"])
    assert same_figures({"one": one, "same": same}) == {"same.differing": 0}
    assert same_figures({"one": one, "other": other}) == {"same.differing": 3}


def test_importance_is_the_same_in_other_processes(tmp_path):
    model, _ = ImportanceModel.measured(TEXTS, [t.upper() for t in TEXTS], ImportanceParameters(buckets=50))
    model.save(tmp_path / "model.safetensors")
    found = importance_figures(tmp_path / "model.safetensors", [*TEXTS[:3], "", "\ud800 half"], tmp_path)
    assert found == {"importance.differing": 0, "importance.documents": 5}


def test_the_stage_measures_a_corpus(families, tmp_path):
    stage = get_stage("curation_checks")
    inputs = {"corpus": str(corpus(tmp_path / "corpus", TEXTS).path)}
    context = Context("checks", tmp_path / "out", inputs, seed=1)
    figures = stage.function(context, stage.parameters(documents=10, batch=4, repeats=1)).metrics
    assert figures["documents"] == 10
    assert figures["spans.broken"] == 0 and figures["spans.lines"] == 6 * 20
