"""``puna data``: look into pools of documents. Every command imports what it needs when it is called."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from puna.core.errors import PunaError
from puna.options import show

if TYPE_CHECKING:
    from puna.data.curate.report import Traced

data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look into pools of documents.")
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


def _told(traced: Traced) -> list[object]:
    from rich.table import Table

    gates = Table("gate", "signal", "value", "passes", "result", title="Gates")
    for name, signal, value, bounds, passed in traced.gates:
        result = {True: "passed", False: "dropped", None: "not come to"}[passed]
        gates.add_row(name, signal, _number(value), bounds, result)
    signals = Table("signal", "value", title="Signals")
    for name, stored in traced.signals.items():
        if isinstance(stored, float):
            signals.add_row(name, _number(stored))
            continue
        shown = ", ".join(f"{start}-{end}: {_number(value)}" for start, end, value in stored[:_SPANS_SHOWN])
        more = f", and {len(stored) - _SPANS_SHOWN} more" if len(stored) > _SPANS_SHOWN else ""
        signals.add_row(name, f"{len(stored)} spans: {shown}{more}" if stored else "no span")
    verdict = f"dropped by: {traced.reason}" if traced.reason else "kept"
    text = traced.text[:_TEXT_SHOWN] + (" …" if len(traced.text) > _TEXT_SHOWN else "")
    return [f"{traced.id} (shard {traced.shard}, row {traced.row})", verdict, gates, signals, text]


def _number(value: float) -> str:
    return "null" if math.isnan(value) else f"{value:.6g}"
