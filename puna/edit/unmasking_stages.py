"""The stage ``unmasking``: every pattern of masks trained and compared; no torch here."""

from __future__ import annotations

import dataclasses
from typing import Any

import pydantic

from puna.core.stage import Context, Cost, Input, Outcome, Parameters, stage
from puna.model.unmasking import all_patterns
from puna.train.labelling_stages import LabelTraining, Pattern, training_cost


class Unmasking(Parameters):
    """Parameters of the stage ``unmasking``."""

    groups: int = pydantic.Field(4, ge=1, le=8)
    """Groups of layers, each with its mask or without: 2 to the power of it patterns."""
    patterns: tuple[Pattern, ...] = ()
    """Some patterns only, such as ["0000", "0011"]; empty: all."""
    validation_rows: int = pydantic.Field(200, ge=1)
    """Rows taken out of the corpus, by which a pattern is chosen."""
    train: LabelTraining = LabelTraining()
    """How each of them is trained."""

    @pydantic.model_validator(mode="after")
    def _of_one_length(self) -> Unmasking:
        if any(len(pattern) != self.groups for pattern in self.patterns):
            raise ValueError(f"patterns have a digit for each of {self.groups} groups")
        return self

    def all_patterns(self) -> list[str]:
        """The patterns that are trained, in order."""
        return list(self.patterns) or all_patterns(self.groups)


def _plan(parameters: Unmasking, shapes: Any) -> Cost:
    """As many trainings as there are patterns; each also reads the validation rows and the test corpus."""
    times = len(parameters.all_patterns())
    cost = training_cost(parameters.train, shapes, times)
    if shapes.spec is None:
        return cost
    read = 2.0 * shapes.spec.parameter_count() * shapes.tokens_of("test")
    return dataclasses.replace(cost, flops=cost.flops + times * read, spec=None)


@stage(
    "unmasking",
    parameters=Unmasking,
    inputs={"model": Input("model"), "corpus": Input("corpus"), "test": Input("corpus")},
    plan=_plan,
    resumes="patterns",
)
def unmasking(context: Context, parameters: Unmasking) -> Outcome:
    """Train a labeller for every pattern of causal and unmasked groups of layers, and choose one (S75).

    The choice is made on validation rows; the table shows the test corpus beside them. Time is that of as
    many trainings as there are patterns, memory that of one.
    """
    from puna.edit.unmasking import run

    return run(context, parameters)
