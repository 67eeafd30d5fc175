"""The stages ``mup_start`` (a new model -> one that begins as muP says) and ``mup_check`` (S46)."""

from __future__ import annotations

from typing import Annotated, Any

import pydantic

from puna.core.stage import Context, Cost, Input, Outcome, Parameters, stage
from puna.model.mup import Mup
from puna.train.plan import BYTES

_TRAINED = 6.0  # operations of a step for each weight and token
_OPERATIONS_PER_SECOND = 30e9  # of a core, on matrices as small as these


class MupStart(Parameters):
    """Parameters of the stage ``mup_start``."""

    mup: Mup = Mup()
    """The constants, which ``train`` is told too."""


def _plan_start(parameters: MupStart, shapes: Any) -> Cost:
    """The weights are read, scaled and written."""
    if shapes.spec is None:
        return Cost()
    memory = float(BYTES["float32"] * shapes.spec.parameter_count())
    return Cost(memory=memory, seconds=shapes.device.read_seconds(2 * memory), spec=shapes.spec)


@stage(
    "mup_start",
    parameters=MupStart,
    inputs={"model": Input("model")},
    outputs={"model": "model"},
    plan=_plan_start,
)
def mup_start(context: Context, parameters: MupStart) -> Outcome:
    """Scale the weights of a new model to what they are at muP's start; it stays a plain Llama.

    Time and memory grow linearly with the number of weights.
    """
    from puna.model.mup import begin, parts
    from puna.text import pretrained

    model = pretrained.load_plain(context.inputs["model"], dtype="float32")
    begin(model, parameters.mup)
    written = pretrained.save(model, context.out / "model")
    changed = [part.start for part in parts(model.spec, parameters.mup).values()]
    return Outcome({"model": written}, {"scaled": float(sum(start != 1 for start in changed))})


class MupCheck(Parameters):
    """Parameters of the stage ``mup_check``."""

    mup: Mup = Mup(base_width=64)
    """The constants that are checked."""
    widths: tuple[Annotated[int, pydantic.Field(ge=2)], ...] = pydantic.Field(
        (64, 128, 256, 512), min_length=2
    )
    """Hidden sizes, multiples of twice the heads."""
    sweep_widths: tuple[int, ...] = ()
    """Those of which the best rate is looked for; none: all."""
    layers: int = pydantic.Field(2, ge=1)
    """Blocks of each."""
    heads: int = pydantic.Field(4, ge=1)
    """Heads of each: what grows with the width is a head's size."""
    feed_forward: int = pydantic.Field(2, ge=1)
    """Width of the feed-forward half over the hidden size."""
    tied: bool = True
    """Whether the head is the embedding."""
    length: int = pydantic.Field(64, ge=2)
    """Tokens of a row."""
    batch_tokens: int = pydantic.Field(256, ge=2)
    """Tokens of a step, a multiple of the length."""
    steps: int = pydantic.Field(5, ge=1)
    """Steps before activations are measured."""
    learning_rate: float = pydantic.Field(0.012, gt=0)
    """Of these steps, at the base width."""
    rates: tuple[Annotated[float, pydantic.Field(gt=0)], ...] = pydantic.Field(
        (0.003, 0.006, 0.012, 0.024, 0.048), min_length=2
    )
    """The grid of rates."""
    sweep_steps: int = pydantic.Field(20, ge=4)
    """Steps of each training of the grid; the loss of the last quarter is compared."""

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> MupCheck:
        for width in (*self.widths, *self.sweep_widths):
            if width % (2 * self.heads):
                raise ValueError(f"width {width} is no multiple of twice the {self.heads} heads")
        if self.batch_tokens % self.length:
            raise ValueError(f"batch_tokens {self.batch_tokens} is no multiple of length {self.length}")
        for name in ("widths", "sweep_widths", "rates"):
            values = getattr(self, name)
            if list(values) != sorted(set(values)):
                raise ValueError(f"{name} rise")
        return self


def _plan_check(parameters: MupCheck, shapes: Any) -> Cost:
    """Trainings of all widths: the widest takes most of the time."""

    def weights(width: int) -> float:
        return parameters.layers * (4 + 3 * parameters.feed_forward) * float(width) ** 2

    steps = sum(map(weights, parameters.widths)) * parameters.steps
    swept = sum(map(weights, parameters.sweep_widths or parameters.widths))
    steps += swept * parameters.sweep_steps * len(parameters.rates)
    flops = 2 * _TRAINED * steps * parameters.batch_tokens
    return Cost(
        flops=flops, memory=20 * weights(max(parameters.widths)), seconds=flops / _OPERATIONS_PER_SECOND
    )


@stage(
    "mup_check",
    parameters=MupCheck,
    inputs={"tokenizer": Input("tokenizer"), "corpus": Input("corpus")},
    plan=_plan_check,
)
def mup_check(context: Context, parameters: MupCheck) -> Outcome:
    """Check muP over widths: activations after a few steps, and whether the best rate stays in place (S46).

    In float32. Time grows with the square of the widest.
    """
    from puna.train.coordinates import run

    return run(context, parameters)
