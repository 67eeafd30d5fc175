"""How a training went: loss, samples and a benchmark against the tokens seen, out of the models it left.

System S38 (arXiv:2412.13335) publishes checkpoints along its pre-training to show how the three go together.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from puna.core.errors import PunaError
from puna.core.files import read_json
from puna.core.stage import Context, Outcome
from puna.data.corpus import Corpus
from puna.evaluate import endings, forgetting_tables
from puna.evaluate.forgetting import Versions, measure
from puna.evaluate.statistics import Interval, ratio
from puna.train.trained import SEEN

if TYPE_CHECKING:
    from puna.evaluate.stages import Trajectory
    from puna.model.llama import Llama

START = "start"


@dataclass(frozen=True)
class Points:
    """The models of a training in the order of time: where each lies, and the tokens it had seen."""

    models: dict[str, str]
    tokens: dict[str, float]


def points(folder: Path, start: str | Path | None) -> Points:
    """The models that ``model_steps`` of a training left in ``folder``, behind ``start`` if it is given."""
    if not (folder / SEEN).is_file():
        raise PunaError(
            "no training left models here",
            where=folder,
            fix="give the output models of a stage train with model_steps",
        )
    seen = sorted(read_json(folder / SEEN).items(), key=lambda item: item[1]["tokens"])
    models = {START: str(start)} if start is not None else {}
    tokens = dict.fromkeys(models, 0.0)
    for name, about in seen:
        models[name] = str(folder / name)
        tokens[name] = float(about["tokens"])
    return Points(models, tokens)


def run(context: Context, parameters: Trajectory) -> Outcome:
    """Measure every model; figures of the first and the last have names that no step is part of."""
    along = points(Path(context.inputs["models"]), context.inputs.get("start"))
    corpora = context.inputs.get("corpora") or {}
    asked = _questions(corpora, parameters, context.seed)
    told: dict[tuple[str, str], Interval] = {}

    def ask(name: str, model: Llama) -> None:
        for corpus, each in asked.items():
            right = numpy.array(endings.answered(model, each), dtype=numpy.float64)
            told[corpus, name] = ratio(
                right, numpy.ones_like(right), draws=parameters.draws, seed=context.seed
            )

    versions = measure(
        along.models,
        corpora,
        parameters,
        seed=context.seed,
        dtype=context.dtype,
        device=context.device,
        also=ask,
    )
    report = forgetting_tables.report(versions, along.tokens)
    report["tables"].insert(0, _table(versions, along, told))
    if told:
        report["curves"].insert(0, _curve(along, told))
    context.report.update(report)
    figures = {
        **versions.metrics(),
        "models": float(len(along.models)),
        "endings.chance": 1 / endings.CHOICES,
    }
    for (corpus, name), interval in told.items():
        figures |= interval.metrics(f"endings.{corpus}.{name}")
    return Outcome(metrics=figures | _ends(versions, along, told))


def _questions(
    corpora: dict[str, Any], parameters: Trajectory, seed: int
) -> dict[str, list[endings.Question]]:
    found: dict[str, list[endings.Question]] = {}
    for name, path in corpora.items() if parameters.endings else ():
        corpus = Corpus.open(path)
        if corpus.kind == "documents":
            found[name] = endings.questions(
                [str(row["text"]) for row in corpus.rows()],
                count=parameters.endings,
                passage=parameters.passage_characters,
                ending=parameters.ending_characters,
                seed=seed,
                name=name,
            )
    return found


def _ends(versions: Versions, along: Points, told: dict[tuple[str, str], Interval]) -> dict[str, float]:
    """The first and the last model's figures."""
    names = list(along.models)
    series = {
        "bpb": versions.result.intervals,
        "response_loss": versions.response_losses,
        "accuracy": versions.accuracies,
        "endings": told,
    }
    return {
        f"{figure}.{corpus}.{place}": values[corpus, name].value
        for figure, values in series.items()
        for corpus in dict.fromkeys(corpus for corpus, _ in values)
        for place, name in (("first", names[0]), ("last", names[-1]))
    }


def _table(versions: Versions, along: Points, told: dict[tuple[str, str], Interval]) -> dict[str, Any]:
    series = {
        "bits/byte": versions.result.intervals,
        "nats/token": versions.response_losses,
        "right choices": versions.accuracies,
        "endings told": told,
    }
    columns = [
        (f"{unit}, {corpus}", {name: values[corpus, name].value for name in along.models})
        for unit, values in series.items()
        for corpus in dict.fromkeys(corpus for corpus, _ in values)
    ]
    rows = [
        [name, f"{along.tokens[name]:,.0f}", *(f"{values[name]:.3f}" for _, values in columns)]
        for name in along.models
    ]
    note = f"Endings: one of {endings.CHOICES} is the passage's own." if told else ""
    headings = ["model", "tokens seen", *(heading for heading, _ in columns)]
    return {"title": "Along the training", "columns": headings, "rows": rows, "note": note}


def _curve(along: Points, told: dict[tuple[str, str], Interval]) -> dict[str, Any]:
    places = list(along.tokens.values())
    series = [
        {"name": corpus, "x": places, "y": [told[corpus, name].value for name in along.models]}
        for corpus in dict.fromkeys(corpus for corpus, _ in told)
    ]
    chance = [1 / endings.CHOICES] * len(places)
    series.append({"name": "chance", "x": places, "y": chance})
    return {"title": "Endings told from others", "x": "tokens trained on", "y": "share", "series": series}
