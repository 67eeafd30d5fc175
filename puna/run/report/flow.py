"""Charts of a curation as inline SVG: the flow of documents through its steps, and distributions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from markupsafe import Markup

from puna.run.report.charts import draw_frame, draw_line, draw_text, short, ticks

_TALLEST = 220.0
_LABEL = 16.0  # height that a label takes at least
_MARGIN = 330  # width kept free for labels to the right of the last step


def sankey(flow: Sequence[tuple[str, int, int]], kept: int, *, width: int = 1020) -> Markup:
    """Documents as a band from left to right, out of which each step turns down what it removes.

    ``flow`` has per step its name, how many it removed and how many came to it. Heights are in proportion,
    but for a hair's breadth that every removal has.
    """
    read = flow[0][2] if flow else kept
    if not read:
        return Markup("")
    unit, step, top = _TALLEST / read, (width - _MARGIN) / max(len(flow), 1), 30.0
    lost_heights = [max(lost * unit, 0.8) for _, lost, _ in flow]
    # The last step's removal ends highest: none then crosses the label of one before it.
    ends: list[float] = []
    place = top + _TALLEST + 26
    for height in reversed(lost_heights):
        ends.insert(0, place)
        place += max(height, _LABEL) + 6
    parts = [draw_text(0, 14, f"{read:,} documents read", "axis")]
    for number, (name, lost, came) in enumerate(flow):
        left, rest, height = step * number, (came - lost) * unit, lost_heights[number]
        parts.append(_box(left, top, step, rest))
        parts.append(_fall(left, top + rest, height, step, ends[number]))
        told = f"{name}: {lost:,} ({lost / read:.1%} of all)"
        parts.append(draw_text(left + step + 8, ends[number] + max(height, _LABEL) / 2 + 4, told, "label"))
    end = step * len(flow)
    parts.append(_box(end, top, 24, kept * unit))
    kept_text = f"{kept:,} kept ({kept / read:.1%})"
    parts.append(draw_text(end + 34, top + kept * unit / 2 + 4, kept_text, "label"))
    return draw_frame(parts, width, int(place + 4), "how documents flowed through the steps")


def histogram(
    edges: Sequence[float],
    counts: Sequence[int],
    bounds: Mapping[str, Mapping[str, float]],
    *,
    x: str,
    logarithmic: bool = False,
    width: int = 520,
    height: int = 210,
) -> Markup:
    """Bars of how many documents have which value, with lines where gates bound it.

    Bars out of a gate's bounds are of another colour. ``logarithmic``: the axis is that of log(1 + x).
    """
    if not counts or not max(counts):
        return Markup("")
    bottom, left, right = height - 40, 10.0, width - 10.0
    low, high = (math.log1p(edge) if logarithmic else edge for edge in (edges[0], edges[-1]))

    def place(value: float) -> float:
        scaled = math.log1p(value) if logarithmic else value
        return left + (scaled - low) / (high - low) * (right - left)

    parts: list[Markup] = []
    place_ = 'x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"'
    bar = Markup(f"<rect {place_} class='{{}}'><title>{{}}</title></rect>")
    for (start, stop), count in zip(pairwise(edges), counts, strict=True):
        tall = (bottom - 36) * count / max(counts)
        told = f"{short(start)} to {short(stop)}: {count:,}"
        wide = max(place(stop) - place(start) - 1, 0.5)
        kind = "lost" if _is_out(start, stop, bounds) else "swatch series-1"
        parts.append(bar.format(place(start), bottom - tall, wide, tall, kind, told))
    marks = _log_ticks(edges[0], edges[-1]) if logarithmic else ticks(edges[0], edges[-1], 5)
    for tick in (tick for tick in marks if edges[0] <= tick <= edges[-1]):
        parts.append(draw_line(place(tick), bottom, place(tick), bottom + 5, "rule"))
        parts.append(draw_text(place(tick), bottom + 19, short(tick), "tick", anchor="middle"))
    parts.append(draw_line(left, bottom, right, bottom, "rule"))
    words = {"minimum": "at least", "maximum": "at most", "above": "more than", "below": "less than"}
    given = [(name, key, value) for name, each in bounds.items() for key, value in each.items()]
    for number, (name, key, value) in enumerate(given):
        parts.append(draw_line(place(value), 18 + 12 * (number % 2), place(value), bottom, "whisker worse"))
        side = "end" if place(value) > width / 2 else "start"
        told = f"{name}: {words[key]} {short(value)}"
        parts.append(draw_text(place(value), 12 + 12 * (number % 2), told, "tick", anchor=side))
    parts.append(draw_text((left + right) / 2, height - 4, x, "axis", anchor="middle"))
    return draw_frame(parts, width, height, f"documents by {x}")


def _is_out(start: float, stop: float, bounds: Mapping[str, Mapping[str, float]]) -> bool:
    """Whether a gate drops all between the two."""
    for given in bounds.values():
        if max(given.get("minimum", -math.inf), given.get("above", -math.inf)) >= stop:
            return True
        if given.get("maximum", math.inf) < start or given.get("below", math.inf) <= start:
            return True
    return False


def _log_ticks(low: float, high: float) -> list[float]:
    """0 and powers of ten."""
    powers = [10.0**power for power in range(16)]
    return [0.0, *(power for power in powers if low <= power <= high)]


def _box(left: float, top: float, wide: float, tall: float) -> Markup:
    """What stays: a piece of the band."""
    shape = Markup('<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" class="band"/>')
    return shape.format(left, top, wide, max(tall, 0.0))


def _fall(left: float, top: float, tall: float, wide: float, bottom: float) -> Markup:
    """What is removed: a piece of the band that bends down to its label."""
    right, middle = left + wide, left + wide / 2
    path = (
        f"M{left:.1f},{top:.1f} C{middle:.1f},{top:.1f} {middle:.1f},{bottom:.1f} {right:.1f},{bottom:.1f} "
        f"L{right:.1f},{bottom + tall:.1f} C{middle:.1f},{bottom + tall:.1f} {middle:.1f},{top + tall:.1f} "
        f"{left:.1f},{top + tall:.1f} Z"
    )
    return Markup('<path d="{}" class="fall"/>').format(path)
