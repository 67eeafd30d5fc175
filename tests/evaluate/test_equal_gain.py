"""Two ways of training beside each other where they have learnt as much."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.data.corpus import write_corpus
from puna.evaluate.equal_gain import equal_gain
from puna.evaluate.forgetting import measure
from puna.evaluate.forgetting_tables import report
from puna.evaluate.stages import Forgetting
from puna.text import pretrained

CURVE = [(3.0, 1.2), (2.0, 1.8), (1.5, 2.0)]


def test_a_version_is_set_beside_the_first_place_that_learnt_as_much() -> None:
    found = equal_gain((4.0, 1.0), CURVE, (2.5, 1.25))
    assert found.rise == pytest.approx(0.25)
    assert found.curve_rise == pytest.approx(0.5)
    assert found.share == pytest.approx(0.5)
    first = equal_gain((4.0, 1.0), CURVE, (3.5, 1.0))
    assert first.curve_rise == pytest.approx(0.1)
    assert first.share == 0.0


@pytest.mark.parametrize("learnt", [4.5, 1.4])
def test_a_version_that_learnt_more_or_less_than_the_curve_has_no_place(learnt: float) -> None:
    found = equal_gain((4.0, 1.0), CURVE, (learnt, 1.1))
    assert math.isnan(found.curve_rise)
    assert math.isnan(found.share)


def test_a_curve_that_forgot_nothing_has_no_share() -> None:
    assert math.isnan(equal_gain((4.0, 1.0), [(3.0, 0.9)], (3.5, 1.1)).share)


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=6), st.floats(0, 1), st.floats(0, 2))
def test_a_version_on_the_curve_has_risen_as_much(steps: list[float], way: float, slope: float) -> None:
    points = [(4.0, 1.0)]
    for step in steps:
        points.append((points[-1][0] - step, points[-1][1] + slope * step))
    learnt = 4.0 - way * sum(steps)
    found = equal_gain(points[0], points[1:], (max(learnt, points[-1][0]), 1.0 + slope * way * sum(steps)))
    assert found.curve_rise == pytest.approx(found.rise, abs=1e-9)


def test_the_report_of_versions_tells_the_share(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    about = {"provenance": [{"source": "test", "licence": "CC0"}], "ledger": {}}
    for name, text in (("old", "the cat sat on the mat"), ("new", "in went that other cat")):
        rows = [{"id": str(n), "text": text * (n + 1), "source": "test", "language": "en"} for n in range(3)]
        write_corpus(tmp_path / name, "documents", rows, **about)
    models = {}
    for seed, name in enumerate(("base", "half", "full", "other")):
        model = tiny_llama(seed=seed)
        model.tokenizer = tiny_tokenizer
        models[name] = str(pretrained.save(model, tmp_path / name))
    equal = {"curve": ["half", "full"], "versions": ["half", "other"], "learnt": "new", "kept": "old"}
    settings = Forgetting.model_validate({"equal_gain": equal, "draws": 100, "distances": False})
    versions = measure(models, {"old": str(tmp_path / "old"), "new": str(tmp_path / "new")}, settings)
    found = versions.metrics()
    bits = {(corpus, model): found[f"bpb.{corpus}.{model}"] for corpus in ("old", "new") for model in models}
    assert found["rise.other"] == pytest.approx(bits["old", "other"] - bits["old", "base"])
    if bits["new", "half"] <= bits["new", "base"]:
        assert found["curve_rise.half"] == pytest.approx(found["rise.half"])
    else:
        assert math.isnan(found["curve_rise.half"])
    table = next(table for table in report(versions, {})["tables"] if table["title"].startswith("Forgotten"))
    assert [row[0] for row in table["rows"]] == ["half", "other"]


@pytest.mark.parametrize(
    ("equal", "message"),
    [
        ({"versions": ["x"]}, "model"),
        ({"kept": "nothing"}, "corpus"),
        ({"kept": "talks"}, "bits per byte"),
    ],
)
def test_names_that_are_not_there_are_told_before_anything_is_measured(
    tmp_path: Path, equal: dict[str, object], message: str
) -> None:
    about = {"provenance": [{"source": "test", "licence": "CC0"}], "ledger": {}}
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    common = {"id": "1", "source": "test", "language": "en"}
    write_corpus(tmp_path / "new", "documents", [{**common, "text": "one"}], **about)
    write_corpus(tmp_path / "talks", "messages", [{**common, "messages": said}], **about)
    wanted = {"curve": ["full"], "versions": ["full"], "learnt": "new", "kept": "new", **equal}
    settings = Forgetting.model_validate({"equal_gain": wanted})
    corpora = {"new": str(tmp_path / "new"), "talks": str(tmp_path / "talks")}
    with pytest.raises(PunaError, match=message):
        measure({"base": "nowhere", "full": "nowhere"}, corpora, settings)
