"""The stages of PanGu-pi (S82): ``augment``, ``augment_checks`` and ``feature_collapse``."""

from __future__ import annotations

from typing import Any, Literal

import pydantic

from puna.core.stage import Context, Cost, Input, Outcome, Parameters, stage
from puna.train.plan import BYTES, forward_operations


class Augment(Parameters):
    """Parameters of the stage ``augment``."""

    series: int = pydantic.Field(2, ge=0)
    """Terms of the activation on the gate: 2, or 1 for a scaled and shifted SiLU; 0 adds none."""
    shortcut: int | None = pydantic.Field(None, ge=0)
    """Width of the way around attention; null is the paper's hidden size / 32, 0 adds none."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the augmented model's weights are saved in."""

    def width(self, hidden_size: int) -> int:
        """Of the bottleneck, in a model of this size."""
        return max(1, hidden_size // 32) if self.shortcut is None else self.shortcut


def _plan(parameters: Augment, shapes: Any) -> Cost:
    """The weights are read and held once, in float32, and written with what is added."""
    spec = shapes.spec
    if spec is None:
        return Cost()
    richer = spec.replace(series=parameters.series, shortcut=parameters.width(spec.hidden_size))
    size = richer.parameter_count()
    memory = 4.0 * size + size * BYTES[parameters.save_dtype]
    return Cost(memory=memory, seconds=shapes.device.read_seconds(memory), spec=richer)


@stage(
    "augment", parameters=Augment, inputs={"model": Input("model")}, outputs={"model": "model"}, plan=_plan
)
def augment(context: Context, parameters: Augment) -> Outcome:
    """Add series activations and shortcuts to a trained model without changing a logit (S82).

    Time and memory grow linearly with the number of weights.
    """
    from puna.core.seeds import torch_generator
    from puna.edit.growing.augment import augment as add
    from puna.text import pretrained

    model = pretrained.load_plain(context.inputs["model"], dtype="float32")
    richer = add(
        model,
        series=parameters.series,
        shortcut=parameters.width(model.spec.hidden_size),
        generator=torch_generator(context.seed, "augment"),
    )
    before, after = model.spec.parameter_count(), richer.spec.parameter_count()
    saved = richer.to(pretrained.DTYPES[parameters.save_dtype])
    written = pretrained.save(saved, context.out / "model")
    return Outcome({"model": written}, {"parameters": float(after), "added": float(after - before)})


class Text(Parameters):
    """Rows of text that a stage reads, drawn by the seed."""

    rows: int = pydantic.Field(32, ge=1)
    """Rows of text."""
    length: int = pydantic.Field(128, ge=3)
    """Tokens of a row."""
    batch_rows: int = pydantic.Field(8, ge=1)
    """Rows of a forward pass; memory grows with it."""


class AugmentChecks(Text):
    """Parameters of the stage ``augment_checks``."""

    rows: int = pydantic.Field(4, ge=1)
    """Rows of text that both models read, and that gradients are taken of."""


def _plan_checks(parameters: AugmentChecks, shapes: Any) -> Cost:
    """Both models in float32, the gradients of one; every row is read three times and once backwards."""
    specs = list(shapes.models.values())
    tokens = float(parameters.rows * parameters.length)
    flops = sum(5 * tokens * forward_operations(spec, parameters.length) for spec in specs)
    memory = 12.0 * sum(spec.parameter_count() for spec in specs)
    return Cost(tokens=tokens, flops=flops, memory=memory)


@stage(
    "augment_checks",
    parameters=AugmentChecks,
    inputs={"model": Input("model"), "augmented": Input("model"), "corpus": Input("corpus")},
    plan=_plan_checks,
)
def augment_checks(context: Context, parameters: AugmentChecks) -> Outcome:
    """Compare a model and the same augmented: logits, here and in the engine, gradients, weights (S82).

    Time grows with weights times text; memory is that of both models and the gradients of one.
    """
    from puna.edit.growing.augment_checks import run

    return run(context, parameters)


class FeatureCollapse(Text):
    """Parameters of the stage ``feature_collapse``."""

    variance: float = pydantic.Field(0.8, gt=0, lt=1)
    """The share of the variance that the counted principal components hold."""


def _plan_collapse(parameters: FeatureCollapse, shapes: Any) -> Cost:
    """Every row is read once by every model; for each layer a matrix of hidden squared in float64."""
    tokens = float(parameters.rows * parameters.length)
    flops = memory = 0.0
    for spec in shapes.models.values():
        layers = len(spec.blocks)
        flops += tokens * (forward_operations(spec, parameters.length) + 2 * layers * spec.hidden_size**2)
        sums = 8.0 * layers * spec.hidden_size**2
        memory = max(memory, sums + spec.parameter_count() * BYTES[shapes.dtype])
    return Cost(tokens=tokens * len(shapes.models), flops=flops, memory=memory)


@stage(
    "feature_collapse",
    parameters=FeatureCollapse,
    inputs={"models": Input("model", many=True), "corpus": Input("corpus")},
    plan=_plan_collapse,
)
def feature_collapse(context: Context, parameters: FeatureCollapse) -> Outcome:
    """Measure how alike tokens' states become: principal components and distance from the mean, by layer.

    A text's first token, an outlier, is left out. Time grows with models times text.
    """
    from puna.edit.growing.augment_checks import run_collapse

    return run_collapse(context, parameters)
