"""The work of the stages ``sort_channels``, ``search_children`` and ``measure_children``.

System S29. What was searched on is written down with the children, and is refused as the text of a report.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from puna.core.assets import cache_folder
from puna.core.errors import PunaError
from puna.core.files import fingerprint, read_json, write_json
from puna.core.progress import Track
from puna.core.seeds import derive
from puna.core.stage import Context, Outcome, validate
from puna.data.corpus import Corpus
from puna.edit.calibration import calibration_batches
from puna.edit.pruning.scores import needs_of, score_units
from puna.edit.searching.children import (
    Measured,
    differing_numbers,
    engine_loss,
    masked_difference,
    speeds,
)
from puna.edit.searching.evolve import front_of, hypervolume
from puna.edit.searching.predictors import rank_correlation
from puna.edit.searching.search import Archive, Point, features_of, predictors, search
from puna.edit.searching.sort_units import held_by_first_half
from puna.edit.searching.sort_units import sort_channels as sort
from puna.edit.searching.stages import CommonText
from puna.edit.searching.step_seconds import StepSeconds, measure_step_seconds
from puna.edit.stats import collect
from puna.model.search_space import Genes, SearchSpace
from puna.model.slicing import sliced
from puna.model.units import sliced_spec
from puna.text import pretrained
from puna.text.packing import Batch
from puna.train.settings import Children

if TYPE_CHECKING:
    from puna.edit.searching.stages import MeasureChildren, SearchChildren, SortChannels
    from puna.model.llama import Llama
    from puna.model.steppers import Quantize

_FILE = "children.json"
_SIZES = ("small", "middle", "large")
_CHECKED = 8  # children of a front that are masked and materialised


def run_sort(context: Context, parameters: SortChannels) -> Outcome:
    """Open, score, sort, save."""
    model = _opened(context, "model", "float32")
    seed = derive(context.seed, context.name)
    needed = needs_of(parameters.scorer, ["channel"])
    found = None
    if needed:
        batches = _texts(model, context, parameters)
        found = collect(model, batches, needed, folder=cache_folder() / "statistics")
    scores = score_units(model, parameters.scorer, ["channel"], found, seed=seed)
    before = held_by_first_half(scores)
    sort(model, scores)
    ordered = {key: each.sort(descending=True).values for key, each in scores.items()}
    figures = {"first_half_before": before, "first_half": held_by_first_half(ordered)}
    written = pretrained.save(model.to(pretrained.DTYPES[parameters.save_dtype]), context.out / "model")
    return Outcome({"model": written}, figures)


def _opened(context: Context, name: str, dtype: str) -> Llama:
    return pretrained.load_plain(context.inputs[name], dtype=dtype, device=context.device).eval()


def _texts(model: Llama, context: Context, parameters: CommonText) -> list[Batch]:
    return calibration_batches(
        model,
        Path(context.inputs["corpus"]),
        rows=parameters.rows,
        length=parameters.length,
        batch_rows=parameters.batch_rows,
        seed=derive(context.seed, "texts of children", parameters.half),
        wanted=parameters.wanted,
    )


def run_search(context: Context, parameters: SearchChildren) -> Outcome:
    """Search with the method and the baselines, write down what was measured, save three children."""
    model = _opened(context, "model", context.dtype)
    space = parameters.children.space(model.spec)
    batches = _texts(model, context, parameters)
    seconds = _step_seconds(context, space, parameters)
    measured = Measured(model, space, batches, parameters.cost, parameters.context_tokens, seconds)
    methods = (parameters.method, *parameters.baselines)
    archives: dict[str, Archive] = {}
    with Track("searching", len(methods) * parameters.evaluations, "children") as track:

        def measure(genes: Genes) -> Point:
            track.advance()
            return measured(genes)

        for method in methods:
            archives[method] = search(method, space, measure, parameters.settings(), seed=context.seed)
    reference = (measured.loss(space.smallest), measured.cost_of(space.whole))
    own = archives[parameters.method]
    chosen = _chosen(own, parameters.cost_shares, reference[1])
    record = {
        "searched": _source(context, parameters),
        "spec": fingerprint(model.spec.to_config()),
        "children": parameters.children.model_dump(mode="json"),
        "cost": parameters.cost,
        "context_tokens": parameters.context_tokens,
        "seconds": None if seconds is None else dataclasses.asdict(seconds),
        "method": parameters.method,
        "chosen": dict(zip(_SIZES, chosen, strict=True)),
        "archives": {name: _as_json(archive) for name, archive in archives.items()},
    }
    write_json(context.out / _FILE, record)
    outputs = {"children": context.out / _FILE}
    for name, genes in zip(_SIZES, chosen, strict=True):
        child = sliced(model, space.kept(genes)).to(pretrained.DTYPES[parameters.save_dtype])
        outputs[name] = pretrained.save(child, context.out / name)
    context.report["curves"] = [_curve({name: each.values().tolist() for name, each in archives.items()})]
    return Outcome(outputs, _search_figures(space, archives, own, reference))


def _step_seconds(context: Context, space: SearchSpace, parameters: SearchChildren) -> StepSeconds | None:
    """The table of a step's seconds, where the search goes by it."""
    if parameters.cost != "seconds":
        return None
    return measure_step_seconds(
        _opened(context, "model", "float32"),
        space,
        "int8" if parameters.timed_weights == "int8" else None,
        context=parameters.context_tokens,
        rounds=parameters.timed_rounds,
    )


