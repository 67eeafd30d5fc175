"""The stage ``learn_masks``: which units stay is learnt together with a LoRA, and the rest is cut (S62)."""

from __future__ import annotations

import math
from typing import Any, Literal

import pydantic

from puna.core.stage import Context, Cost, Input, Outcome, Parameters, stage
from puna.model.units import Kept, sliced_spec
from puna.train.stages import Train
from puna.train.train_plan import plan_train


class LearnMasks(Parameters):
    """Parameters of the stage ``learn_masks``."""

    share: float = pydantic.Field(gt=0, lt=1)
    """Of the weights of the blocks' matrices, the share that is to be gone in the end."""
    units: tuple[Literal["hidden", "head_group", "channel"], ...] = pydantic.Field(
        ("hidden", "head_group", "channel"), min_length=1
    )
    """What has gates; hidden dimensions have one each through the whole model."""
    ramp: float = pydantic.Field(0.5, ge=0, le=1)
    """Share of the steps in which the target rises from nothing to ``share``."""
    mask_learning_rate: float = pydantic.Field(0.1, gt=0)
    """Of the gates; it does not move."""
    multiplier_learning_rate: float = pydantic.Field(0.1, gt=0)
    """Of the multipliers that hold them to the size."""
    quadratic_start: float = pydantic.Field(0.0, ge=0)
    """Where the multiplier of the squared distance from the target begins; with few steps from 0 it comes too
    late, and the size swings about the target."""
    drop_rate: float = pydantic.Field(0.01, gt=0, lt=1)
    """How likely a channel is masked in the first step."""
    train: Train
    """The training of the adapter, a LoRA, under the masks; ``save_dtype`` is that of the small model."""

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> LearnMasks:
        train = self.train
        if len(set(self.units)) < len(self.units):
            raise ValueError("units name each kind once")
        if train.lora is None:
            raise ValueError(
                "train learns a LoRA here: give it lora, such as {r: 8, target: [q_proj, v_proj]}"
            )
        if train.lora.base != "as_is":
            raise ValueError("gates need plain weights: lora.base as_is")
        if train.objective not in ("clm", "sft", "distill", "distill_sft"):
            raise ValueError("masks are learnt with clm, sft, distill or distill_sft")
        if train.sharding != "none" or train.stop_after or train.state_after or train.recompute:
            raise ValueError(
                "train goes in one piece here: no sharding, stop_after, state_after or recompute"
            )
        return self


def _rough_spec(spec: Any, parameters: LearnMasks) -> Any:
    """About the spec that is left: as if every kind of unit lost as much."""
    left, everything = 1 - parameters.share, Kept.everything(spec)
    if "hidden" in parameters.units and len(parameters.units) > 1:
        left = math.sqrt(left)

    def first(kind: str, numbers: tuple[int, ...]) -> tuple[int, ...]:
        if kind not in parameters.units or not numbers:
            return numbers
        return numbers[: max(1, round(left * len(numbers)))]

    kept = Kept(
        tuple(first("head_group", numbers) for numbers in everything.head_groups),
        tuple(first("channel", numbers) for numbers in everything.channels),
        first("hidden", everything.hidden),
        everything.blocks,
    )
    return sliced_spec(spec, kept)


def _plan(parameters: LearnMasks, shapes: Any) -> Cost:
    """As training the LoRA of the whole model; gates weigh nothing beside it."""
    cost = plan_train(parameters.train, shapes)
    if shapes.spec is None:
        return cost
    return Cost(
        tokens=cost.tokens,
        trainable=cost.trainable,
        flops=cost.flops,
        memory=max(cost.memory, 8.0 * shapes.spec.parameter_count()),
        seconds=cost.seconds,
        spec=_rough_spec(shapes.spec, parameters),
    )


@stage(
    "learn_masks",
    parameters=LearnMasks,
    inputs={
        "model": Input("model"),
        "corpus": Input("corpus", many=True),
        "held_out": Input("corpus", many=True, optional=True),
        "teacher": Input("model", optional=True),
    },
    outputs={"model": "model"},
    plan=_plan,
    resumes="checkpoints",
)
def learn_masks(context: Context, parameters: LearnMasks) -> Outcome:
    """Learn which units stay, down to a size, together with a LoRA; then merge, fold and slice (S62).

    Time is that of training the LoRA of the whole model; memory that, or two float32 copies of the model.
    """
    from puna.edit.pruning.mask_job import run_learn_masks

    return run_learn_masks(context, parameters)
