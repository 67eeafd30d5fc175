"""The stages of this room: ``shorten`` (a model of some of its blocks), and those that modules below hold."""

from __future__ import annotations

from typing import Any, Literal

import pydantic

from puna.core.stage import Context, Cost, Input, Outcome, Parameters, stage
from puna.edit import new_stages, unmasking_stages  # noqa: F401  these and the next register their stages
from puna.edit.growing import augment_stages, expand_stages  # noqa: F401
from puna.edit.merging import residual_stages  # noqa: F401
from puna.edit.merging import stages as merge_stages  # noqa: F401
from puna.edit.pruning import mask_stages, recover_stages  # noqa: F401
from puna.edit.pruning import stages as pruning_stages  # noqa: F401
from puna.edit.quantize import stages as quantize_stages  # noqa: F401
from puna.edit.searching import stages as search_stages  # noqa: F401
from puna.edit.sub_blocks import stages as sub_block_stages  # noqa: F401
from puna.train.plan import BYTES


class Shorten(Parameters):
    """Parameters of the stage ``shorten``."""

    blocks: tuple[int, ...] = pydantic.Field(min_length=1)
    """The blocks that are kept, counted from 0, in the model's order."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """What the weights are saved in."""


def _plan(parameters: Shorten, shapes: Any) -> Cost:
    """The weights are read and held once, in float32, and those that are kept are written."""
    spec = shapes.spec
    if spec is None:
        return Cost()
    blocks = tuple(spec.blocks[block] for block in parameters.blocks if 0 <= block < len(spec.blocks))
    short = spec.replace(blocks=blocks) if blocks else spec
    held, written = 4 * spec.parameter_count(), short.parameter_count() * BYTES[parameters.save_dtype]
    return Cost(memory=held + written, seconds=shapes.device.read_seconds(held + written), spec=short)


@stage(
    "shorten", parameters=Shorten, inputs={"model": Input("model")}, outputs={"model": "model"}, plan=_plan
)
def shorten(context: Context, parameters: Shorten) -> Outcome:
    """Keep some blocks of a model and leave the others out: the raw form of a small sibling.

    Time and memory grow linearly with the number of weights.
    """
    from puna.edit.shorten import shorten as keep
    from puna.text import pretrained

    model = pretrained.load_plain(context.inputs["model"], dtype="float32")
    short = keep(model, parameters.blocks).to(pretrained.DTYPES[parameters.save_dtype])
    written = pretrained.save(short, context.out / "model")
    count, before = short.spec.parameter_count(), model.spec.parameter_count()
    figures = {"parameters": float(count), "blocks": len(short.spec.blocks), "share": count / before}
    return Outcome({"model": written}, figures)
