"""Stages of S34, S68, S25, S53 and S24.

``entropy_switching``, ``nudging``, ``self_evaluation_data``, ``self_evaluation``, ``feed_forward_skip``,
``early_exits``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic

from puna.core.errors import PunaError
from puna.core.stage import Context, Cost, Input, Outcome, Parameters, PlanOnly, stage

_WEIGHTS_PER_SECOND = 1.0e11  # read or multiplied, of a model that decodes in batches; for plans only


def _cost(shapes: Any, tokens: float) -> Cost:
    """So many tokens through the largest model given."""
    weights = max((spec.parameter_count() for spec in shapes.models.values()), default=0)
    total = sum(spec.parameter_count() for spec in shapes.models.values())
    return Cost(
        tokens=tokens,
        flops=2.0 * tokens * weights,
        memory=4.0 * total,
        seconds=tokens * weights / _WEIGHTS_PER_SECOND,
    )


class EntropySwitchingStage(Parameters):
    """Parameters of the stage ``entropy_switching``."""

    rows: int = pydantic.Field(16, ge=1)
    """Conversations that are answered, from the corpus's beginning."""
    max_tokens: int = pydantic.Field(48, ge=2)
    """Tokens of each answer."""
    temperature: float = pydantic.Field(0.7, ge=0)
    """Of the draws; the router looks at the entropy before any temperature."""
    thresholds: tuple[float, ...] = pydantic.Field((1.0, 2.0, 3.0), min_length=1)
    """Bits above which the large model writes, rising."""
    threshold_large: float | None = None
    """The same while the large model writes; null takes the same threshold."""
    shares: tuple[float, ...] = pydantic.Field((0.25, 0.5, 0.75), min_length=1)
    """Shares of large tokens of the random baseline."""
    at_share: float = pydantic.Field(0.4, gt=0, lt=1)
    """Share of large tokens at which the two are compared."""
    window: int = pydantic.Field(5, ge=1)
    """Tokens over which the entropy is averaged."""
    minimum_stay: int = pydantic.Field(5, ge=1)
    """Tokens that a model writes at least."""


@stage(
    "entropy_switching",
    parameters=EntropySwitchingStage,
    inputs={"large": Input("model"), "small": Input("model"), "corpus": Input("corpus")},
    plan=lambda parameters, shapes: _cost(
        shapes,
        2.0
        * parameters.rows
        * (40 + parameters.max_tokens)
        * (2 + len(parameters.thresholds) + len(parameters.shares)),
    ),
)
def entropy_switching(context: Context, parameters: EntropySwitchingStage) -> Outcome:
    """Switch between two models by entropy and at random; how much of their gap is closed, at what cost.

    Time grows with the answers and with the number of thresholds and shares.
    """
    from puna.decode.switching_measures import run

    return run(context, parameters)


class NudgingStage(Parameters):
    """Parameters of the stage ``nudging``."""

    rows: int = pydantic.Field(12, ge=1)
    """Conversations that are answered, from the corpus's beginning."""
    max_tokens: int = pydantic.Field(64, ge=2)
    """Tokens of an answer at most, in the base's vocabulary."""
    confidences: tuple[float, ...] = pydantic.Field((0.1, 0.3, 0.5), min_length=1)
    """Probabilities below which the base is nudged, rising."""
    judged_at: float = 0.3
    """The one of them at which proper stops are counted."""
    base_prompt: str = "Question: {question}\nAnswer:\n"
    """How the base is asked."""
    nudge_tokens: int = pydantic.Field(16, ge=1)
    """Tokens of a nudge at most."""
    repeat_rule: bool = True
    """The base hands back where it would repeat itself."""
    instruction: str | None = None
    """A system message before every conversation."""
    round_trips: int = pydantic.Field(200, ge=1)
    """Texts of the corpus that go back and forth between the vocabularies."""

    @pydantic.model_validator(mode="after")
    def _judged(self) -> NudgingStage:
        if self.judged_at not in self.confidences:
            raise ValueError(f"judged_at {self.judged_at:g} is none of the confidences")
        return self


@stage(
    "nudging",
    parameters=NudgingStage,
    inputs={
        "base": Input("model"),
        "nudger": Input("model"),
        "corpus": Input("corpus"),
        "tokenizer": Input("tokenizer", optional=True),
    },
    plan=lambda parameters, shapes: _cost(
        shapes, 3.0 * parameters.rows * (40 + parameters.max_tokens) * (4 + len(parameters.confidences))
    ),
)
def nudging(context: Context, parameters: NudgingStage) -> Outcome:
    """Nudge a base model towards answers that end, with more and less confidence asked of it.

    ``tokenizer`` is a further vocabulary through which texts are sent back and forth.
    """
    from puna.decode.nudging_measures import run

    return run(context, parameters)


