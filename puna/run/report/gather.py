"""A run folder as the report shows it: read once, nothing computed that a stage did not measure.

Everything is read tolerantly where a run may be unfinished or failed: what is not there is not shown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from puna.core import assets
from puna.core.files import read_json
from puna.core.rows import META
from puna.run.record import Run, StageRecord
from puna.run.report.charts import Row, interval_chart, line_chart

_HEADLINES = 3


@dataclass
class StageView:
    """A stage as the report shows it; ``status`` is done, unfinished or not run."""

    id: str
    use: str
    status: str
    reused: bool = False
    seconds: float = 0.0
    share: float = 0.0
    peak_memory: int = 0
    headline: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    inputs: list[tuple[str, str, str]] = field(default_factory=list)
    outputs: list[tuple[str, str, str, int]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    fingerprint: str = ""
    tables: list[dict[str, Any]] = field(default_factory=list)
    charts: list[tuple[str, Markup]] = field(default_factory=list)


@dataclass
class CorpusView:
    """A corpus that the run made: counts, languages, licences and where its rows came from."""

    name: str
    kind: str
    counts: dict[str, int]
    languages: list[str]
    licences: list[str]
    provenance: list[dict[str, Any]]


@dataclass
class View:
    """Everything that ``report.html.j2`` shows."""

    about: dict[str, Any]
    recipe: dict[str, Any]
    recipe_text: str
    stages: list[StageView]
    corpora: list[CorpusView]
    sources: list[dict[str, str]]
    results: list[dict[str, Any]]
    data_tables: list[tuple[str, list[dict[str, Any]]]]
    intervals: list[tuple[str, Markup]]
    tiles: list[dict[str, str]]
    samples: list[dict[str, Any]]
    claims: dict[str, Any] | None
    fingerprints: list[tuple[str, str, str]]


def gather(folder: Path | str) -> View:
    """Read a run folder; one that is none is a :class:`PunaError`."""
    run = Run.open(folder)
    recipe_file = run.folder / "run.yaml"
    text = recipe_file.read_text(encoding="utf-8") if recipe_file.is_file() else ""
    recipe = yaml.safe_load(text) or {}
    reused = {line["stage"]: bool(line["reused"]) for line in read_lines(run.folder / "metrics.jsonl")}
    stages = [_stage(run, name, recipe, reused.get(name, False)) for name in run.about["stages"]]
    longest = max((stage.seconds for stage in stages), default=0.0) or 1.0
    for stage in stages:
        stage.share = stage.seconds / longest
    measuring = [record for record in run.stages.values() if record.report.get("intervals")]
    drawn = [item for record in measuring for item in record.report["intervals"]]
    return View(
        about=run.about,
        recipe=recipe,
        recipe_text=text,
        stages=stages,
        corpora=_corpora(run),
        sources=_sources(run),
        results=[table for record in measuring for table in record.report.get("tables", [])],
        data_tables=[
            (name, tables) for name, record in run.stages.items() if (tables := _data_tables(record))
        ],
        intervals=[(item["title"], chart) for item in drawn if (chart := _interval_chart(item))],
        tiles=[tile for item in drawn[-1:] for tile in _tiles(item)],  # of the last evaluation
        samples=[sample for record in run.stages.values() for sample in record.report.get("samples", [])],
        claims=run.claims,
        fingerprints=_fingerprints(run),
    )


def _stage(run: Run, name: str, recipe: Mapping[str, Any], reused: bool) -> StageView:
    record = run.stages.get(name)
    if record is None:
        use = str(recipe.get("stages", {}).get(name, {}).get("use", ""))
        begun = run.folder / f"{name}.work"
        charts = _charts_so_far(begun / "metrics.jsonl")
        return StageView(name, use, "unfinished" if begun.is_dir() else "not run", charts=charts)
    figures = {key: value for key, value in record.metrics.items() if finite(value)}
    shown = [f"{key} {value:.4g}" for key, value in figures.items() if not key.endswith((".low", ".high"))]
    own_tables = (
        [] if record.report.get("intervals") or _data_tables(record) else record.report.get("tables", [])
    )
    return StageView(
        id=name,
        use=record.use,
        status="done",
        reused=reused,
        seconds=record.seconds,
        peak_memory=record.peak_memory,
        headline=", ".join(shown[:_HEADLINES]) + (" …" if len(shown) > _HEADLINES else ""),
        parameters=record.parameters,
        inputs=list(_inputs(record)),
        outputs=[
            (
                key,
                f"{name}/{output['path']}",
                output["fingerprint"],
                sum(f["bytes"] for f in output["files"].values()),
            )
            for key, output in record.outputs.items()
        ],
        metrics=dict(record.metrics),
        fingerprint=record.fingerprint,
        tables=own_tables,
        charts=_charts(record),
    )


def _inputs(record: StageRecord) -> Iterable[tuple[str, str, str]]:
    """Name, what it points at, and fingerprint of every input, nested ones spelt out."""
    for name, about in record.inputs.items():
        parts = (
            {name: about} if "reference" in about else {f"{name}.{key}": part for key, part in about.items()}
        )
        for full, part in parts.items():
            yield full, str(part["reference"]), str(part["fingerprint"])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file; what a crash cut short, or a missing file, gives nothing."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def _charts_so_far(path: Path) -> list[tuple[str, Markup]]:
    """Loss and learning rate of a training stage that has not finished, from its ``metrics.jsonl``."""
    lines = [line for line in read_lines(path) if line.get("kind") == "train"]
    charts = []
    for title, key in (("Loss so far", "loss"), ("Learning rate so far", "learning_rate")):
        points = [(float(line["tokens"]), float(line[key])) for line in lines if key in line]
        charts.append((title, line_chart({"": points}, x="tokens", y="")))
    return [(title, chart) for title, chart in charts if chart]


def _charts(record: StageRecord) -> list[tuple[str, Markup]]:
    """Curves of ``Context.report``: ``{"title", "x", "y", "series": [{"name", "x": [...], "y": [...]}]}``."""
    charts = []
    for curve in record.report.get("curves", []):
        series = {part["name"]: list(zip(part["x"], part["y"], strict=True)) for part in curve["series"]}
        charts.append((curve["title"], line_chart(series, x=curve["x"], y=curve["y"])))
    return [(title, chart) for title, chart in charts if chart]


def _interval_chart(item: Mapping[str, Any]) -> Markup:
    rows = [
        Row(
            row["group"],
            row["label"],
            row["change"]["value"],
            row["change"].get("low"),
            row["change"].get("high"),
        )
        for row in item["rows"]
        if "change" in row
    ]
    return interval_chart(rows, x=f"change in {item['unit']}", zero=item["baseline"])


def _tiles(item: Mapping[str, Any]) -> list[dict[str, str]]:
    """For each corpus the best model's figure beside the baseline's."""
    tiles = []
    for group in dict.fromkeys(row["group"] for row in item["rows"]):
        rows = [row for row in item["rows"] if row["group"] == group]
        base = next((row for row in rows if row["label"] == item["baseline"]), None)
        changed = [row for row in rows if "change" in row]
        if base is None or not changed:
            continue
        best = min(changed, key=lambda row: float(row["value"]))
        change = best["change"]
        ends = f" ({100 * change['low']:+.1f} to {100 * change['high']:+.1f})" if "low" in change else ""
        tiles.append(
            {
                "label": f"{item['unit']}, {group}",
                "value": f"{base['value']:.3f} → {best['value']:.3f}",
                "note": f"{100 * change['value']:+.1f}%{ends}, {best['label']}",
            }
        )
    return tiles


def _data_tables(record: StageRecord) -> list[dict[str, Any]]:
    """The tables of a stage that makes corpora."""
    if not any(output["kind"] == "corpus" for output in record.outputs.values()):
        return []
    return list(record.report.get("tables", []))


def _corpora(run: Run) -> list[CorpusView]:
    views = []
    for stage, record in run.stages.items():
        for name, output in record.outputs.items():
            file = record.output(name) / META
            if output["kind"] != "corpus" or not file.is_file():
                continue
            meta = read_json(file)
            views.append(
                CorpusView(
                    name=f"{stage}.{name}" if len(record.outputs) > 1 else stage,
                    kind=meta["kind"],
                    counts=meta["counts"],
                    languages=list(meta.get("languages", {})),
                    licences=list(meta.get("licences", [])),
                    provenance=list(meta.get("provenance", [])),
                )
            )
    return views


def _sources(run: Run) -> list[dict[str, str]]:
    """What came from outside the run as inputs: name, what it is, licence where it is declared."""
    found: dict[str, dict[str, str]] = {}
    for record in run.stages.values():
        for about in references(record.inputs):
            name, origin = str(about["reference"]), str(about["origin"])
            if origin != "stage" and name not in found:
                found[name] = {"name": name, "origin": origin, "what": "", "licence": "not declared"}
                if origin == "asset" and assets.is_asset(name):
                    asset = assets.describe(name)
                    found[name] |= {"what": asset.what, "licence": asset.licence}
    return list(found.values())


def references(inputs: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    """Every reference among the inputs of a stage record, those of inputs that take several too."""
    for about in inputs.values():
        yield from [about] if "reference" in about else about.values()


def _fingerprints(run: Run) -> list[tuple[str, str, str]]:
    """(stage, what, fingerprint): the stage's own, its code, its inputs, its outputs."""
    rows = []
    for name, record in run.stages.items():
        rows += [(name, "stage", record.fingerprint), (name, "code", str(record.parts.get("code", "")))]
        rows += [(name, f"input {key}", value) for key, value in record.parts.get("inputs", {}).items()]
        rows += [(name, f"output {key}", output["fingerprint"]) for key, output in record.outputs.items()]
    return rows


def finite(value: float | None) -> bool:
    """Whether a metric is a number that can be shown."""
    return value is not None and math.isfinite(value)
