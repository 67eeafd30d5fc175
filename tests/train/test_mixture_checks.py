"""The stage ``mixture_checks``: the paper's volumes, and the topic controller on drawn mixtures."""

from __future__ import annotations

from pathlib import Path

import pytest

from puna.core.errors import PunaError
from puna.core.stage import Context, get_stage, validate
from puna.train import mixture_checks
from puna.train.settings import Phase

PHASES = [
    {"tokens": 92_500_000_000, "weights": {"zh": 2, "en": 8}},
    {"tokens": 7_500_000_000, "weights": {"zh": 1, "en": 7, "synthetic": 2}},
]


def test_the_papers_volumes_are_exact() -> None:
    phases = [validate(Phase, phase, where="test") for phase in PHASES]
    found = mixture_checks.volumes(phases)
    assert found == {"zh": 19.25e9, "en": 79.25e9, "synthetic": 1.5e9}


def test_thirds_add_up_to_the_whole() -> None:
    phases = [validate(Phase, {"tokens": 100, "weights": {"a": 0.1, "b": 0.1, "c": 0.1}}, where="test")]
    found = mixture_checks.volumes(phases)
    assert sum(found.values()) == pytest.approx(100, abs=1e-12) and found["a"] == pytest.approx(100 / 3)


def test_the_rule_keeps_the_sum_moves_nothing_when_all_is_equal_and_favours_the_worst(tmp_path: Path) -> None:
    stage = get_stage("mixture_checks")
    parameters = validate(
        stage.parameters,
        {"phases": PHASES, "feedback": {"every_steps": 1, "strength": 0.9}, "draws": 300},
        where="test",
    )
    found = stage.function(Context("checks", tmp_path, {}, seed=3), parameters).metrics
    assert found["volume.synthetic"] == 1.5e9
    assert found["sum"] < 1e-12 and found["equal"] == found["worst"] == found["best"] == 0.0


def test_a_rule_that_ignores_the_changes_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    feedback = validate(get_stage("mixture_checks").parameters, _with(), where="test").feedback
    monkeypatch.setattr(mixture_checks, "updated", lambda weights, *_: [2 * weight for weight in weights])
    found = mixture_checks.rule(feedback, 4, 20, 0)
    assert found["sum"] == pytest.approx(1) and found["equal"] > 0.2 and found["best"] == 20


def _with(**changes: object) -> dict[str, object]:
    return {"phases": PHASES, "feedback": {"every_steps": 1}, **changes}


def test_phases_by_share_have_no_volume() -> None:
    with pytest.raises(PunaError, match="shares of what"):
        validate(
            get_stage("mixture_checks").parameters,
            _with(phases=[{"share": 1.0, "weights": {"zh": 1}}]),
            where="test",
        )
