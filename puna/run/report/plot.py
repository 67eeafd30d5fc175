"""The before/after plot as a picture, for a README: bits per byte by corpus and model, with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from puna.core.errors import PunaError
from puna.core.files import write_aside
from puna.run.record import Run

_INK, _SOFT, _EDGE = "#1c1e21", "#5d6470", "#e4e1d9"
_COLOURS = {"better": "#1a7f5a", "worse": "#b3382c", "unclear": "#7b818c"}


def plot_before_after(run_folder: Path | str, png_path: Path | str) -> Path:
    """Draw the evaluation of a run as a PNG and return its path.

    One panel a corpus; a dashed line marks the baseline, each other model is a point with the
    interval of its change, coloured where the interval excludes no change.
    """
    run = Run.open(run_folder)
    drawn = [item for record in run.stages.values() for item in record.report.get("intervals", [])]
    if not drawn:
        raise PunaError("no stage of this run measured anything to draw", where=run.folder)
    # Agg draws into memory and needs neither a display nor pyplot's global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    item = drawn[-1]
    groups = list(dict.fromkeys(row["group"] for row in item["rows"]))
    models = list(dict.fromkeys(row["label"] for row in item["rows"] if row["label"] != item["baseline"]))
    figure = Figure(
        figsize=(1.5 + 3.3 * len(groups), 1.35 + 0.36 * len(models)), dpi=180, layout="constrained"
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for panel, group in zip(panels, groups, strict=True):
        _panel(panel, item, group, models)
    panels[0].set_yticks(range(len(models)), models, color=_INK)
    panels[0].invert_yaxis()
    figure.supxlabel(
        f"{item['unit']}, lower is better; bars are 95% paired bootstrap intervals", fontsize=8, color=_SOFT
    )
    path = Path(png_path)
    with write_aside(path) as aside:
        figure.savefig(aside, format="png", facecolor="white")
    return path


def _panel(panel: Any, item: Mapping[str, Any], group: str, models: list[str]) -> None:
    rows = {row["label"]: row for row in item["rows"] if row["group"] == group}
    base = rows[item["baseline"]]["value"]
    panel.axvline(base, color=_SOFT, linestyle=(0, (3, 2)), linewidth=1)
    panel.annotate(
        f"{item['baseline']} {base:.3f}",
        (base, 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        fontsize=8,
        color=_SOFT,
    )
    for place, model in enumerate(models):
        row = rows[model]
        change = row["change"]
        colour = _COLOURS["unclear"]
        if "low" in change:
            side = "better" if change["high"] < 0 else "worse" if change["low"] > 0 else "unclear"
            colour = _COLOURS[side]
            ends = [base * (1 + change[end]) for end in ("low", "high")]
            panel.plot(ends, [place, place], color=colour, linewidth=2, solid_capstyle="round")
        panel.plot([row["value"]], [place], "o", color=colour, markersize=5.5)
        label = f"{row['value']:.3f} ({100 * change['value']:+.1f}%)"
        panel.annotate(
            label,
            (row["value"], place),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=7.5,
            color=_INK,
        )
    panel.set_title(group, fontsize=10, color=_INK, fontweight="bold", pad=16)
    panel.margins(x=0.28)
    panel.set_ylim(-0.7, len(models) - 0.4)
    panel.grid(axis="x", color=_EDGE, linewidth=0.8)
    panel.set_axisbelow(True)
    panel.tick_params(colors=_SOFT, labelsize=8, length=0)
    for spine in panel.spines.values():
        spine.set_visible(False)
