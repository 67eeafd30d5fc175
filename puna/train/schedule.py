"""Learning-rate schedules: one pure function from the step to a factor of the base learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

ScheduleKind = Literal["constant", "cosine", "linear", "inverse_sqrt", "step", "wsd"]


@dataclass(frozen=True)
class Schedule:
    """A schedule over ``total_steps`` optimiser steps.

    ``warmup_steps`` rise linearly to 1; what follows is counted from the end of the warm-up. The
    end of a run is the moment after its last step, so the last step itself is still above it:

    * ``constant``: 1;
    * ``cosine``: half a cosine from 1 down to ``minimum`` at the end (Loshchilov and Hutter 2017);
    * ``linear``: a straight line from 1 down to ``minimum`` at the end;
    * ``inverse_sqrt``: ``sqrt(t / (t + n))`` with ``t = timescale`` (Vaswani et al. 2017, where the
      timescale is the warm-up);
    * ``step``: times ``gamma`` every ``step_size`` steps (torch's ``StepLR``);
    * ``wsd``: 1, then ``1 - sqrt`` down to ``minimum`` over the last ``decay_ratio`` of all steps
      (warm-up, stable, decay; Haegele et al. 2024).
    """

    kind: ScheduleKind
    total_steps: int
    warmup_steps: int = 0
    minimum: float = 0.0
    timescale: int = 10_000
    step_size: int = 1
    gamma: float = 1.0
    decay_ratio: float = 0.1


def factor(step: int, schedule: Schedule) -> float:
    """The factor for optimiser step ``step``, counted from 0; the first step never has factor 0."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    after = step - schedule.warmup_steps
    match schedule.kind:
        case "constant":
            return 1.0
        case "cosine":
            progress = _progress(after, schedule.total_steps - schedule.warmup_steps)
            return _between(schedule.minimum, 0.5 * (1 + math.cos(math.pi * progress)))
        case "linear":
            progress = _progress(after, schedule.total_steps - schedule.warmup_steps)
            return _between(schedule.minimum, 1 - progress)
        case "inverse_sqrt":
            return math.sqrt(schedule.timescale / (schedule.timescale + after))
        case "step":
            return float(schedule.gamma ** (after // schedule.step_size))
        case "wsd":
            decay_steps = max(1, round(schedule.decay_ratio * schedule.total_steps))
            progress = _progress(step - (schedule.total_steps - decay_steps), decay_steps)
            return _between(schedule.minimum, 1 - math.sqrt(progress))


def _progress(done: int, steps: int) -> float:
    """Share of ``steps`` that is done, within 0 and 1."""
    return min(1.0, max(0.0, done / steps)) if steps > 0 else 1.0


def _between(minimum: float, share: float) -> float:
    return minimum + (1 - minimum) * share
