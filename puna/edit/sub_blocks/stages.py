"""The stages of searching for a child among a parent's sub-blocks (S31): ``sub_blocks``, ``replace_one``,
``block_costs``, ``choose_child``, ``assemble_child``, ``parent_divergence``, ``model_speed``.
"""

from __future__ import annotations

from typing import Any, Literal

import pydantic

from puna.core.stage import Context, Cost, Input, Outcome, Parameters, stage
from puna.model.sizes import forward_operations
from puna.train.plan import BYTES

_ROUND_SECONDS = 0.02  # of timing one shape once, both of its steps


class Text(Parameters):
    """Rows of text that a stage reads, drawn by the seed."""

    rows: int = pydantic.Field(16, ge=1)
    """Rows of text."""
    length: int = pydantic.Field(256, ge=2)
    """Tokens of a row."""
    batch_rows: int = pydantic.Field(4, ge=1)
    """Rows of a forward pass; memory grows with it."""


class SubBlocks(Parameters):
    """Parameters of the stage ``sub_blocks``."""

    kv_heads: tuple[int, ...] = ()
    """Counts of key-value heads that attention may have, each a proper divisor of the parent's."""
    widths: tuple[float, ...] = (0.75, 0.5, 0.25)
    """Shares of the channels that a feed-forward may keep, those that contribute most."""
    linear: bool = True
    """Whether a half may become one matrix."""
    none: bool = True
    """Whether a half may be left out."""
    tokens: int = pydantic.Field(16_384, ge=0)
    """Tokens that every variant learns from; 0 leaves the initial weights."""
    length: int = pydantic.Field(256, ge=2)
    """Tokens of a row."""
    batch_rows: int = pydantic.Field(4, ge=1)
    """Rows of a step."""
    learning_rate: float = pydantic.Field(1e-3, gt=0)
    """Peak of a warm-up and a cosine behind it, with AdamW."""
    warmup_ratio: float = pydantic.Field(0.05, ge=0, lt=1)
    """Share of the steps in which the rate rises."""
    max_grad_norm: float = pydantic.Field(1.0, ge=0)
    """Gradients of each variant are clipped to this norm; 0 does not clip."""
    calibration_rows: int = pydantic.Field(16, ge=1)
    """Rows of text that contributions of channels are measured on."""
    layers_at_once: int | None = pydantic.Field(None, ge=1)
    """Layers whose variants learn in one pass over the text; null: all. Fewer take less memory and more
    passes, and change no bit."""

    @pydantic.field_validator("widths")
    @classmethod
    def _shares(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 < share < 1 for share in value):
            raise ValueError("widths are shares between 0 and 1")
        return value


def _plan_sub_blocks(parameters: SubBlocks, shapes: Any) -> Cost:
    """Every variant costs about three passes of its half, and attention's run through the feed-forward."""
    spec = shapes.spec
    if spec is None:
        return Cost(tokens=float(parameters.tokens))
    variants = len(parameters.kv_heads) + len(parameters.widths) + 2 * parameters.linear
    flops = parameters.tokens * 2 * variants * forward_operations(spec, parameters.length)
    weights = sum(
        block.parameter_count(spec.hidden_size, spec.attention_bias, spec.mlp_bias) for block in spec.blocks
    )
    at_once = min(1.0, (parameters.layers_at_once or len(spec.blocks)) / len(spec.blocks))
    memory = 4 * spec.parameter_count() + 16 * weights * variants / 2 * at_once
    return Cost(
        tokens=float(parameters.tokens),
        flops=float(flops),
        memory=float(memory),
        seconds=shapes.device.seconds(flops, shapes.dtype),
    )


@stage(
    "sub_blocks",
    parameters=SubBlocks,
    inputs={"model": Input("model"), "corpus": Input("corpus")},
    outputs={"library": "file"},
    plan=_plan_sub_blocks,
    resumes="sub_blocks",
)
def sub_blocks(context: Context, parameters: SubBlocks) -> Outcome:
    """Train a library of cheaper halves for every layer, each to do what the parent's half does there (S31).

    Time is tokens times variants; layers that were finished before a kill are not trained again.
    """
    from puna.edit.sub_blocks.jobs import run_sub_blocks

    return run_sub_blocks(context, parameters)


class ReplaceOne(Text):
    """Parameters of the stage ``replace_one``."""

    random_children: int = pydantic.Field(0, ge=0)
    """Random children whose own divergence is compared with the sum of their halves' scores."""

    @pydantic.field_validator("random_children")
    @classmethod
    def _enough(cls, value: int) -> int:
        if value in (1, 2):
            raise ValueError("a correlation needs at least 3 children")
        return value


