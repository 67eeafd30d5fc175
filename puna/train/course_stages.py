"""The stage ``course``: what a training in phases comes to, before anything runs (S46).

Tokens of each phase and source, steps, and the learning rate at both ends of every phase, by the same
settings and the same functions that the stage ``train`` goes by.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pydantic

from puna.core.stage import Context, Cost, Outcome, Parameters, stage
from puna.train.schedule import compose, factor
from puna.train.settings import Mixture, ScheduleSegment, check_segments


class Course(Parameters):
    """Parameters of the stage ``course``: some of those of ``train``, with the same meaning."""

    mixture: Mixture
    """Phases by tokens, with the shares of their sources."""
    batch_tokens: int = pydantic.Field(8192, ge=2)
    """Tokens of an optimiser step."""
    learning_rate: float = pydantic.Field(2e-4, gt=0)
    """Peak learning rate."""
    schedule: tuple[ScheduleSegment, ...] = pydantic.Field(min_length=1)
    """Segments of the learning rate, such as [{warmup: 10}, {linear: phase, to: 0.7}, {linear: rest}]."""

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Course:
        if not self.mixture.phases or any(phase.tokens is None for phase in self.mixture.phases):
            raise ValueError("a course has phases, and says the tokens of each")
        check_segments(self.schedule, phases=True)
        return self


@stage("course", parameters=Course, inputs={}, outputs={}, plan=lambda parameters, shapes: Cost(tokens=0.0))
def course(context: Context, parameters: Course) -> Outcome:
    """Tell what the phases of a training come to: tokens by source, steps, the rate where they meet.

    Takes no time. ``jump.N`` is how far the rate of the first step of phase N lies from where the line of the
    phase before was going, relative to the peak: 0 goes on, anything else starts anew.
    """
    phases = parameters.mixture.phases
    steps = [math.ceil((phase.tokens or 0) / parameters.batch_tokens) for phase in phases]
    ends = list(itertools.accumulate(steps))
    schedule = compose([segment.part() for segment in parameters.schedule], ends[-1], ends)
    rates = [
        (factor(end - count, schedule), factor(end - 1, schedule))
        for end, count in zip(ends, steps, strict=True)
    ]
    figures: dict[str, float] = {"tokens": 0.0, "steps": float(ends[-1])}
    rows: list[list[Any]] = []
    for number, (phase, count, (first, last)) in enumerate(zip(phases, steps, rates, strict=True), start=1):
        tokens = float(phase.tokens or 0)
        total = sum(phase.weights.values())
        figures["tokens"] += tokens
        figures |= {f"tokens.{number}": tokens, f"steps.{number}": float(count)}
        figures |= {f"rate.first.{number}": first * parameters.learning_rate}
        figures |= {f"rate.last.{number}": last * parameters.learning_rate}
        figures |= {
            f"tokens.{number}.{name}": tokens * weight / total for name, weight in phase.weights.items()
        }
        if number > 1:
            before = ends[number - 2]
            going = 2 * factor(before - 1, schedule) - factor(before - 2, schedule)
            figures[f"jump.{number}"] = first - going
        shares = ", ".join(f"{name} {weight / total:.1%}" for name, weight in phase.weights.items())
        ends_of = [f"{factor_ * parameters.learning_rate:.3g}" for factor_ in (first, last)]
        rows.append([str(number), f"{tokens:,.0f}", f"{count:,}", shares, *ends_of])
    columns = ["phase", "tokens", "steps", "sources", "rate of the first step", "of the last"]
    context.report["tables"] = [{"title": "Phases", "columns": columns, "rows": rows}]
    return Outcome(metrics=figures)