def _chosen(archive: Archive, shares: Sequence[float], whole: float) -> list[Genes]:
    """For each share of the whole's cost the best child that costs no more, or else the cheapest."""
    found: list[Genes] = []
    cheapest = min(archive.points, key=lambda genes: archive.points[genes][1])
    for share in shares:
        fitting = [genes for genes, (_, cost) in archive.points.items() if cost <= share * whole]
        found.append(min(fitting, key=lambda genes: archive.points[genes]) if fitting else cheapest)
    return found


def _source(context: Context, parameters: CommonText) -> dict[str, Any]:
    """Which documents were read."""
    return {"corpus": Corpus.open(context.inputs["corpus"]).fingerprint, "half": parameters.half}


def _as_json(archive: Archive) -> list[dict[str, Any]]:
    return [
        {"genes": list(genes), "loss": loss, "cost": cost} for genes, (loss, cost) in archive.points.items()
    ]


def _search_figures(
    space: SearchSpace, archives: Mapping[str, Archive], own: Archive, reference: Point
) -> dict[str, float]:
    """Volumes on the searched text, and how well predictors rank children that they have not seen."""
    figures = {"children": float(space.size), "reference.loss": reference[0], "reference.cost": reference[1]}
    for name, archive in archives.items():
        figures[f"evaluations.{name}"] = float(len(archive.points))
        figures[f"hypervolume.{name}"] = hypervolume(archive.values(), reference)
    figures["drawn_instead"] = float(own.drawn_instead)
    if own.guessed:
        for place, name in enumerate(("loss", "cost")):
            guesses = [guess[place] for guess, _ in own.guessed]
            figures[f"rounds.{name}"] = rank_correlation(guesses, [real[place] for _, real in own.guessed])
    unseen = {
        genes: point
        for genes, point in (archives["random"].points if "random" in archives else {}).items()
        if genes not in own.points
    }
    if len(unseen) > 2:
        for place, name in enumerate(("loss", "cost")):
            guessed = predictors(space, own.points)[place](features_of(space, list(unseen)))
            figures[f"unseen.{name}"] = rank_correlation(guessed, [point[place] for point in unseen.values()])
        figures["unseen.children"] = float(len(unseen))
    return figures


def _curve(values: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, Any]:
    """The fronts for the report."""
    series = [
        {
            "name": name,
            "x": [points[place][1] for place in front_of(points)],
            "y": [points[place][0] for place in front_of(points)],
        }
        for name, points in values.items()
    ]
    return {
        "title": "Children that no other is better than in both",
        "x": "cost",
        "y": "loss",
        "series": series,
    }


