"""The page of a pool: the flow of documents, what each step removed with examples, and distributions."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from puna.core.files import write_text
from puna.data.curate.analyze import Analysis, Distribution, analyze
from puna.data.curate.pool import Pool
from puna.run.report.flow import histogram, sankey
from puna.run.report.page import environment, size


def write_pool_page(pool: Pool, file: Path) -> Path:
    """Write the page of a pool as one HTML file, and return its path."""
    write_text(file, render(analyze(pool)))
    return file


def render(analysis: Analysis) -> str:
    """The page as HTML."""
    metrics = analysis.metrics
    kept = metrics["bytes.kept"]
    tiles = [
        ("documents read", f"{metrics['documents.read']:,.0f}"),
        ("kept", f"{metrics['documents.kept']:,.0f} ({metrics['kept']:.1%})"),
        ("failed", f"{metrics['documents.failed']:,.0f}"),
        ("text kept", f"{size(kept)} ({kept / metrics['bytes.read'] if kept else 0:.1%})"),
    ]
    charts = [(one, _chart(one)) for one in analysis.distributions if one.documents]
    nowhere = [one.signal for one in analysis.distributions if not one.documents]
    return (
        environment()
        .get_template("pool.html.j2")
        .render(
            analysis=analysis,
            tiles=tiles,
            flow=sankey(analysis.flow, analysis.kept),
            charts=charts,
            nowhere=nowhere,
        )
    )


def _chart(one: Distribution) -> Markup:
    name = one.signal.rpartition(".")[2]
    return histogram(one.edges, one.counts, one.bounds, x=name, logarithmic=one.logarithmic)
