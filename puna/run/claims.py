"""Claims: each is a figure out of the run's metrics and the bar it must pass."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.core.errors import PunaError
from puna.core.files import read_json, write_json
from puna.run.recipe import Claim, Recipe

if TYPE_CHECKING:
    from rich.table import Table

FILE = "claims.json"
# Student's t at 97.5%, for 1, 2, 3 ... degrees of freedom; beyond them a series in 1 / degrees is as exact.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
Metrics = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Judgement:
    """A claim judged: ``figures`` are by seed, ``figure`` is their mean, ``note`` says what went wrong."""

    name: str
    says: str
    value: str
    bar: str
    baseline: str | None
    figures: dict[str, float | None]
    figure: float | None
    passed: bool
    note: str | None = None


def bar_of(claim: Claim) -> str:
    """The bar in signs."""
    if claim.at_most is not None:
        return f"<= {claim.at_most:g}"
    if claim.at_least is not None:
        return f">= {claim.at_least:g}"
    if claim.equals is not None:
        return f"= {claim.equals:g}" + (f" +- {claim.tolerance:g}" if claim.tolerance else "")
    return "reported"


def passes(claim: Claim, figure: float) -> bool:
    """Whether ``figure`` passes the claim's bar; what is not a number passes none but "report"."""
    if claim.report:
        return True
    if math.isnan(figure):
        return False
    if claim.at_most is not None:
        return figure <= claim.at_most
    if claim.at_least is not None:
        return figure >= claim.at_least
    assert claim.equals is not None
    return abs(figure - claim.equals) <= claim.tolerance


def judge(recipe: Recipe, runs: Mapping[int, Metrics], seeds: int | None = None) -> list[Judgement]:
    """Judge every claim of ``recipe`` on the metrics of its runs by seed.

    The first run judges all claims; a claim with ``seeds`` is judged by its mean over that many
    runs, or as many as there are. ``seeds`` overrides the number for those claims.
    """
    return [_judge(recipe, claim, runs, seeds) for claim in recipe.header.claims]


def _judge(recipe: Recipe, claim: Claim, runs: Mapping[int, Metrics], seeds: int | None) -> Judgement:
    wanted = claim.seeds if claim.seeds == 1 or seeds is None else seeds
    figures: dict[str, float | None] = {}
    note: str | None = None
    for seed, metrics in list(runs.items())[:wanted]:
        try:
            figures[str(seed)] = recipe.claims[claim.name].value(metrics)
        except PunaError as error:
            figures[str(seed)] = None
            note = f"{error.message}" + (f" ({error.fix})" if error.fix else "")
    if len(figures) < wanted and note is None:
        note = f"{len(figures)} of {wanted} seeds"
    numbers = [math.nan if figure is None else figure for figure in figures.values()]
    figure = math.fsum(numbers) / len(numbers)
    known = math.isfinite(figure)
    return Judgement(
        name=claim.name,
        says=claim.says,
        value=claim.value,
        bar=bar_of(claim),
        baseline=claim.baseline,
        figures=figures,
        figure=figure if known else None,
        passed=None not in figures.values() and passes(claim, figure),
        note=note,
    )


def write(judgements: Sequence[Judgement], recipe: Recipe, folder: Path) -> None:
    """Write claims.json into the run's folder."""
    seeds = list(dict.fromkeys(int(seed) for judgement in judgements for seed in judgement.figures))
    write_json(
        folder / FILE,
        {
            "recipe": recipe.name,
            "scale": recipe.scale,
            "seeds": seeds,
            "passed": all(judgement.passed for judgement in judgements),
            "claims": [asdict(judgement) for judgement in judgements],
        },
    )


def are_judged(current: Sequence[Claim], folder: Path) -> bool:
    """Whether claims.json holds a recipe's claims as they stand now."""
    file = folder / FILE
    if not file.is_file():
        return False
    said = [
        (claim["name"], claim["says"], claim["value"], claim["bar"]) for claim in read_json(file)["claims"]
    ]
    return said == [(claim.name, claim.says, claim.value, bar_of(claim)) for claim in current]


def table(claims: Sequence[Mapping[str, Any]], title: str) -> Table:
    """Claims as claims.json holds them, as a table: claim, figure, bar, verdict, baseline."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=title, title_justify="left")
    for heading in ("claim", "figure", "bar", "verdict", "against"):
        shown.add_column(heading, justify="right" if heading in ("figure", "bar") else "left")
    for claim in claims:
        judged = verdict(claim)
        colour = "red" if judged == "FAIL" else "green"
        sentence = claim["says"] + (f"\n{claim['note']}" if claim["note"] else "")
        shown.add_row(
            Text(sentence),
            figure_text(claim),
            claim["bar"],
            Text(judged, style=colour),
            claim["baseline"] or "",
        )
    return shown


def verdict(claim: Mapping[str, Any]) -> str:
    """Pass, FAIL, or reported, of a claim as claims.json holds it."""
    if not claim["passed"]:
        return "FAIL"
    return "reported" if claim["bar"] == "reported" else "pass"


def figure_text(claim: Mapping[str, Any]) -> str:
    """The figure of a judged claim; where there are several seeds with its interval and those of each."""
    mean = "-" if claim["figure"] is None else f"{claim['figure']:.4g}"
    figures = [*claim["figures"].values()]
    if len(figures) < 2:
        return mean
    half = half_width(figures)
    ends = "" if not half else f" +- {half:.2g}"
    each = ", ".join("-" if figure is None else f"{figure:.4g}" for figure in figures)
    return f"{mean}{ends}\n({each})"


def half_width(figures: Sequence[float | None]) -> float | None:
    """Half of the 95% interval of the mean over seeds, by Student's t; None where a figure is missing."""
    known = [figure for figure in figures if figure is not None and math.isfinite(figure)]
    if len(known) < len(figures) or len(known) < 2:
        return None
    return _student(len(known) - 1) * statistics.stdev(known) / math.sqrt(len(known))


def _student(degrees: int) -> float:
    """How many standard errors 95% of means lie within."""
    if degrees <= len(_STUDENT):
        return _STUDENT[degrees - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3
