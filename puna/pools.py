"""``puna data``: look into pools of documents. Every command imports what it needs when it is called."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from puna.core.errors import PunaError
from puna.options import show

if TYPE_CHECKING:
    from puna.data.curate.pipeline import Step
    from puna.data.curate.report import Traced

data_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Curation: its operators and presets, and what became of the documents of a pool.",
)
PoolFolder = Annotated[Path, typer.Argument(metavar="POOL", help="The folder of a pool, or of its stage.")]
_SPANS_SHOWN = 5
_TEXT_SHOWN = 600


@data_app.command()
def analyze(
    pool: PoolFolder,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The page; analysis.html beside the pool by default.")
    ] = None,
) -> None:
    """Write a page: flow, removals with examples, distributions."""
    from puna.data.curate.pool import Pool
    from puna.run.report.pool import write_pool_page

    opened = Pool.open(pool)
    show(str(write_pool_page(opened, out or opened.path.parent / "analysis.html")))


@data_app.command()
def trace(
    pool: PoolFolder,
    document: Annotated[str, typer.Argument(metavar="DOC", help="The document's id.")],
) -> None:
    """Tell why a document was kept or dropped."""
    from puna.data.curate.pool import Pool
    from puna.data.curate.report import trace as find

    opened = Pool.open(pool)
    traced = find(opened, document)
    if traced is None:
        fix = "ids are told on the page of puna data analyze, and stand in the survivors' column id"
        raise PunaError("no document has this id", where=opened.path, found=document, fix=fix)
    show(*_told(traced))


@data_app.command()
def tune(
    pool: PoolFolder,
    sigmas: Annotated[float, typer.Option(help="Standard deviations on both sides of the mean.")] = 3.0,
) -> None:
    """Print the gates' bounds anew, from what the pool stores."""
    from puna.data.curate.pool import Pool
    from puna.data.curate.tune import as_yaml, tuned_gates

    typer.echo(as_yaml(tuned_gates(Pool.open(pool), sigmas)), nl=False)


@data_app.command()
def quality(
    good: Annotated[Path, typer.Option(help="A corpus of documents of the good kind.")],
    bad: Annotated[Path, typer.Option(help="A corpus of documents of the other kind.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The classifier's file, .safetensors.")],
    most: Annotated[int, typer.Option(min=1, help="Most documents of each kind.")] = 100_000,
) -> None:
    """Train the classifier of hashed words for the score data_juicer.quality."""
    from itertools import islice

    from puna.data.corpus import Corpus
    from puna.data.curate.hashed_classifier import train

    kinds = [list(islice(Corpus.open(path, kind="documents").texts(), most)) for path in (good, bad)]
    train(*kinds).save(out)
    show(f"{out}: learned from {len(kinds[0]):,} good documents and {len(kinds[1]):,} others")


@data_app.command()
def presets(
    name: Annotated[str | None, typer.Argument(help="A preset, to see its steps and bounds.")] = None,
) -> None:
    """List the presets of curation, or the steps of one."""
    from rich.table import Table

    from puna.data.curate.pipeline import load_pipeline, preset_about, preset_names

    if name is None:
        table = Table("preset", "what it does", "source")
        for each in preset_names():
            about = preset_about(each)
            table.add_row(each, str(about.get("does", "")), str(about.get("source", "")))
        show(table)
        return
    pipeline, about = load_pipeline(name), preset_about(name)
    steps = Table("step", "name", "what passes, or settings")
    for step in pipeline.steps:
        steps.add_row(step.kind, step.label, _step_text(step))
    notes = [" ".join(note.split()) for note in pipeline.notes]
    show(f"{name}: {about.get('does', '')}", f"source: {pipeline.source}", *notes, steps)


