"""Charts as inline SVG that follow the page's colours, light or dark. No library, no script.

Sizes are in the viewBox's units; the page scales a chart to its column. Colours are CSS variables
(``--series-1`` ... ``--series-6``, ``--better``, ``--worse``, ``--unclear``) set by the report's style.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

Point = tuple[float, float]
_SERIES = 6
_CHARACTER = 6.4  # mean width of a character at the charts' 12-pixel type
_MOST_POINTS = 400


@dataclass(frozen=True)
class _Scale:
    """A linear map from values to the coordinates of one axis."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def line_chart(
    series: Mapping[str, Sequence[Point]], *, x: str, y: str, width: int = 520, height: int = 240
) -> Markup:
    """Lines over a common x; ``x`` and ``y`` name the axes. Long series are thinned evenly."""
    lines = {name: _thinned(points) for name, points in series.items() if points}
    xs = [point[0] for points in lines.values() for point in points]
    ys = [point[1] for points in lines.values() for point in points]
    if not xs:
        return Markup("")
    y_ticks, x_ticks = ticks(min(ys), max(ys), 5), ticks(min(xs), max(xs), 6)
    left = 14 + _CHARACTER * max(len(short(tick)) for tick in y_ticks)
    legend = 20 if len(lines) > 1 else 0
    x_scale = _Scale(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, left, width - 14)
    y_scale = _Scale(min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys)), height - 40, 28 + legend)
    parts = [draw_text(0, 12, y, "axis")]
    for tick in y_ticks:
        place = y_scale(tick)
        parts.append(draw_line(left, place, width - 14, place, "grid"))
        parts.append(draw_text(left - 8, place + 4, short(tick), "tick", anchor="end"))
    for tick in (tick for tick in x_ticks if min(xs) <= tick <= max(xs)):
        parts.append(draw_line(x_scale(tick), height - 40, x_scale(tick), height - 35, "rule"))
        parts.append(draw_text(x_scale(tick), height - 21, short(tick), "tick", anchor="middle"))
    parts.append(draw_line(left, height - 40, width - 14, height - 40, "rule"))
    parts.append(draw_text((left + width - 14) / 2, height - 4, x, "axis", anchor="middle"))
    if legend:
        parts.append(_legend(list(lines), left))
    for number, (name, points) in enumerate(lines.items()):
        parts.append(_path(name, points, x_scale, y_scale, number))
    return draw_frame(parts, width, height, f"{y} over {x}")


@dataclass(frozen=True)
class Row:
    """One line of an interval chart; ``low`` and ``high`` may be missing, ``group`` heads a run of rows."""

    group: str
    label: str
    value: float
    low: float | None = None
    high: float | None = None


def interval_chart(rows: Sequence[Row], *, x: str, zero: str, width: int = 1020) -> Markup:
    """Points with their intervals around zero, one row each, below zero being better.

    ``zero`` says what the line at zero is. A row is coloured only where its interval excludes zero.
    """
    if not rows:
        return Markup("")
    ends = [end for row in rows for end in (row.value, row.low, row.high) if end is not None]
    x_ticks = ticks(min(0.0, *ends), max(0.0, *ends), 6)
    left = 18 + _CHARACTER * max(max(len(row.label) + 2, len(row.group)) for row in rows)
    right = width - 14 - _CHARACTER * max(len(_figures(row)) for row in rows)
    scale = _Scale(x_ticks[0], x_ticks[-1], left, right - 14)
    groups = list(dict.fromkeys(row.group for row in rows))
    height = 78 + 22 * len(rows) + 28 * len(groups)
    bottom = height - 40
    parts: list[Markup] = []
    for tick in x_ticks:
        parts.append(draw_line(scale(tick), 24, scale(tick), bottom, "rule zero" if tick == 0 else "grid"))
        parts.append(draw_text(scale(tick), bottom + 16, _percent(tick), "tick", anchor="middle"))
    parts.append(draw_text(scale(0), 14, zero, "axis", anchor="middle"))
    parts.append(draw_text((left + right) / 2, height - 4, x, "axis", anchor="middle"))
    place = 24.0
    for group in groups:
        place += 24
        parts.append(draw_text(0, place, group, "group"))
        place += 4
        for row in (row for row in rows if row.group == group):
            place += 22
            parts.append(_interval(row, scale, place - 4, right))
    return draw_frame(parts, width, height, f"{x}, with 95% intervals")


