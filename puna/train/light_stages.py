"""The stage ``adapter_checks``: what LLaMA-Adapter V2 (S09) promises of start, groups and export."""

from __future__ import annotations

from typing import Any

import pydantic

from puna.core.stage import Context, Cost, Input, Outcome, Parameters, stage
from puna.model.sizes import forward_operations
from puna.train.settings import LightAdapter


class AdapterChecks(Parameters):
    """Parameters of the stage ``adapter_checks``."""

    adapter: LightAdapter = LightAdapter()
    """What is added; the first layer needs a prompt, which is the captions' own."""
    rounds: int = pydantic.Field(2, ge=1)
    """Steps on a batch of each kind by turns: from the second on moments could move what is held."""
    tokens: int = pydantic.Field(64, ge=8)
    """Tokens of a batch, from the beginning of the corpus."""
    learning_rate: float = pydantic.Field(1e-2, gt=0)
    """Of these steps."""


def _plan(parameters: AdapterChecks, shapes: Any) -> Cost:
    """A few passes over a batch, forward and back."""
    spec = shapes.spec
    if spec is None:
        return Cost()
    tokens = float(parameters.tokens * 2 * parameters.rounds)
    flops = 3 * (tokens + 4 * parameters.tokens) * forward_operations(spec, parameters.tokens)
    return Cost(tokens=tokens, flops=flops, memory=8.0 * spec.parameter_count())


@stage(
    "adapter_checks",
    parameters=AdapterChecks,
    inputs={"model": Input("model"), "corpus": Input("corpus")},
    plan=_plan,
)
def adapter_checks(context: Context, parameters: AdapterChecks) -> Outcome:
    """Count what changes that must not: logits at the start, parameters of another group; and what export
    moves.

    In float32. Time is that of a few steps on one batch.
    """
    from puna.train.light_checks import run

    return run(context, parameters)