def _plan_replace_one(parameters: ReplaceOne, shapes: Any) -> Cost:
    """About ten variants a layer, each through half of the layers."""
    spec = shapes.spec
    tokens = float(parameters.rows * parameters.length)
    if spec is None:
        return Cost(tokens=tokens)
    passes = 5.0 * len(spec.blocks) + parameters.random_children
    flops = tokens * passes * forward_operations(spec, parameters.length)
    memory = spec.parameter_count() * 4.0 + 2 * tokens * spec.hidden_size * BYTES[shapes.dtype]
    return Cost(tokens=tokens, flops=flops, memory=memory, seconds=shapes.device.seconds(flops, shapes.dtype))


@stage(
    "replace_one",
    parameters=ReplaceOne,
    inputs={"model": Input("model"), "library": Input("file"), "corpus": Input("corpus")},
    outputs={"scores": "file"},
    plan=_plan_replace_one,
    resumes="scoring",
)
def replace_one(context: Context, parameters: ReplaceOne) -> Outcome:
    """Score every variant of a library: mean KL from the parent to the parent with this one half exchanged
    (S31).

    Time is tokens times variants times the layers behind them.
    """
    from puna.edit.sub_blocks.jobs import run_replace_one

    return run_replace_one(context, parameters)


class BlockCosts(Parameters):
    """Parameters of the stage ``block_costs``."""

    measure: Literal["timed", "operations"] = "timed"
    """timed takes seconds on this machine, of the engine's kernels; operations counts."""
    batches: tuple[pydantic.PositiveInt, ...] = pydantic.Field((1,), min_length=1)
    """Numbers of texts that are served at once; each has costs of its own."""
    prompt: int = pydantic.Field(128, ge=1)
    """Tokens of a prompt."""
    answer: int = pydantic.Field(128, ge=1)
    """Tokens of an answer."""
    repeats: int = pydantic.Field(15, ge=2)
    """Rounds; the median counts."""
    most_spread: float = pydantic.Field(0.25, gt=0)
    """Distance of the quartiles over the median from which on a time is not trusted and operations stand in.
    """
    quantize: Literal["int8", "int4"] | None = None
    """What the engine lays the weights out in."""


def _plan_block_costs(parameters: BlockCosts, shapes: Any) -> Cost:
    """Rounds of all shapes, about ten."""
    timed = parameters.measure == "timed"
    seconds = 10 * _ROUND_SECONDS * parameters.repeats * sum(parameters.batches) * timed
    spec = shapes.spec
    return Cost(memory=4.0 * spec.parameter_count() * 3 if spec else 0.0, seconds=seconds)


@stage(
    "block_costs",
    parameters=BlockCosts,
    inputs={"model": Input("model"), "library": Input("file")},
    outputs={"costs": "file"},
    plan=_plan_block_costs,
)
def block_costs(context: Context, parameters: BlockCosts) -> Outcome:
    """Measure what each variant of a library costs to serve: seconds of prefill and decoding, weights, keys
    (S31).

    Time is rounds times shapes; a machine that does other things gives times that are not trusted.
    """
    from puna.edit.sub_blocks.jobs import run_block_costs

    return run_block_costs(context, parameters)


class ChooseChild(Parameters):
    """Parameters of the stage ``choose_child``."""

    runtime: float | None = pydantic.Field(None, gt=0, le=1)
    """Share of the parent's time for the job that the child may take."""
    latency: float | None = pydantic.Field(None, gt=0)
    """Seconds of the job at most."""
    throughput: float | None = pydantic.Field(None, gt=0)
    """Tokens a second at least, of prompts and answers."""
    memory: float | None = pydantic.Field(None, gt=0)
    """Bytes at most, of weights in bfloat16 and of the keys and values of all texts."""
    parameters: float | None = pydantic.Field(None, gt=0, le=1)
    """Share of the parent's weights at most."""
    method: Literal["programme", "greedy", "most_parameters", "no_op_only", "uniform"] = "programme"
    """programme is the exact optimum; the others are what it is compared with. uniform keeps the same share
    of every layer's channels, untrained."""
    solutions: int = pydantic.Field(1, ge=1)
    """programme: so many children, best first."""
    diversity: float = pydantic.Field(0.8, ge=0, le=1)
    """programme: the share of its halves that a further child may have in common with each one before."""
    check_problems: int = pydantic.Field(0, ge=0)
    """Small problems out of this one on which the programme is compared with every combination and with
    greed."""

    def limits(self) -> dict[str, float | None]:
        """What a child may take, by the names of :class:`puna.edit.sub_blocks.choosing.Limits`."""
        return {
            "runtime": self.runtime,
            "latency": self.latency,
            "throughput": self.throughput,
            "memory": self.memory,
            "parameters": self.parameters,
        }

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> ChooseChild:
        if all(limit is None for limit in self.limits().values()):
            raise ValueError(f"a child needs a limit: one of {', '.join(self.limits())}")
        if self.method != "programme" and self.solutions > 1:
            raise ValueError(f"solutions means nothing with method {self.method!r}, but with 'programme'")
        return self


