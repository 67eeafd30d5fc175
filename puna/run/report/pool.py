"""The page of a pool: the flow of documents, what each step removed with examples, and distributions."""

from __future__ import annotations

from pathlib import Path

from puna.core.files import write_text
from puna.data.curate.analyze import Analysis, analyze
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
    tiles = [
        ("documents read", f"{metrics['documents.read']:,.0f}"),
        ("kept", f"{metrics['documents.kept']:,.0f} ({metrics['kept']:.1%})"),
        ("failed", f"{metrics['documents.failed']:,.0f}"),
        ("text kept", f"{size(metrics['bytes.kept'])} of {size(metrics['bytes.read'])}"),
    ]
    charts = [
        (one, histogram(one.edges, one.counts, one.bounds, x=one.signal.rpartition(".")[2]))
        for one in analysis.distributions
    ]
    return (
        environment()
        .get_template("pool.html.j2")
        .render(analysis=analysis, tiles=tiles, flow=sankey(analysis.flow, analysis.kept), charts=charts)
    )