@data_app.command()
def operators(
    name: Annotated[str | None, typer.Argument(help="An operator or a family, such as gopher.")] = None,
) -> None:
    """List the operators of curation; of one, what it stores and its settings."""
    from rich.table import Table

    from puna.core.errors import unknown_name
    from puna.data.curate.operator import all_operators

    found = all_operators()
    if name is not None:
        chosen = [each for each in found if name in (each.name, each.name.split(".")[0])]
        if not chosen:
            names = {each.name for each in found} | {each.name.split(".")[0] for each in found}
            raise unknown_name("operator", name, names)
        found = chosen
    if name is None or name not in {each.name for each in found}:
        table = Table("operator", "kind", "what it does")
        for each in found:
            table.add_row(each.name, each.kind, each.summary.replace("``", ""))
        show(table)
        return
    for each in found:
        show(f"{each.name} ({each.kind}): {each.summary}", f"source: {each.source}")
        stores = Table("signal", "what it says", title="Stores", title_justify="left")
        for signal, meaning in each.signals.items():
            stores.add_row(f"{each.name}.{signal}", meaning)
        for signal, meaning in each.spans.items():
            stores.add_row(f"{each.name}.{signal}", f"of parts of the document: {meaning}")
        settings = Table("setting", "default", "what it says", title="Settings", title_justify="left")
        for key, field in each.settings.model_fields.items():
            default = "required" if field.is_required() else str(field.get_default(call_default_factory=True))
            settings.add_row(key, default, " ".join((field.description or "").split()))
        show(*(table for table in (stores, settings) if table.row_count))


def _step_text(step: Step) -> str:
    """What of a step one wants to see: a gate's bounds, or the settings that it was given."""
    from puna.data.curate.gates import bounds_for
    from puna.data.curate.report import bounds_text

    gate = step.gate
    if gate is None:
        assert step.settings is not None
        changed = step.settings.model_dump(exclude_unset=True)
        return ", ".join(f"{key} {value}" for key, value in changed.items())
    quantiles = [(key, getattr(gate, key)) for key in ("quantile_minimum", "quantile_maximum")]
    told = [bounds_text(bounds_for(gate, ""), gate.null)]
    told += [f"{key} {value}" for key, value in quantiles if value is not None]
    told += [f"{tag}: {bounds_text(bounds_for(gate, tag))}" for tag in gate.languages]
    reduce = f" ({gate.reduce})" if gate.reduce else ""
    return f"{gate.signal}{reduce}: {'; '.join(filter(None, told))}"


def _told(traced: Traced) -> list[object]:
    from rich.table import Table
    from rich.text import Text

    gates = Table("gate", "signal", "value", "what passes", "result", title="Gates", title_justify="left")
    colours = {"passed": "green", "dropped": "bold red", "fails": "red", "not come to": "dim"}
    for judged in traced.gates:
        result = Text(judged.result, colours[judged.result])
        gates.add_row(judged.gate, judged.signal, _number(judged.value), judged.bounds, result)
    read = {judged.signal for judged in traced.gates}
    signals = Table("signal", "value", title="Other signals", title_justify="left")
    null = []
    for name, stored in traced.signals.items():
        if isinstance(stored, float):
            if math.isnan(stored):
                null += [name] if name not in read else []
            elif name not in read:
                signals.add_row(name, _number(stored))
            continue
        shown = ", ".join(f"{start}-{end}: {_number(value)}" for start, end, value in stored[:_SPANS_SHOWN])
        more = f", and {len(stored) - _SPANS_SHOWN:,} more" if len(stored) > _SPANS_SHOWN else ""
        signals.add_row(name, f"{len(stored):,} spans: {shown}{more}" if stored else "no span")
    verdict = (
        Text(f"dropped by: {traced.reason}", "bold red") if traced.reason else Text("kept", "bold green")
    )
    text = traced.text[:_TEXT_SHOWN] + (" …" if len(traced.text) > _TEXT_SHOWN else "")
    told: list[object] = [f"{traced.id} (shard {traced.shard}, row {traced.row})", verdict]
    told += [table for table in (gates, signals) if table.row_count]
    told += [f"Null: {', '.join(null)}"] if null else []
    return [*told, "Its text begins:" if text else "It has no text.", text]


def _number(value: float) -> str:
    return "null" if math.isnan(value) else f"{value:.6g}"
