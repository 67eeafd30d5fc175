"""The stages of LoRAM (S23): ``sparsegpt``, which prunes without making smaller, and ``recover_adapter``."""

from __future__ import annotations

from typing import Any, Literal

import pydantic

from puna.core.stage import Context, Cost, Input, Outcome, Parameters, stage
from puna.model.sizes import forward_operations
from puna.train.plan import BYTES


class SparseGpt(Parameters):
    """Parameters of the stage ``sparsegpt``."""

    pattern: str = "unstructured"
    """unstructured takes the cheapest weights wherever they stand; n:m keeps n of each m inputs of a row."""
    share: float | None = pydantic.Field(None, ge=0, lt=1)
    """unstructured: the share of the projections' weights that goes; 0 changes nothing."""
    calibration_rows: int = pydantic.Field(32, ge=1)
    """Rows of calibration text, drawn by the run's seed."""
    calibration_length: int = pydantic.Field(256, ge=2)
    """Tokens of each of these rows."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """What the pruned model is saved in; its zeros stay zeros."""


def _plan_sparsegpt(parameters: SparseGpt, shapes: Any) -> Cost:
    """Two passes over the text, and for each weight an update of all later inputs of its matrix."""
    spec = shapes.spec
    if spec is None:
        return Cost()
    tokens = float(parameters.calibration_rows * parameters.calibration_length)
    passes = 2 * tokens * forward_operations(spec, parameters.calibration_length)
    solved = sum(block.parameter_count(spec.hidden_size, "none", False) for block in spec.blocks)
    updates = 2.0 * solved * spec.hidden_size
    seconds = shapes.device.seconds(passes, shapes.dtype) + shapes.device.seconds(updates, "float32")
    return Cost(
        tokens=tokens, flops=passes + updates, memory=float(4 * spec.parameter_count()), seconds=seconds
    )


@stage(
    "sparsegpt",
    parameters=SparseGpt,
    inputs={"model": Input("model"), "corpus": Input("corpus")},
    outputs={"model": "model"},
    plan=_plan_sparsegpt,
)
def sparsegpt(context: Context, parameters: SparseGpt) -> Outcome:
    """Set weights to zero by SparseGPT, in a pattern or wherever they matter least; shapes stay (S23).

    Time grows with the calibration text and with the weights times their inputs; memory holds float32 weights
    and the moments of one block.
    """
    from puna.edit.pruning.recover_job import run_sparsegpt

    return run_sparsegpt(context, parameters)


class RecoverAdapter(Parameters):
    """Parameters of the stage ``recover_adapter``."""

    eval_tokens: int = pydantic.Field(20_000, ge=2)
    """Tokens of ``held_out`` at most that the whole model reads with each adapter."""
    max_length: int = pydantic.Field(1024, ge=2)
    """Tokens of a row of it."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """What the whole model with the adapter merged in is saved in."""


def _plan_recover(parameters: RecoverAdapter, shapes: Any) -> Cost:
    """The whole model, its weights as they were beside it, and a pass over the text for each adapter."""
    spec = shapes.models.get("base", shapes.spec)
    if spec is None:
        return Cost()
    tokens = min(float(parameters.eval_tokens), shapes.tokens_of("held_out"))
    flops = 2 * tokens * forward_operations(spec, parameters.max_length)
    weights = spec.parameter_count()
    seconds = shapes.device.seconds(flops, "float32")
    seconds += shapes.device.read_seconds(weights * (4 + BYTES[parameters.save_dtype]))
    return Cost(tokens=2 * tokens, flops=flops, memory=float(8 * weights), seconds=seconds, spec=spec)


@stage(
    "recover_adapter",
    parameters=RecoverAdapter,
    inputs={
        "base": Input("model"),
        "adapter": Input("model"),
        "pruned": Input("model", optional=True),
        "held_out": Input("corpus", optional=True),
    },
    outputs={"adapter": "model", "model": "model"},
    plan=_plan_recover,
)
def recover_adapter(context: Context, parameters: RecoverAdapter) -> Outcome:
    """Put a LoRA that was trained on a pruned copy of ``base`` into the whole model (LoRAM, S23).

    ``pruned`` is what the stage prune wrote, before any training; an adapter trained with keep_zeros needs
    none. Of several adapters that one is taken with which the whole model's loss on ``held_out`` is lowest.
    Time is a pass over that text for each of them; memory holds the whole model twice in float32.
    """
    from puna.edit.pruning.recover_job import run_recover

    return run_recover(context, parameters)
