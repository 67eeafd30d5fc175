"""What the command line shows: models, corpora, recipes, runs, systems, as tables and texts to print."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from puna.core.rows import META
from puna.run import claims
from puna.run.planner import duration, size
from puna.run.recipe import Recipe, StageEntry, load, recipe_names
from puna.run.record import Run, StageRecord
from puna.run.runner import Decision, default_folder
from puna.run.source import dump
from puna.run.systems import System


def look_at(
    target: str,
    *,
    scale: str | None = None,
    model: str | None = None,
    samples: int = 2,
    length: int | None = None,
) -> Iterator[RenderableType]:
    """What to print about ``target``, part by part.

    With ``model`` a corpus is also shown as that model is trained on it, token by token, in rows of
    ``length`` (1024 by default); a recipe shows this for what its run has built already.
    """
    path = Path(target).expanduser()
    if path.suffix in (".yaml", ".yml") or (target in recipe_names() and not path.exists()):
        yield from _recipe(target, scale, samples)
    elif (path / "run.json").is_file():
        yield from _run(Run.open(path))
    elif (path / META).is_file():
        yield from _corpus(path, model, samples, length)
    else:
        yield from _model(target)


def _model(target: str) -> Iterator[RenderableType]:
    from puna.run import shapes
    from puna.text.inspect import inspect_model
    from puna.text.pretrained import locate, read_tokenizer
    from puna.text.template import find_template

    path = locate(target)
    tokenizer = read_tokenizer(path)
    template = find_template(tokenizer) if tokenizer is not None else None
    yield inspect_model(shapes.of_path(path), tokenizer, template)


def _corpus(path: Path, model: str | None, samples: int, length: int | None) -> Iterator[RenderableType]:
    from puna.data.corpus import Corpus
    from puna.data.describe import describe

    yield from describe(Corpus.open(path))
    if model is not None:
        yield _tokens(path, model, {"max_length": length or 1024}, samples)


def _tokens(path: Path, model: str, settings: dict[str, Any], samples: int) -> RenderableType:
    """A corpus as it is trained on with these settings."""
    from puna.data.corpus import Corpus
    from puna.text.inspect import inspect_corpus
    from puna.text.pretrained import locate, read_tokenizer
    from puna.text.template import find_template

    corpus = Corpus.open(path)
    tokenizer = read_tokenizer(locate(model))
    if tokenizer is None:
        return Text(f"{model}: has no tokenizer")
    return inspect_corpus(
        corpus.rows(),
        corpus.kind,
        tokenizer,
        find_template(tokenizer),
        length=settings["max_length"],
        mode=settings.get("packing"),
        train_on=settings.get("train_on", ("assistant",)),
        samples=samples,
    ).view


def _recipe(target: str, scale: str | None, samples: int) -> Iterator[RenderableType]:
    recipe = load(target, scale)
    yield Text(f"{recipe.name}: {recipe.header.title} ({recipe.scale} scale)", style="bold")
    table = Table(show_lines=True)
    for heading in ("stage", "use", "in", "settings"):
        table.add_column(heading)
    for entry in recipe.stages.values():
        inputs = "\n".join(f"{name}: {reference.text}" for name, reference in entry.references())
        changed = entry.parameters.model_dump(mode="json", exclude_defaults=True)
        settings = Text(dump(changed).rstrip() if changed else "")
        table.add_row(entry.id, entry.stage.name, Text(inputs), settings)
    yield table
    folder = default_folder(target, recipe, None)
    for entry in recipe.stages.values():
        if entry.stage.name == "train":
            yield from _trained_on(recipe, entry, folder, samples)


def _trained_on(recipe: Recipe, entry: StageEntry, folder: Path, samples: int) -> Iterator[RenderableType]:
    """What a training stage learns, where the run has built its inputs."""
    places: dict[str, str] = {}
    for name, reference in entry.references():
        if reference.stage is None:
            places[name] = reference.text
            continue
        record = StageRecord.open(folder / reference.stage)
        if record is not None:
            places[name] = str(record.output(reference.output))
    for name, place in places.items():
        if name.partition(".")[0] == "corpus" and "model" in places:
            yield Text(f"{entry.id} learns from {place}", style="bold")
            yield _tokens(Path(place), places["model"], entry.settings(), samples)
    if not any(name.partition(".")[0] == "corpus" for name in places):
        yield Text(f"{entry.id}: its corpus is not built in {folder} yet; puna run {recipe.name} shows more")


def _run(run: Run) -> Iterator[RenderableType]:
    about = run.about
    yield Text(
        f"{about['name']}: {about['title']} ({about['scale']} scale, {about['status']}, {about['started']}, "
        f"{duration(run.stage_seconds)} in all stages)",
        style="bold",
    )
    table = Table()
    for heading in ("stage", "use", "time", "peak memory", "fingerprint"):
        table.add_column(heading, justify="right" if heading in ("time", "peak memory") else "left")
    for name in about["stages"]:
        record = run.stages.get(name)
        if record is None:
            table.add_row(name, "", "not finished", "", "")
        else:
            figures = (duration(record.seconds), size(record.peak_memory), record.fingerprint)
            table.add_row(name, record.use, *figures)
    yield table
    for record in run.stages.values():
        if record.metrics:
            yield metrics_table(record)
    if run.claims is not None:
        yield claims.table(run.claims["claims"], "claims")


def metrics_table(record: StageRecord) -> Table:
    """The metrics of one stage."""
    table = Table("metric", title=record.id, title_justify="left")
    table.add_column("value", justify="right")
    for name, value in record.metrics.items():
        table.add_row(name, "not a number" if math.isnan(value) else f"{value:.6g}")
    return table


def report_tables(record: StageRecord) -> Iterator[RenderableType]:
    """The tables that a stage left for the report."""
    for said in record.report.get("tables", []):
        table = Table(*said["columns"], title=said["title"], title_justify="left", caption=said.get("note"))
        for row in said["rows"]:
            table.add_row(*(Text(f"{cell:.4g}" if isinstance(cell, float) else str(cell)) for cell in row))
        yield table


def closing(run: Run) -> Iterator[RenderableType]:
    """What a run ends with: tables and samples of the last stage that left some, claims, the report."""
    telling = [record for record in run.stages.values() if record.report.get("tables")]
    for record in telling[-1:]:
        yield from report_tables(record)
        for sample in record.report.get("samples", []):
            yield Text(str(sample["prompt"]), style="bold")
            for model, text in sample["outputs"].items():
                yield Text(f"  {model}: {text}")
    if run.claims is not None and run.claims["claims"]:
        judged = run.claims["claims"]
        passed = sum(claim["passed"] for claim in judged)
        seeds = ", ".join(map(str, run.claims["seeds"]))
        yield claims.table(judged, f"{passed} of {len(judged)} claims hold (seed {seeds})")
    if run.report.is_file():
        yield Text(f"report: {run.report}")


def preview_table(decisions: Sequence[Decision], folder: Path) -> Table:
    """What a run would do and why."""
    table = Table("stage", "use", "would", "because", title=f"in {folder}", title_justify="left")
    for decision in decisions:
        table.add_row(decision.stage, decision.use, decision.action, Text(decision.reason))
    return table


def systems_table(systems: Sequence[System]) -> Table:
    """One row for each system."""
    table = Table("", "system", "does", "paper", "last measured")
    for system in systems:
        header = system.header
        does = Text(header.does or header.title)
        table.add_row(header.system or "", system.name, does, header.paper or "", system.verdict)
    return table


def system_details(system: System) -> Iterator[RenderableType]:
    """A system in detail: what it does, its stages at both scales, its claims as last measured."""
    header = system.header
    yield Text(f"{header.system or ''} {system.name}: {header.title}".strip(), style="bold")
    for line in (header.does, header.paper, *header.idea):
        if line:
            yield Text(line)
    table = Table("stage", "use", *header.scales)
    for name, body in header.stages.items():
        settings = [_settings_of(scale.set, name) for scale in header.scales.values()]
        table.add_row(name, str(body.get("use", "")), *map(Text, settings))
    yield table
    if system.measured is not None:
        yield claims.table(system.measured["claims"], f"{system.verdict} ({system.measured_where})")
    else:
        for claim in header.claims:
            yield Text(f"claim: {claim.says} ({claims.bar_of(claim)})")
    for title, lines in (("deviation", header.deviations), ("licence", header.licences)):
        yield from (Text(f"{title}: {line}") for line in lines)
    yield Text(f"puna run {system.name}")


def _settings_of(settings: Mapping[str, Any], stage: str) -> str:
    mine = {key.partition(".")[2]: value for key, value in settings.items() if key.startswith(f"{stage}.")}
    return "\n".join(f"{key}: {value}" for key, value in mine.items())
