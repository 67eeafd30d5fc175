from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import puna
from puna.core.errors import PunaError
from puna.run import claims
from puna.run.prove import prove
from puna.run.recipe import Claim, load
from puna.run.record import Run

pytestmark = pytest.mark.usefixtures("little")
Recipe = Callable[..., Path]
Executed = Callable[..., list[str]]
SEEDED = (
    "    baseline: a thousand\n",
    "    baseline: a thousand\n"
    "  - {name: loss-falls, says: The loss falls, value: 'lora[\"loss\"]', at_most: 0.5, seeds: 3}\n",
)


def claim(**bars: Any) -> Claim:
    return Claim(name="c", says="s", value="1", **bars)


@given(figure=st.floats(-10, 10), bar=st.floats(-10, 10), tolerance=st.floats(0, 1))
def test_bars_are_what_they_say(figure: float, bar: float, tolerance: float) -> None:
    assert claims.passes(claim(at_most=bar), figure) == (figure <= bar)
    assert claims.passes(claim(at_least=bar), figure) == (figure >= bar)
    assert claims.passes(claim(equals=bar, tolerance=tolerance), figure) == (abs(figure - bar) <= tolerance)
    assert claims.passes(claim(report=True), figure)


def test_what_is_no_number_passes_no_bar_but_is_reported() -> None:
    for bars in ({"at_most": 1}, {"at_least": 1}, {"equals": 1}):
        assert not claims.passes(claim(**bars), math.nan)
    assert claims.passes(claim(report=True), math.nan)


@pytest.mark.parametrize("count", range(2, 25))
def test_intervals_over_seeds_are_students(count: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    figures = [math.sin(7.0 * number) for number in range(count)]
    low, high = stats.t.interval(0.95, count - 1, statistics.fmean(figures), stats.sem(figures))
    assert claims.half_width(figures) == pytest.approx((high - low) / 2, rel=2e-4)


def test_an_interval_needs_two_figures_and_all_of_them() -> None:
    assert claims.half_width([1.0]) is None
    assert claims.half_width([1.0, 2.0, None]) is None
    shown = claims.figure_text({"figure": 2.0, "figures": {"0": 1.0, "1": 2.0, "2": 3.0}})
    assert shown == "2 +- 2.5\n(1, 2, 3)"
    assert claims.figure_text({"figure": 2.0, "figures": {"0": 2.0, "1": 2.0}}) == "2\n(2, 2)"


def test_a_run_judges_its_claims_on_its_own_figures(recipe: Recipe) -> None:
    run = puna.run(recipe(SEEDED))
    assert run.claims is not None
    first, second = run.claims["claims"]
    assert first["passed"] and first["bar"] == "<= 1" and first["baseline"] == "a thousand"
    assert first["figure"] == run["scores"]["size.nl.tuned"] / 1000
    assert second["note"] == "1 of 3 seeds"
    assert run.claims["seeds"] == [0]


def test_a_claim_over_seeds_runs_only_what_it_draws_on_and_judges_the_mean(
    recipe: Recipe, executed: Executed, tmp_path: Path
) -> None:
    judged, folder = prove(recipe(SEEDED))
    assert folder == Path("runs/little")
    assert executed() == ["dutch", "english", "lora", "scores"]
    for seed in (1, 2):
        assert executed(tmp_path / f"runs/little-seed{seed}") == ["dutch", "lora"]
    losses = {
        str(seed): Run.open(f"runs/little{tail}")["lora"]["loss"]
        for seed, tail in enumerate(("", "-seed1", "-seed2"))
    }
    assert len(set(losses.values())) == 3
    by_name = {judgement.name: judgement for judgement in judged}
    assert by_name["loss-falls"].figures == losses
    assert by_name["loss-falls"].figure == pytest.approx(sum(losses.values()) / 3)
    assert by_name["loss-falls"].note is None
    assert by_name["sizes-fall"].figures.keys() == {"0"}
    saved = Run.open(folder).claims
    assert saved is not None and saved["seeds"] == [0, 1, 2] and saved["passed"]
    prove(recipe(SEEDED))
    assert executed() == []


def test_a_later_run_that_changes_nothing_keeps_the_proof(recipe: Recipe) -> None:
    prove(recipe(SEEDED))
    run = puna.run(recipe(SEEDED))
    assert run.claims is not None and run.claims["seeds"] == [0, 1, 2]
    run = puna.run(recipe(SEEDED, ("at_most: 1.0", "at_most: 2.0")))  # Another bar is judged again.
    assert run.claims is not None and run.claims["seeds"] == [0]


def test_the_number_of_seeds_can_be_lowered(recipe: Recipe, tmp_path: Path) -> None:
    judged, _ = prove(recipe(SEEDED), seeds=1)
    assert not (tmp_path / "runs/little-seed1").exists()
    assert judged[1].note is None


def test_the_mean_decides_though_one_seed_falls_the_other_way(recipe: Recipe) -> None:
    loaded = load(recipe(SEEDED))
    metrics = {"scores": {"size.nl.tuned": 1.0}, "lora": {"loss": 0.0}}
    runs = {seed: {**metrics, "lora": {"loss": loss}} for seed, loss in enumerate((0.1, 0.7, 0.4))}
    judged = claims.judge(loaded, runs)[1]
    assert judged.passed and judged.figure == pytest.approx(0.4)
    assert list(judged.figures.values()) == [0.1, 0.7, 0.4]
    runs[0]["lora"]["loss"] = 0.5
    assert not claims.judge(loaded, runs)[1].passed


def test_a_metric_that_was_not_measured_fails_the_claim_and_is_named(recipe: Recipe) -> None:
    run = puna.run(recipe(('scores["size.nl.tuned"]', 'scores["size.nl.tund"]')))
    assert run.claims is not None
    judged = run.claims["claims"][0]
    assert not judged["passed"] and judged["figure"] is None
    assert "unknown metric of stage 'scores'" in judged["note"] and "size.nl.tuned" in judged["note"]


def test_the_table_shows_claim_figure_bar_verdict_and_baseline(recipe: Recipe) -> None:
    from rich.console import Console

    run = puna.run(recipe(("at_most: 1.0", "at_least: 1.0")))
    assert run.claims is not None
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(claims.table(run.claims["claims"], "claims"))
    shown = console.export_text()
    for text in ("Sizes are below a thousand", ">= 1", "FAIL", "a thousand"):
        assert text in shown


def test_proving_what_does_not_exist_is_an_error() -> None:
    with pytest.raises(PunaError, match="no recipe is called 'nothing'"):
        prove("nothing")
