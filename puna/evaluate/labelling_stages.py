"""The stages ``label_scores`` and ``label_checks``."""

from __future__ import annotations

from typing import Any

import pydantic

from puna.core.stage import Context, Cost, Input, Outcome, Parameters, stage


class ZeroShot(Parameters):
    """How a language model that was not trained for it is asked for a label."""

    ask: str = "{text}\nWhat is the sentiment of this text?"
    """What the user says, with the place {text}."""
    words: dict[str, str] = pydantic.Field(default_factory=dict)
    """What the assistant would say for a label, where that is not its name."""
    rows: int = pydantic.Field(200, ge=1)
    """Rows that are asked, the first of those measured."""

    @pydantic.field_validator("ask")
    @classmethod
    def _has_place(cls, value: str) -> str:
        if "{text}" not in value:
            raise ValueError("the request has no place {text}")
        return value


class LabelScores(Parameters):
    """Parameters of the stage ``label_scores``."""

    rows: int | None = pydantic.Field(None, ge=1)
    """Rows of the corpus, drawn by the run's seed; null takes all."""
    max_length: int = pydantic.Field(64, ge=2)
    """Tokens of a row at most; words beyond count as labelled wrong."""
    zero_shot: ZeroShot | None = None
    """How the input language_model is asked."""


def _plan_scores(parameters: LabelScores, shapes: Any) -> Cost:
    """Every model reads the corpus once."""
    tokens = shapes.tokens_of("corpus") * max(1, len(shapes.models))
    if shapes.spec is None:
        return Cost(tokens=tokens)
    weights = shapes.spec.parameter_count()
    return Cost(tokens=tokens, flops=2.0 * weights * tokens, memory=4.0 * weights)


@stage(
    "label_scores",
    parameters=LabelScores,
    inputs={
        "models": Input("model", many=True),
        "corpus": Input("corpus"),
        "train": Input("corpus", optional=True),
        "language_model": Input("model", optional=True),
    },
    plan=_plan_scores,
)
def label_scores(context: Context, parameters: LabelScores) -> Outcome:
    """Score what models label: accuracy, macro F1, entity F1, beside the majority and a zero-shot model.

    The most frequent label is that of the input train. Time grows with models times rows.
    """
    from puna.evaluate.labelling import measure, table

    scores = measure(context.inputs, parameters, seed=context.seed, dtype=context.dtype)
    context.report["tables"] = [table(scores, "Labels")]
    figures: dict[str, float] = {}
    for name, each in scores.items():
        figures |= each.metrics(f".{name}")
    return Outcome({}, figures)


class LabelChecks(Parameters):
    """Parameters of the stage ``label_checks``."""

    rows: int = pydantic.Field(8, ge=2)
    """Rows of the corpus that are looked at, of unequal length."""
    max_length: int = pydantic.Field(64, ge=2)
    """Tokens of a row at most."""
    groups: int | None = pydantic.Field(4, ge=1, le=8)
    """Groups of layers of which every pattern of masks is checked too; null: the models as they are alone."""


@stage(
    "label_checks",
    parameters=LabelChecks,
    inputs={"models": Input("model", many=True), "corpus": Input("corpus")},
)
def label_checks(context: Context, parameters: LabelChecks) -> Outcome:
    """Check what labellers promise: transformers' logits, batches as alone, who sees the last word.

    Everything is computed in float32; time is that of a few passes for each model.
    """
    from puna.evaluate.label_checks import checks

    return Outcome({}, checks(context.inputs, parameters, seed=context.seed))
