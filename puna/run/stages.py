"""The stage of this room: ``export`` (model -> a checkpoint in another format)."""

from __future__ import annotations

from typing import Any, Literal

from puna.core.stage import Context, Cost, Input, Outcome, Parameters, stage

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Export(Parameters):
    """Parameters of the stage ``export``."""

    format: Literal["hf", "gguf"] = "gguf"
    """gguf is one file for llama.cpp; hf a folder that transformers opens."""
    kind: Literal["f16", "q8_0", "packed"] = "f16"
    """How a GGUF file stores the large matrices."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the weights are read in; an hf folder is written in it."""


def _plan(parameters: Export, shapes: Any) -> Cost:
    """The weights are held once, and read and written once."""
    if shapes.spec is None:
        return Cost()
    size = shapes.spec.parameter_count() * _BYTES[parameters.dtype]
    return Cost(memory=size, seconds=2 * shapes.device.read_seconds(size))


@stage("export", parameters=Export, inputs={"model": Input("model")}, outputs={"model": "model"}, plan=_plan)
def export(context: Context, parameters: Export) -> Outcome:
    """Write a model as a GGUF file for llama.cpp, or as a Hugging Face folder.

    Time and memory grow linearly with the number of weights.
    """
    from puna.run.convert import convert

    target = context.out / "model"
    written, model = convert(
        context.inputs["model"],
        target,
        parameters.format,
        kind=parameters.kind,
        dtype=parameters.dtype,
        device=context.device,
    )
    return Outcome({"model": written}, {"parameters": float(model.spec.parameter_count())})
