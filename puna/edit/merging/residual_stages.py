"""The stages ``instruction_residual`` and ``residual_checks``."""

from __future__ import annotations

from typing import Any, Literal

import pydantic

from puna.core.stage import Context, Cost, Input, Outcome, Parameters, stage

_MODELS = {"base": Input("model"), "instruct": Input("model")}


class InstructionResidual(Parameters):
    """Parameters of the stage ``instruction_residual``."""

    scale: float = 1.0
    """How much of the residual is added; 0 leaves the continued base as it is."""
    least_likeness: float = pydantic.Field(0.5, ge=-1, le=1)
    """The cosine between the matrices of base and continued base below which they are strangers."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the new model's weights are written in."""


def _plan(parameters: InstructionResidual, shapes: Any) -> Cost:
    """Three models are read and one is written, in parts."""
    if shapes.spec is None:
        return Cost()
    size = 4.0 * shapes.spec.parameter_count()
    return Cost(memory=1e8, seconds=shapes.device.read_seconds(4 * size), spec=shapes.spec)


@stage(
    "instruction_residual",
    parameters=InstructionResidual,
    inputs={**_MODELS, "continued": Input("model")},
    outputs={"model": "model"},
    plan=_plan,
)
def instruction_residual(context: Context, parameters: InstructionResidual) -> Outcome:
    """Put what instruction tuning changed of a base on a base that was trained on: no training (S40).

    Time grows linearly with the weights; memory holds some millions of them.
    """
    from puna.edit.merging.residual import Residual
    from puna.text.pretrained import DTYPES

    residual = Residual.open(*(context.inputs[name] for name in ("base", "instruct", "continued")))
    figures = residual.write(
        context.out / "model",
        scale=parameters.scale,
        dtype=DTYPES[parameters.save_dtype],
        least_likeness=parameters.least_likeness,
    )
    return Outcome({"model": context.out / "model"}, figures)


class ResidualChecks(Parameters):
    """Parameters of the stage ``residual_checks``: there are none."""


def _plan_checks(parameters: ResidualChecks, shapes: Any) -> Cost:
    """Two models in memory at a time, read some times over."""
    if shapes.spec is None:
        return Cost()
    size = 4.0 * shapes.spec.parameter_count()
    return Cost(memory=2 * size, seconds=shapes.device.read_seconds(9 * size))


@stage("residual_checks", parameters=ResidualChecks, inputs=_MODELS, plan=_plan_checks)
def residual_checks(context: Context, parameters: ResidualChecks) -> Outcome:
    """Check that base and residual are the instruct model again, in float32 and rounded to bfloat16 (S40).

    Time and memory grow linearly with the weights.
    """
    from puna.edit.merging.residual import Residual

    base, instruct = context.inputs["base"], context.inputs["instruct"]
    return Outcome({}, Residual.open(base, instruct, base).checks())