def _interval(row: Row, scale: _Scale, place: float, right: float) -> Markup:
    known = row.low is not None and row.high is not None
    colour = "unclear"
    if known:
        colour = "better" if row.high < 0 else "worse" if row.low > 0 else "unclear"  # type: ignore[operator]
    parts = [draw_text(12, place + 4, row.label, "label")]
    if known:
        parts.append(draw_line(scale(row.low), place, scale(row.high), place, f"whisker {colour}"))  # type: ignore[arg-type]
    parts.append(
        Markup('<circle cx="{:.1f}" cy="{:.1f}" r="4.5" class="{}"/>').format(scale(row.value), place, colour)
    )
    parts.append(draw_text(right, place + 4, _figures(row), "figures"))
    return Markup("<g><title>{}: {}</title>{}</g>").format(row.label, _figures(row), Markup("").join(parts))


def _figures(row: Row) -> str:
    ends = (
        f"  [{_percent(row.low)}, {_percent(row.high)}]"
        if row.low is not None and row.high is not None
        else ""
    )
    return _percent(row.value, 1) + ends


def _percent(share: float, digits: int | None = None) -> str:
    value = 100 * share
    if digits is None:
        digits = 0 if abs(value - round(value)) < 1e-9 else 1
    return f"{value:+.{digits}f}%" if round(value, digits) else "0%"


def ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers that cover ``low`` to ``high``; a range of no width is widened."""
    largest = max(abs(low), abs(high))
    if high - low <= 1e-9 * max(largest, 1e-30):
        half = 0.1 * largest if largest > 1e-30 else 0.5
        low, high = low - half, high + half
    raw = (high - low) / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(step * size for step in (1, 2, 2.5, 5, 10) if step * size >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def short(value: float) -> str:
    """A number in few characters: 12k, 1.5M, 0.025, 3e-05."""
    if value == 0:
        return "0"
    size = abs(value)
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= factor:
            return f"{value / factor:.4g}{letter}"
    return f"{value:.4g}".replace("e-0", "e-")


def _thinned(points: Sequence[Point]) -> list[Point]:
    finite = [point for point in points if all(map(math.isfinite, point))]
    step = -(-len(finite) // _MOST_POINTS)
    return finite if step <= 1 else [*finite[:-1:step], finite[-1]]


def _path(name: str, points: Sequence[Point], x: _Scale, y: _Scale, number: int) -> Markup:
    if len(points) == 1:
        dot = Markup('<circle cx="{:.1f}" cy="{:.1f}" r="4" class="dot series-{}"/>')
        return dot.format(x(points[0][0]), y(points[0][1]), number % _SERIES + 1)
    drawn = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
    line = Markup('<polyline points="{}" class="line series-{}"><title>{}: {} at the end</title></polyline>')
    return line.format(drawn, number % _SERIES + 1, name, short(points[-1][1]))


def _legend(names: Sequence[str], left: float) -> Markup:
    parts, place = [], left
    for number, name in enumerate(names):
        parts.append(
            Markup('<rect x="{:.1f}" y="24" width="10" height="10" rx="2" class="swatch series-{}"/>').format(
                place, number % _SERIES + 1
            )
        )
        parts.append(draw_text(place + 15, 33, name, "label"))
        place += 15 + _CHARACTER * len(name) + 18
    return Markup("").join(parts)


def draw_line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    """A line; ``kind`` is its class in the page's style."""
    drawn = Markup('<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" class="{}"/>')
    return drawn.format(x1, y1, x2, y2, kind)


def draw_text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> Markup:
    """A text; ``kind`` is its class in the page's style."""
    drawn = Markup('<text x="{:.1f}" y="{:.1f}" class="{}" text-anchor="{}">{}</text>')
    return drawn.format(x, y, kind, anchor, text)


def draw_frame(parts: Sequence[Markup], width: int, height: float, title: str) -> Markup:
    """The parts of a chart as one SVG; ``title`` says what it shows to those who cannot see it."""
    drawn = Markup('<svg viewBox="0 0 {} {:.0f}" role="img" aria-label="{}" style="max-width:{}px">{}</svg>')
    return drawn.format(width, height, escape(title), width, Markup("").join(parts))
