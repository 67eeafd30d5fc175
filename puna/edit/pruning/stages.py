"""The stages of pruning: ``prune``, and ``prune_and_train``, which recovers in rounds while it shrinks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import pydantic

from puna.core.stage import Context, Cost, Input, Outcome, Parameters, stage
from puna.model.sizes import forward_operations
from puna.model.units import Kept, Kind, sliced_spec
from puna.train.plan import BYTES
from puna.train.stages import Train
from puna.train.train_plan import plan_train

if TYPE_CHECKING:
    from puna.edit.pruning.prune import PruneSettings
    from puna.model.spec import LlamaSpec


class Pruning(Parameters):
    """What is taken out of a model, and how it is chosen."""

    share: float = pydantic.Field(ge=0, lt=1)
    """Of the weights of all blocks, embedding and head left aside, the share that goes; 0 changes nothing."""
    units: tuple[Literal["head_group", "channel", "hidden", "block"], ...] = ("head_group", "channel")
    """What goes: key-value heads with their queries, feed-forward channels; hidden dimensions; or blocks."""
    scorer: Literal["taylor", "magnitude", "contribution", "cosine", "random"] = "taylor"
    """How much a unit matters; cosine is defined for blocks alone."""
    allocator: Literal["adaptive", "uniform"] = "adaptive"
    """Of head groups and channels: more goes of layers that matter less, or of all alike."""
    steps: int = pydantic.Field(50, ge=1)
    """Steps to the share; statistics and scores are worked out anew in each."""
    amplitude: float = pydantic.Field(0.02, ge=0)
    """adaptive: how far a step pulls the shares of layers apart."""
    importance: Literal["cosine", "euclidean", "manhattan"] = "cosine"
    """adaptive: how a layer's importance is measured, between its input and its output."""
    spared_first: int = pydantic.Field(0, ge=0)
    """So many of the first layers lose nothing; the others lose the more."""
    spared_last: int = pydantic.Field(0, ge=0)
    """The same of the last layers."""
    calibration_rows: int = pydantic.Field(512, ge=1)
    """Rows of calibration text, drawn by the seed."""
    calibration_length: int = pydantic.Field(64, ge=2)
    """Tokens of such a row."""
    calibration_batch_rows: int = pydantic.Field(64, ge=1)
    """Rows of a forward pass; memory grows with it."""

    def settings(self) -> PruneSettings:
        """The same for :func:`puna.edit.pruning.prune.prune`."""
        from puna.edit.pruning.prune import PruneSettings

        return PruneSettings(
            self.share,
            tuple(self.units),
            self.scorer,
            self.allocator,
            self.steps,
            self.amplitude,
            self.importance,
            self.spared_first,
            self.spared_last,
        )

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Pruning:
        apart = {"hidden", "block"} & set(self.units)
        if not self.units or (apart and len(self.units) > 1):
            raise ValueError("units are head_group, channel or both; or hidden; or block")
        if self.scorer == "cosine" and self.units != ("block",):
            raise ValueError("scorer 'cosine' is defined for blocks alone: take units [block]")
        if "hidden" in apart and (self.spared_first or self.spared_last):
            raise ValueError("hidden dimensions go through all layers: none of them can be spared")
        return self


class Prune(Pruning):
    """Parameters of the stage ``prune``."""

    save_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """What the smaller model is saved in."""


class PruneAndTrain(Parameters):
    """Parameters of the stage ``prune_and_train``."""

    prune: Pruning
    """What goes in all, and how; ``steps`` are those of a round."""
    train: Train
    """The training that goes on through all rounds: one schedule, one stream of text, in full."""
    rounds: int = pydantic.Field(10, ge=1)
    """Rounds of pruning and training; one prunes all at once and trains then."""

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> PruneAndTrain:
        train = self.train
        if train.lora is not None or train.sharding != "none" or train.stop_after or train.state_after:
            raise ValueError("train works on all weights here: no lora, sharding, stop_after or state_after")
        if train.children is not None:
            raise ValueError("train.children are those of one size, which rounds of pruning change")
        return self


