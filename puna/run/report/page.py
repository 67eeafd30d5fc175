"""Renders the report: a run folder in, one HTML file out, with no request to anywhere."""

from __future__ import annotations

import functools
import json
import re
import shlex
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2

from puna.core.files import write_text
from puna.run.claims import figure_text
from puna.run.planner import duration
from puna.run.report import charts
from puna.run.report.gather import View, finite, gather

_FIGURE = re.compile(r"[-+–]?[\d.,]+(?:e[-+]?\d+)?\s?(%|x|kB|MB|GB|k|M|G)?( to .*)?$|baseline$|–$")


def write_report(run_folder: Path | str) -> Path:
    """Write ``report.html`` into a run folder, finished or not, and return its path."""
    path = Path(run_folder) / "report.html"
    write_text(path, render(gather(run_folder)))
    return path


def render(view: View) -> str:
    """The page as HTML."""
    return environment().get_template("report.html.j2").render(view=view, samples=_by_label(view))


@functools.cache
def environment() -> jinja2.Environment:
    """The templates of pages, with their filters."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Any] = {
        "cell": cell,
        "duration": duration,
        "size": size,
        "number": number,
        "json": lambda value: json.dumps(value, ensure_ascii=False),
        "command": lambda parts: shlex.join([Path(parts[0]).name, *parts[1:]]) if parts else "",
        "paper": paper_link,
        "facts": facts,
        "figure": figure_text,
        "right": right_columns,
        "grouped": is_grouped,
    }
    environment.filters |= filters
    return environment


def _by_label(view: View) -> dict[str, list[dict[str, Any]]]:
    grouped: dict[str, list[dict[str, Any]]] = {}
    for sample in view.samples:
        grouped.setdefault(str(sample.get("label", "")), []).append(sample)
    return grouped


def cell(value: Any) -> str:
    """A table's cell as text: whole numbers with separators, others in four digits."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return number(value)
    return "" if value is None else str(value)


def right_columns(table: Mapping[str, Any]) -> list[bool]:
    """Which columns of a table hold figures, to be set flush right."""
    columns = range(len(table["columns"]))
    cells = [[cell(row[place]) for row in table["rows"]] for place in columns]
    return [any(texts) and all(_FIGURE.match(text) for text in texts if text) for texts in cells]


def is_grouped(table: Mapping[str, Any]) -> bool:
    """Whether rows that belong together share their first cell, so that lines set groups apart."""
    return any(one[0] == other[0] for one, other in pairwise(table["rows"]))


def number(value: float | None) -> str:
    """A metric as text; a dash for what is not a number."""
    return charts.short(value) if value is not None and finite(value) else "–"


def size(count: float) -> str:
    """Bytes as kB, MB or GB."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"


def paper_link(reference: str) -> str:
    """The address of a paper: an arXiv reference spelt out, another left as it is."""
    kind, _, name = reference.partition(":")
    return f"https://arxiv.org/abs/{name}" if kind.lower() == "arxiv" else reference


def facts(entry: Mapping[str, Any], *skipped: str) -> str:
    """The rest of a mapping in one line: ``key value, key value``."""
    shown = {
        key: value for key, value in entry.items() if key not in skipped and value not in (None, "", [], {})
    }
    return ", ".join(
        f"{key} {value if isinstance(value, str) else json.dumps(value)}" for key, value in shown.items()
    )