TaskKind = Literal["list", "larger", "begins", "look_up"]


class Asking(Parameters):
    """What is asked, and how often."""

    tasks: tuple[TaskKind, ...] = pydantic.Field(("list", "larger"), min_length=1)
    """Kinds of questions whose answers can be checked, in turn."""
    questions: int = pydantic.Field(48, ge=2)
    """Different questions."""
    samples: int = pydantic.Field(8, ge=2)
    """Answers to each."""
    temperature: float = pydantic.Field(0.8, gt=0)
    """Of the answers."""
    max_tokens: int = pydantic.Field(24, ge=2)
    """Tokens of an answer at most."""


class SelfEvaluationData(Asking):
    """Parameters of the stage ``self_evaluation_data``."""

    cut_share: float = pydantic.Field(0.5, ge=0, le=1)
    """Share of the answers that are cut at a random token."""
    epsilon: float = pydantic.Field(0.0, ge=0)
    """An answer ties with another whose reward is greater by no more than this."""
    rows_per_question: int | None = pydantic.Field(None, ge=1)
    """Judged answers to learn from of each question; null takes all."""
    balanced: bool = False
    """As many verdicts of each kind: what the rarer one has, the others by lot."""
    kept_share: float = pydantic.Field(1.0, ge=0, le=1)
    """Share of the questions of which one answer is learnt as it is, so that the model goes on answering."""
    expected_tokens: Annotated[pydantic.PositiveInt | None, PlanOnly()] = None
    """How many tokens the rows will hold, where that is known: what a plan goes by."""


@stage(
    "self_evaluation_data",
    parameters=SelfEvaluationData,
    inputs={"model": Input("model")},
    outputs={"corpus": "corpus"},
    version=2,
    plan=lambda parameters, shapes: _data_cost(parameters, shapes),
)
def self_evaluation_data(context: Context, parameters: SelfEvaluationData) -> Outcome:
    """Let a model answer questions that can be checked; the rows to learn self-evaluation from (S25).

    A judged row is a question, an answer or its beginning, whether starting over would be better, and the
    right verdict: the answer against another of the same question. A kept row is question and answer. Of
    both only the last turn is to be learnt.
    """
    from puna.decode.self_evaluation_data import run

    return run(context, parameters)


def _data_cost(parameters: SelfEvaluationData, shapes: Any) -> Cost:
    import dataclasses

    rows = parameters.questions * min(parameters.samples, parameters.rows_per_question or parameters.samples)
    made = rows * (100.0 + parameters.max_tokens)
    drawn = _cost(shapes, parameters.questions * parameters.samples * parameters.max_tokens)
    return dataclasses.replace(drawn, tokens=parameters.expected_tokens or made, kind="messages")


class SelfEvaluationStage(Asking):
    """Parameters of the stage ``self_evaluation``. The questions are others than those of the data."""

    low: float = pydantic.Field(1.5, ge=1)
    """Adaptive and fixed drawing are compared from so many mean samples on."""
    high: float = pydantic.Field(5.0, ge=1)
    """And up to so many."""
    anneal: bool = True
    """Draw the first answer greedily and each further one at a temperature nearer to the given one; false
    draws all of them at it."""
    prune_at: int = pydantic.Field(4, ge=1)
    """Tokens after which samples are scored in the check of undisturbed answers."""


@stage(
    "self_evaluation",
    parameters=SelfEvaluationStage,
    inputs={"model": Input("model"), "untrained": Input("model")},
    outputs={"answers": "file"},
    version=2,
    plan=lambda parameters, shapes: _cost(
        shapes, 2.0 * parameters.questions * parameters.samples * (60 + parameters.max_tokens)
    ),
)
def self_evaluation(context: Context, parameters: SelfEvaluationStage) -> Outcome:
    """How well a model's scores order its own answers, and what drawing by them gains (S25)."""
    from puna.decode.self_evaluation_measures import run

    return run(context, parameters)