def _rough_spec(spec: LlamaSpec, pruning: Pruning) -> LlamaSpec:
    """About the spec that pruning leaves: as if every layer lost the same."""
    from puna.edit.pruning.allocate import removals

    everything = Kept.everything(spec)
    if pruning.units == ("hidden",):
        left = max(1, round(spec.hidden_size * (1 - pruning.share)))
        return sliced_spec(
            spec, Kept(everything.head_groups, everything.channels, tuple(range(left)), everything.blocks)
        )
    if pruning.units == ("block",):
        left = max(1, round(len(spec.blocks) * (1 - pruning.share)))
        return spec.replace(blocks=spec.blocks[:left])
    kinds: list[Kind] = list(pruning.units)
    gone = removals(spec, kinds, [pruning.share] * len(spec.blocks), {})
    kept = Kept(
        tuple(
            numbers[: len(numbers) - gone.get(("head_group", layer), 0)]
            for layer, numbers in enumerate(everything.head_groups)
        ),
        tuple(
            numbers[: len(numbers) - gone.get(("channel", layer), 0)]
            for layer, numbers in enumerate(everything.channels)
        ),
        everything.hidden,
        everything.blocks,
    )
    return sliced_spec(spec, kept)


def _calibration_operations(spec: LlamaSpec, pruning: Pruning) -> tuple[float, float]:
    """Tokens that all steps read, and the operations of that; Taylor takes a backward pass too."""
    looks = pruning.scorer not in ("magnitude", "random") or pruning.allocator == "adaptive"
    tokens = float(pruning.steps * pruning.calibration_rows * pruning.calibration_length * looks)
    passes = 3 if pruning.scorer == "taylor" else 1
    return tokens, tokens * passes * forward_operations(spec, pruning.calibration_length)


def _plan_prune(parameters: Prune, shapes: Any) -> Cost:
    """Every step reads the calibration text; weights, their gradients in float32 and products are held."""
    spec = shapes.spec
    if spec is None:
        return Cost()
    tokens, flops = _calibration_operations(spec, parameters)
    weights = spec.parameter_count()
    small = _rough_spec(spec, parameters)
    seconds = shapes.device.seconds(flops, shapes.dtype)
    seconds += shapes.device.read_seconds(small.parameter_count() * BYTES[parameters.save_dtype])
    memory = weights * (BYTES[shapes.dtype] + (8 if parameters.scorer == "taylor" else 0))
    return Cost(tokens=tokens, flops=flops, memory=float(memory), seconds=seconds, spec=small)


@stage(
    "prune",
    parameters=Prune,
    inputs={"model": Input("model"), "corpus": Input("corpus")},
    outputs={"model": "model"},
    plan=_plan_prune,
)
def prune(context: Context, parameters: Prune) -> Outcome:
    """Take the units that matter least out of a model; layers may end up with different widths (S27).

    The corpus holds documents, of which calibration text is drawn. Time is steps times calibration tokens,
    forward and backward; memory holds weights and float32 gradients.
    """
    from puna.edit.pruning.job import run_prune

    return run_prune(context, parameters)


def _plan_rounds(parameters: PruneAndTrain, shapes: Any) -> Cost:
    """As training the model that is left, plus calibration in every round."""
    cost = plan_train(parameters.train, shapes)
    if shapes.spec is None:
        return cost
    _, flops = _calibration_operations(shapes.spec, parameters.prune)
    flops *= parameters.rounds
    return Cost(
        tokens=cost.tokens,
        trainable=cost.trainable,
        flops=cost.flops + flops,
        memory=cost.memory,
        seconds=cost.seconds + shapes.device.seconds(flops, parameters.train.dtype or shapes.dtype),
        spec=_rough_spec(shapes.spec, parameters.prune),
    )


@stage(
    "prune_and_train",
    parameters=PruneAndTrain,
    inputs={
        "model": Input("model"),
        "corpus": Input("corpus", many=True),
        "calibration": Input("corpus"),
        "held_out": Input("corpus", many=True, optional=True),
        "teacher": Input("model", optional=True),
    },
    outputs={"model": "model"},
    plan=_plan_rounds,
    resumes="rounds",
)
def prune_and_train(context: Context, parameters: PruneAndTrain) -> Outcome:
    """Shrink a model in rounds and train it between them, on one schedule and one stream of text (S27).

    Time is that of training and of calibration in every round; memory that of training in full.
    """
    from puna.edit.pruning.job import run_rounds

    return run_rounds(context, parameters)