def run_measure(context: Context, parameters: MeasureChildren) -> Outcome:
    """Everything about the fronts that a search left, on other text."""
    record = read_json(Path(context.inputs["children"]))
    _check_other_text(record["searched"], _source(context, parameters))
    model, exact = (_opened(context, "model", dtype) for dtype in (context.dtype, "float32"))
    space = _space_of(model, record)
    batches = _texts(model, context, parameters)
    seconds = record["seconds"] and StepSeconds(record["seconds"]["rest"], tuple(record["seconds"]["layers"]))
    measured = Measured(model, space, batches, record["cost"], record["context_tokens"], seconds)
    fronts = {name: _front(points) for name, points in record["archives"].items()}
    front = fronts[record["method"]]
    figures = _volumes(measured, fronts)
    small = [genes for genes in front if genes != space.whole]
    step = max(1, -(-len(front) // _CHECKED))
    figures["masked_difference"] = max(
        masked_difference(exact, space, genes, batches[0]) for genes in front[::step]
    )
    child = sliced(exact, space.kept(space.whole))
    figures["whole.differing_numbers"] = float(differing_numbers(exact, child, batches[0]))
    rows = {genes: dict(zip(("loss", "cost"), measured(genes), strict=True)) for genes in front}
    if context.inputs.get("plain") is not None:
        figures |= _against_plain(context, measured, small, rows)
    if parameters.engine != "none":
        quantize: Quantize | None = "int8" if parameters.engine == "int8" else None
        figures |= _in_engine(exact, measured, front, rows, quantize)
        figures |= _timed(exact, measured, record["chosen"], parameters, quantize)
    context.report["tables"] = [_table(space, rows)]
    context.report["curves"] = [
        _curve({name: [measured(genes) for genes in found] for name, found in fronts.items()})
    ]
    return Outcome({}, figures)


def _check_other_text(searched: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse documents that the search has read."""
    halves = {searched["half"], own["half"]}
    if searched["corpus"] == own["corpus"] and (None in halves or len(halves) == 1):
        raise PunaError(
            "children are measured on text that they were searched on",
            where="corpus",
            found=f"the searched corpus, half {own['half'] or 'null: all of it'}",
            expected="other documents",
            fix="give another corpus, or half: first to the search and half: second here",
        )


def _space_of(model: Llama, record: Mapping[str, Any]) -> SearchSpace:
    if record["spec"] != fingerprint(model.spec.to_config()):
        raise PunaError(
            "the children were searched in a model of another shape",
            where="children",
            fix="give the super-network that they were searched in",
        )
    return validate(Children, record["children"], where="children").space(model.spec)  # type: ignore[no-any-return]


def _front(points: Sequence[Mapping[str, Any]]) -> list[Genes]:
    """The front of an archive by what the search measured, cheapest first."""
    values = [(point["loss"], point["cost"]) for point in points]
    return [tuple(points[place]["genes"]) for place in front_of(values)]


def _volumes(measured: Measured, fronts: Mapping[str, Sequence[Genes]]) -> dict[str, float]:
    """The volume of each search's front on this text; the reference is the same for all."""
    space = measured.space
    reference = (measured.loss(space.smallest), measured.cost_of(space.whole))
    figures = {"loss.whole": measured.loss(space.whole), "loss.smallest": reference[0]}
    with Track("measuring children", sum(map(len, fronts.values())), "children") as track:
        for name, front in fronts.items():
            points = []
            for genes in front:
                points.append(measured(genes))
                track.advance()
            figures[f"front.{name}"] = float(len(front))
            figures[f"hypervolume.{name}"] = hypervolume(points, reference)
    return figures


def _against_plain(
    context: Context, measured: Measured, children: Sequence[Genes], rows: dict[Genes, dict[str, float]]
) -> dict[str, float]:
    """The losses of children over those of the same children sliced from a model that was tuned plainly."""
    plain = _opened(context, "plain", context.dtype)
    if plain.spec != measured.model.spec:
        raise PunaError("the plainly tuned model has another shape", where="plain", found=str(plain.source))
    other = Measured(
        plain, measured.space, measured.batches, measured.cost, measured.context, measured.seconds
    )
    whole = measured.space.whole
    figures = {"plain.whole": measured.loss(whole) / other.loss(whole)}
    for genes in rows:
        rows[genes]["plain"] = other.loss(genes)
    ratios = [measured.loss(genes) / other.loss(genes) for genes in children]
    if ratios:
        figures |= {"plain.ratio": sum(ratios) / len(ratios), "plain.worst": max(ratios)}
        figures["plain.better"] = sum(ratio < 1 for ratio in ratios) / len(ratios)
    return figures


def _in_engine(
    exact: Llama,
    measured: Measured,
    front: Sequence[Genes],
    rows: dict[Genes, dict[str, float]],
    quantize: Quantize | None,
) -> dict[str, float]:
    """Losses of the front as the engine reads it, over those measured; bytes over the whole's in float32."""
    ratios, sizes = [], []
    whole = 4 * measured.space.spec.parameter_count()
    with torch.no_grad(), Track("reading in the engine", len(front), "children") as track:
        for genes in front:
            child = sliced(exact, measured.space.kept(genes))
            loss, size = engine_loss(child, measured.batches, quantize)
            rows[genes] |= {"engine": loss, "bytes": float(size)}
            ratios.append(loss / measured.loss(genes))
            sizes.append(size / whole)
            track.advance()
    return {
        "engine.loss_ratio": sum(ratios) / len(ratios),
        "engine.worst_loss_ratio": max(ratios),
        "engine.smallest_bytes": min(sizes),
    }


def _timed(
    exact: Llama,
    measured: Measured,
    chosen: Mapping[str, Sequence[int]],
    parameters: MeasureChildren,
    quantize: Quantize | None,
) -> dict[str, float]:
    """How much faster the chosen children decode than the whole, beside how much less they compute."""
    space = measured.space
    genes = {name: space.canonical(own) for name, own in chosen.items()}
    models = {name: sliced(exact, space.kept(own)) for name, own in genes.items()}
    models["whole"] = exact
    found = speeds(models, "whole", quantize, tokens=parameters.timed_tokens, rounds=parameters.timed_rounds)
    figures: dict[str, float] = {}
    for name, own in genes.items():
        weights = sliced_spec(space.spec, space.kept(own)).parameter_count()
        figures[f"speed.{name}"] = found[name]
        figures[f"cost_cut.{name}"] = measured.cost_of(space.whole) / measured.cost_of(own)
        figures[f"parameter_cut.{name}"] = space.spec.parameter_count() / weights
        figures[f"loss.{name}"] = measured.loss(own)
    return figures


def _table(space: SearchSpace, rows: Mapping[Genes, Mapping[str, float]]) -> dict[str, Any]:
    """The front, cheapest first."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    titles = {
        "loss": "loss",
        "cost": "cost",
        "plain": "sliced from plain tuning",
        "engine": "loss in the engine",
        "bytes": "bytes there",
    }
    return {
        "title": "Children that no other is better than in both, on text that was not searched on",
        "columns": ["child (layer:channels)", *(titles[name] for name in names)],
        "rows": [
            [space.describe(genes), *(f"{row[name]:.5g}" for name in names)] for genes, row in rows.items()
        ],
    }
