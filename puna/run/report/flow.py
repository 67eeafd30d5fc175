"""Charts of a curation as inline SVG: the flow of documents through its steps, and distributions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from markupsafe import Markup

from puna.run.report.charts import draw_frame, draw_line, draw_text, short, ticks

_ROW = 34
_TALLEST = 220.0


def sankey(flow: Sequence[tuple[str, int, int]], kept: int, *, width: int = 1020) -> Markup:
    """A band of documents from left to right that narrows at each step; what a step removes turns down.

    ``flow`` has per step its name, how many it removed and how many came to it. Widths are in proportion.
    """
    read = flow[0][2] if flow else kept
    if not read:
        return Markup("")
    unit = _TALLEST / read
    step = (width - 190) / max(len(flow), 1)
    top, base = 30.0, 30.0 + _TALLEST + 24
    parts = [draw_text(0, 14, f"{read:,} documents read", "axis")]
    left, height = 0.0, read * unit
    for number, (name, lost, came) in enumerate(flow):
        right = left + step
        rest = (came - lost) * unit
        parts.append(_band(left, right, top, came * unit, rest))
        drop = base + _ROW * number
        parts.append(_fall(right - step * 0.55, top + rest, lost * unit, drop))
        share = f"{lost / read:.1%}"
        parts.append(
            draw_text(right - step * 0.55 + 14, drop + 4, f"{name}: {lost:,} ({share} of all)", "label")
        )
        left, height = right, rest
    parts.append(_band(left, width - 180, top, height, height))
    kept_text = f"{kept:,} kept ({kept / read:.1%})"
    parts.append(draw_text(width - 172, top + height / 2 + 4, kept_text, "label"))
    return draw_frame(
        parts, width, int(base + _ROW * len(flow) + 10), "how documents flowed through the steps"
    )


def histogram(
    edges: Sequence[float],
    counts: Sequence[int],
    bounds: Mapping[str, Mapping[str, float]],
    *,
    x: str,
    width: int = 520,
    height: int = 200,
) -> Markup:
    """Bars of how many documents have which value, with lines where gates bound it."""
    if not counts or not max(counts):
        return Markup("")
    low, high = edges[0], edges[-1]
    bottom, left, right = height - 40, 10.0, width - 10.0

    def place(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    parts: list[Markup] = []
    place_ = 'x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"'
    bar = Markup(f"<rect {place_} class='swatch series-1'><title>{{}}</title></rect>")
    for (start, stop), count in zip(pairwise(edges), counts, strict=True):
        tall = (bottom - 24) * count / max(counts)
        told = f"{short(start)} to {short(stop)}: {count:,}"
        wide = max(place(stop) - place(start) - 1, 0.5)
        parts.append(bar.format(place(start), bottom - tall, wide, tall, told))
    for tick in (tick for tick in ticks(low, high, 5) if low <= tick <= high):
        parts.append(draw_line(place(tick), bottom, place(tick), bottom + 5, "rule"))
        parts.append(draw_text(place(tick), bottom + 19, short(tick), "tick", anchor="middle"))
    parts.append(draw_line(left, bottom, right, bottom, "rule"))
    for name, given in bounds.items():
        for key, value in given.items():
            parts.append(draw_line(place(value), 16, place(value), bottom, "whisker worse"))
            side = "end" if place(value) > width / 2 else "start"
            shift = -5 if side == "end" else 5
            parts.append(
                draw_text(place(value) + shift, 24, f"{name}: {key} {short(value)}", "tick", anchor=side)
            )
    parts.append(draw_text((left + right) / 2, height - 4, x, "axis", anchor="middle"))
    return draw_frame(parts, width, height, f"documents by {x}")


def _band(left: float, right: float, top: float, tall: float, after: float) -> Markup:
    """A band that changes its height in the middle of its way."""
    middle = (left + right) / 2
    path = (
        f"M{left:.1f},{top:.1f} L{right:.1f},{top:.1f} L{right:.1f},{top + after:.1f} "
        f"C{middle:.1f},{top + after:.1f} {middle:.1f},{top + tall:.1f} {left:.1f},{top + tall:.1f} Z"
    )
    return Markup('<path d="{}" class="band"/>').format(path)


def _fall(left: float, top: float, wide: float, bottom: float) -> Markup:
    """What is removed: a stroke as wide as it is much, from the band down to its name."""
    path = f"M{left:.1f},{top:.1f} L{left:.1f},{bottom:.1f} L{left + 10:.1f},{bottom:.1f}"
    shape = Markup('<path d="{}" class="fall" stroke-width="{:.1f}"/>')
    return shape.format(path, max(min(wide, 14.0), 1.0))
