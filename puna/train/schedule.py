"""Learning-rate schedules: segments one after the other, each a pure function of the steps into it.

A schedule is any sequence of segments; the well-known ones are presets (:func:`preset`) that expand
to segments. A segment falls (or rises) from ``start`` to ``end``, both factors of the base rate; its
end is the moment after its last step, so the last step itself has not reached it yet, but for the
warm-up, whose last step has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from puna.core.errors import PunaError, unknown_name

Shape = Literal["warmup", "constant", "linear", "cosine", "decay", "inverse_sqrt", "step"]
ScheduleKind = Literal["constant", "cosine", "linear", "inverse_sqrt", "step", "wsd"]
PRESETS = ("constant", "cosine", "linear", "inverse_sqrt", "step", "wsd")
REST, PHASE = "rest", "phase"
"""Lengths of a last segment that takes all the steps that are left, and of one that ends with the phase of
the mixture that it begins in."""


@dataclass(frozen=True)
class Segment:
    """``steps`` optimiser steps of one shape.

    * ``warmup``: equal steps from ``start`` that reach ``end`` with the last one;
    * ``constant``: ``start``;
    * ``linear``: a straight line from ``start`` to ``end``;
    * ``cosine``: half a cosine from ``start`` to ``end`` (Loshchilov and Hutter 2017);
    * ``decay``: ``1 - sqrt`` from ``start`` to ``end`` (the decay of Haegele et al. 2024);
    * ``inverse_sqrt``: ``start * sqrt(t / (t + n))`` with ``t = timescale`` (Vaswani et al. 2017, where
      the timescale is the warm-up);
    * ``step``: ``start`` times ``gamma`` every ``step_size`` steps (torch's ``StepLR``).

    ``skipped`` steps of its course lie before its first one.
    """

    shape: Shape
    steps: int
    start: float = 1.0
    end: float = 1.0
    timescale: int = 10_000
    step_size: int = 1
    gamma: float = 1.0
    skipped: int = 0

    def factor(self, into: int) -> float:
        """The factor ``into`` steps after its beginning; beyond its end it stays where it ended."""
        match self.shape:
            case "warmup":
                return _between(self.start, self.end, _progress(into + 1, self.steps))
            case "constant":
                return self.start
            case "linear":
                share = 1 - _progress(into + self.skipped, self.steps)
            case "cosine":
                share = 0.5 * (1 + math.cos(math.pi * _progress(into + self.skipped, self.steps)))
            case "decay":
                share = 1 - math.sqrt(_progress(into + self.skipped, self.steps))
            case "inverse_sqrt":
                return self.start * math.sqrt(self.timescale / (self.timescale + into))
            case "step":
                return self.start * float(self.gamma ** (into // self.step_size))
        return _between(self.end, self.start, share)

    @property
    def last(self) -> float:
        """The factor that the segment after this one goes on from."""
        return self.factor(self.steps)


@dataclass(frozen=True)
class Schedule:
    """Segments one after the other; the last one is asked for every step beyond."""

    segments: tuple[Segment, ...]
    total_steps: int


def factor(step: int, schedule: Schedule) -> float:
    """The factor of the base rate for optimiser step ``step``, counted from 0."""
    into = step
    for segment in schedule.segments[:-1]:
        if into < segment.steps:
            return segment.factor(into)
        into -= segment.steps
    return schedule.segments[-1].factor(into)


def preset(
    kind: ScheduleKind,
    total_steps: int,
    warmup_steps: int = 0,
    minimum: float = 0.0,
    *,
    timescale: int = 10_000,
    step_size: int = 1,
    gamma: float = 1.0,
    decay_ratio: float = 0.1,
) -> Schedule:
    """A schedule by its name: a linear warm-up to 1, and what follows, counted from its end.

    ``cosine`` and ``linear`` fall from 1 to ``minimum`` at the end of the run, ``wsd`` (warm-up,
    stable, decay) stays at 1 and falls over the last ``decay_ratio`` of all steps; ``constant``,
    ``inverse_sqrt`` and ``step`` are the segments of these names.
    """
    warmup = (Segment("warmup", warmup_steps, start=0.0),) if warmup_steps else ()
    left = total_steps - warmup_steps
    match kind:
        case "constant":
            rest: tuple[Segment, ...] = (Segment("constant", left),)
        case "cosine" | "linear":
            rest = (Segment(kind, left, end=minimum),)
        case "inverse_sqrt":
            rest = (Segment(kind, left, timescale=timescale),)
        case "step":
            rest = (Segment(kind, left, step_size=step_size, gamma=gamma),)
        case "wsd":
            decay_steps = max(1, round(decay_ratio * total_steps))
            stable = left - decay_steps
            rest = (Segment("decay", decay_steps, end=minimum, skipped=max(0, -stable)),)
            if stable > 0:
                rest = (Segment("constant", stable), *rest)
        case _:
            raise unknown_name("schedule", kind, PRESETS)
    return Schedule((*warmup, *rest), total_steps)


@dataclass(frozen=True)
class Part:
    """A segment as a recipe says it: ``length`` in steps (int), as a share of the run (float), to the end of
    a phase of its mixture, or the rest.

    ``start`` and ``end`` may be left out: a segment begins where the one before it ended (the first at
    1, a warm-up at 0), a warm-up ends at 1, ``linear``, ``cosine`` and ``decay`` at 0.
    """

    shape: Shape
    length: int | float | Literal["phase", "rest"]
    start: float | None = None
    end: float | None = None
    timescale: int = 10_000
    step_size: int = 1
    gamma: float = 1.0


def compose(parts: Sequence[Part], total_steps: int, phase_ends: Sequence[int] = ()) -> Schedule:
    """A schedule of these parts that covers ``total_steps`` exactly.

    Ends of shares are rounded, not their lengths, so that shares that add up to 1 cover the run.
    ``phase_ends`` are the steps of the run after which its phases end. Whatever the phases, the rate goes on
    from where the segment before ended, unless a segment says where it starts.
    """
    segments: list[Segment] = []
    for part, steps in zip(parts, _lengths(parts, total_steps, phase_ends), strict=True):
        before = segments[-1].last if segments else None
        segments.append(_segment(part, steps, before))
    return Schedule(tuple(segments), total_steps)


def _segment(part: Part, steps: int, before: float | None) -> Segment:
    """The segment of a part that begins after the factor ``before`` (None: at the start of the run)."""
    usual_start = (0.0 if part.shape == "warmup" else 1.0) if before is None else before
    start = usual_start if part.start is None else part.start
    end = part.end
    if end is None:
        end = 1.0 if part.shape == "warmup" else start if part.shape == "constant" else 0.0
    return Segment(part.shape, steps, start, end, part.timescale, part.step_size, part.gamma)


def _lengths(parts: Sequence[Part], total_steps: int, phase_ends: Sequence[int]) -> list[int]:
    lengths: list[int] = []
    share = 0.0
    for part in parts:
        if part.length == REST:
            lengths.append(total_steps - sum(lengths))
        elif part.length == PHASE:
            done = sum(lengths)
            end = next((end for end in phase_ends if end > done), None)
            if end is None:
                raise PunaError(
                    "no phase ends behind the beginning of this segment",
                    where="schedule",
                    found=f"step {done:,}; phases end with {', '.join(map(str, phase_ends)) or 'no'} steps",
                )
            lengths.append(end - done)
        elif isinstance(part.length, float):
            begin, share = share, share + part.length
            lengths.append(round(share * total_steps) - round(begin * total_steps))
        else:
            lengths.append(int(part.length))
    if sum(lengths) != total_steps or min(lengths) < 0:
        raise PunaError(
            "the segments of the schedule do not cover the run",
            where="schedule",
            found=f"{sum(length for length in lengths if length > 0):,} steps",
            expected=f"{total_steps:,} steps",
            fix="change their lengths; let the last one be 'rest'",
        )
    return lengths


def _progress(done: int, steps: int) -> float:
    """Share of ``steps`` that is done, within 0 and 1."""
    return min(1.0, max(0.0, done / steps)) if steps > 0 else 1.0


def _between(low: float, high: float, share: float) -> float:
    return low + (high - low) * share
