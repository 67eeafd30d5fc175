"""The stage ``answer_checks``: what is learnt of conversations, and whether merging changes an adapter."""

from __future__ import annotations

from typing import Any

import pydantic

from puna.core.stage import Context, Cost, Input, Outcome, Parameters, stage


class AnswerChecks(Parameters):
    """Parameters of the stage ``answer_checks``."""

    conversations: int = pydantic.Field(1000, ge=1)
    """Conversations at most, from the beginning of the corpus."""
    max_length: int = pydantic.Field(1024, ge=2)
    """Tokens of a packed row, as in the training that is checked."""


def _plan(parameters: AnswerChecks, shapes: Any) -> Cost:
    """Two models are opened, one after the other."""
    spec = shapes.models.get("model")
    if spec is None:
        return Cost()
    memory = 4.0 * spec.parameter_count()
    return Cost(memory=memory, seconds=shapes.device.read_seconds(2 * memory))


@stage(
    "answer_checks",
    parameters=AnswerChecks,
    inputs={"model": Input("model"), "adapter": Input("model"), "corpus": Input("corpus")},
    plan=_plan,
)
def answer_checks(context: Context, parameters: AnswerChecks) -> Outcome:
    """Read the labels of conversations back as text; compare a merged model with its adapter (S73).

    Everything that is learnt has to be an answer of the assistant with its end, later turns included. Time
    grows linearly with the conversations and with the model.
    """
    from puna.train.answer_checks import run

    return run(context, parameters)