@stage(
    "choose_child",
    parameters=ChooseChild,
    inputs={"library": Input("file"), "scores": Input("file"), "costs": Input("file")},
    outputs={"choice": "file"},
    plan=lambda _parameters, _shapes: Cost(seconds=2.0),
)
def choose_child(context: Context, parameters: ChooseChild) -> Outcome:
    """Choose a variant for every half so that the sum of scores is least within the limits (S31).

    An integer programme; seconds for thousands of variants.
    """
    from puna.edit.sub_blocks.jobs import run_choose_child

    return run_choose_child(context, parameters)


class AssembleChild(Parameters):
    """Parameters of the stage ``assemble_child``."""

    solution: int = pydantic.Field(0, ge=0)
    """Which of the solutions, the best being 0."""
    trained: bool = True
    """Take the library's weights; otherwise those that variants start with."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the child is saved in."""


def _plan_assemble(parameters: AssembleChild, shapes: Any) -> Cost:
    """The parent is read, and at most as much written."""
    spec = shapes.spec
    weights = float(spec.parameter_count()) if spec else 0.0
    written = weights * BYTES[parameters.save_dtype]
    return Cost(memory=8 * weights, seconds=shapes.device.read_seconds(4 * weights + written), spec=spec)


@stage(
    "assemble_child",
    parameters=AssembleChild,
    inputs={"model": Input("model"), "library": Input("file"), "choice": Input("file")},
    outputs={"model": "model"},
    plan=_plan_assemble,
)
def assemble_child(context: Context, parameters: AssembleChild) -> Outcome:
    """Put a chosen child together out of the parent and the library (S31).

    Time and memory grow with the number of weights.
    """
    from puna.edit.sub_blocks.jobs import run_assemble_child

    return run_assemble_child(context, parameters)


class ParentDivergence(Text):
    """Parameters of the stage ``parent_divergence``."""


def _plan_divergence(parameters: ParentDivergence, shapes: Any) -> Cost:
    """A forward pass of every model."""
    tokens = float(parameters.rows * parameters.length)
    specs = list(shapes.models.values())
    flops = tokens * sum(forward_operations(spec, parameters.length) for spec in specs)
    memory = 2.0 * max((spec.parameter_count() for spec in specs), default=0) * BYTES[shapes.dtype]
    return Cost(tokens=tokens, flops=flops, memory=memory, seconds=shapes.device.seconds(flops, shapes.dtype))


@stage(
    "parent_divergence",
    parameters=ParentDivergence,
    inputs={"model": Input("model"), "models": Input("model", many=True), "corpus": Input("corpus")},
    plan=_plan_divergence,
)
def parent_divergence(context: Context, parameters: ParentDivergence) -> Outcome:
    """Say how far models are from one parent: mean KL(parent || model) of a token.

    Time is a forward pass of every model over the rows.
    """
    from puna.edit.sub_blocks.jobs import run_parent_divergence

    return run_parent_divergence(context, parameters)


class ModelSpeed(Parameters):
    """Parameters of the stage ``model_speed``."""

    batch: int = pydantic.Field(1, ge=1)
    """Texts that are served at once."""
    prompt: int = pydantic.Field(128, ge=1)
    """Tokens of each one's prompt."""
    answer: int = pydantic.Field(128, ge=1)
    """Tokens of each one's answer."""
    repeats: int = pydantic.Field(15, ge=2)
    """Rounds of all models in turn; medians count."""
    quantize: Literal["int8", "int4"] | None = None
    """What the engine lays the weights out in."""


def _plan_speed(parameters: ModelSpeed, shapes: Any) -> Cost:
    """Rounds of a prefill and a step of every model."""
    weights = [float(spec.parameter_count()) for spec in shapes.models.values()]
    operations = 2 * sum(weights) * (parameters.prompt + parameters.batch) * parameters.repeats
    return Cost(
        memory=sum(weights) * 2 * BYTES[shapes.dtype],
        seconds=shapes.device.seconds(operations, shapes.dtype),
    )


@stage(
    "model_speed",
    parameters=ModelSpeed,
    inputs={"models": Input("model", many=True)},
    plan=_plan_speed,
)
def model_speed(context: Context, parameters: ModelSpeed) -> Outcome:
    """Time models in turn in the engine: seconds of a job, prefill and decoding, and shares of the first
    one's.

    Time is rounds times models.
    """
    from puna.edit.sub_blocks.jobs import run_model_speed

    return run_model_speed(context, parameters)