class FeedForwardSkipStage(Parameters):
    """Parameters of the stage ``feed_forward_skip``."""

    share: float = pydantic.Field(0.25, gt=0, lt=1)
    """Share of all feed-forwards that is to be left out."""
    cold_ends: tuple[tuple[pydantic.NonNegativeInt, pydantic.NonNegativeInt], ...] = pydantic.Field(
        ((4, 4),), min_length=1
    )
    """Candidates for how many layers at the beginning and at the end never skip, at least; the best on the
    calibration texts is taken. Random skips, the baseline, keep to the first."""
    percentiles: tuple[float, ...] = pydantic.Field((75.0,), min_length=1)
    """Candidates for the threshold, percentiles of the calibration cosines; the best on them is taken."""
    saturated: float = pydantic.Field(0.9, ge=-1, le=1)
    """Mean cosine that a layer of the middle must reach."""
    tolerance: float = pydantic.Field(0.05, ge=0)
    """Nats a token that skipping may cost on the calibration texts; beyond, there is nothing to skip."""
    warm_up: int = pydantic.Field(10, ge=0)
    """First tokens of an answer that are read in full."""
    calibration_rows: int = pydantic.Field(4, ge=1)
    """Conversations to calibrate on; what is measured is measured on the others."""
    rows: int = pydantic.Field(12, ge=2)
    """Conversations in all, from the corpus's beginning."""
    timed_rows: int = pydantic.Field(4, ge=1)
    """Conversations whose tokens are timed."""
    timed_tokens: int = pydantic.Field(16, ge=4)
    """Tokens of an answer that are timed step by step, with and without skipping in turn."""
    kernels: Literal["auto", "native", "plain"] = "auto"
    """What runs the steps that are timed; losses are read with the plain stepper."""
    timed_rounds: int = pydantic.Field(3, ge=1)
    """Times that they are."""

    @pydantic.model_validator(mode="after")
    def _held_out(self) -> FeedForwardSkipStage:
        if self.calibration_rows >= self.rows:
            raise ValueError("no row is left to measure on: raise rows or lower calibration_rows")
        return self


@stage(
    "feed_forward_skip",
    parameters=FeedForwardSkipStage,
    inputs={"model": Input("model"), "corpus": Input("corpus")},
    outputs={"plan": "file"},
    plan=lambda parameters, shapes: _cost(shapes, 8.0 * parameters.rows * 150),
)
def feed_forward_skip(context: Context, parameters: FeedForwardSkipStage) -> Outcome:
    """Plan which feed-forwards to skip, and measure it beside random skips and dropped layers (S53).

    The corpus holds conversations whose last turn is the assistant's; the losses are of those turns. The
    plan is what the strategy ``feed-forward-skip`` reads; it may say that there is nothing to skip.
    """
    from puna.decode.skip_stage import run

    return run(context, parameters)


class EarlyExitsStage(Parameters):
    """Parameters of the stage ``early_exits``."""

    exits: tuple[int, ...] = pydantic.Field(min_length=1)
    """Layers behind which a token may leave, counted from 1, rising."""
    thresholds: dict[str, tuple[float, ...]] = pydantic.Field(min_length=1)
    """Thresholds of the exits, one each, by a name that the metrics carry."""
    skip: int = pydantic.Field(0, ge=0)
    """Questions that are passed over, for other stages; the order is drawn by the run's seed alone."""
    rows: int = pydantic.Field(50, ge=1)
    """Questions that are answered, each once."""
    max_tokens: int = pydantic.Field(48, ge=2)
    """Tokens of an answer at most; answers are greedy."""
    quantize: Literal["int8", "int4"] | None = None
    """Lay the weights out in integers: what agrees is then compared with the model as it is saved."""
    kernels: Literal["auto", "native", "plain"] = "auto"
    """What runs the model that answers."""
    timed_rows: int = pydantic.Field(4, ge=1)
    """Questions whose answers are timed, one at a time."""
    timed_rounds: int = pydantic.Field(3, ge=1)
    """Times that they are, the whole model and each set of thresholds in turn."""

    @pydantic.model_validator(mode="after")
    def _complete(self) -> EarlyExitsStage:
        for label, thresholds in self.thresholds.items():
            if len(thresholds) != len(self.exits):
                raise ValueError(f"thresholds.{label} needs {len(self.exits)} numbers, one for each exit")
            if label == "whole":
                raise ValueError("'whole' stands for the model without exits: name the thresholds otherwise")
        return self


@stage(
    "early_exits",
    parameters=EarlyExitsStage,
    inputs={"model": Input("model"), "corpus": Input("corpus")},
    plan=lambda parameters, shapes: _cost(
        shapes, parameters.rows * (40.0 + parameters.max_tokens) * (3 + 2 * len(parameters.thresholds))
    ),
)
def early_exits(context: Context, parameters: EarlyExitsStage) -> Outcome:
    """Answer questions with tokens leaving at inner layers: what is saved, and what agrees (S24).

    Time grows with the answers and with the number of sets of thresholds.
    """
    from puna.decode.exit_measures import run

    return run(context, parameters)


def require_rows(found: int, wanted: int, where: object) -> None:
    """Refuse a corpus with fewer conversations than a stage is to take."""
    if found < wanted:
        raise PunaError(
            "the corpus has too few conversations",
            where=where,
            found=found,
            expected=f"at least {wanted}",
            fix="lower rows, or give more",
        )
