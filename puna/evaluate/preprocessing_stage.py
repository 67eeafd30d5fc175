"""The stage ``ask_tables`` (S71): a model answers questions about tables, in several ways."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic

from puna.core.stage import Context, Cost, Input, Outcome, Parameters, PlanOnly, stage
from puna.data.tables.grouping import Grouping
from puna.data.tables.prompts import ROLE

_TOKENS_A_QUESTION = 120  # for plans only


class Way(Parameters):
    """How questions are put to the model, and how its answers are had."""

    questions: tuple[str, ...] = ()
    """Names of the questions that are asked this way; none means all."""
    examples: int = pydantic.Field(0, ge=0)
    """Examples shown before the questions, of those that the questions come with; 0 is zero-shot."""
    reasons: bool = False
    """Examples tell their reason, and the model is to give one before its answer."""
    batch: int = pydantic.Field(1, ge=1)
    """Questions in one prompt."""
    grouping: Grouping = "random"
    """Which questions share a prompt: any, or alike ones (k-means)."""
    answer: Literal["scored", "written", "channel"] = "scored"
    """Score the choices by their likelihood, read what the model writes, or score the data instead: which
    answer makes the second row of a pair, or the cell that is asked about, likelier to be written."""
    calibration: Literal["none", "empty_row", "mean"] = "none"
    """What is taken off scores: nothing, those of a question whose cells are null, or their mean over the
    questions asked."""
    columns: Literal["all", "informative"] | tuple[str, ...] = "all"
    """Columns that are shown: all, those that tell something of the examples' answers, or these. The column
    that is asked about is always shown."""
    attempts: int = pydantic.Field(2, ge=1)
    """How often a question is asked until it has an answer in the format; for written ones."""
    max_tokens: int = pydantic.Field(12, ge=1)
    """Tokens of a written answer (with its reason) at most, for each question."""
    role: str = ROLE
    """The first sentence of the prompt."""
    hint: str | None = None
    """Of what kind missing values are, such as "a country"."""

    @pydantic.model_validator(mode="after")
    def _meaningful(self) -> Way:
        if self.reasons and self.batch > 1 and self.answer == "scored":
            raise ValueError("scored answers behind reasons go one by one: batch is 1, or answer is written")
        if self.calibration != "none" and self.answer == "written":
            raise ValueError("calibration means nothing for written answers")
        if self.answer == "channel" and (self.reasons or self.calibration == "empty_row"):
            raise ValueError("scoring the data knows neither reasons nor the calibration empty_row")
        if self.calibration == "empty_row" and self.reasons:
            raise ValueError("a question about nothing has no reasons: calibration is none or mean")
        return self


class Endpoint(Parameters):
    """A server of the OpenAI interface, in place of a model."""

    url: str
    """Its address, with the /v1."""
    model: str
    """Name of the model there."""
    key: str | None = None
    """Name of the environment variable that holds the key."""
    parallel: int = pydantic.Field(4, ge=1)
    """Requests at once."""


class AskTables(Parameters):
    """Parameters of the stage ``ask_tables``."""

    ways: dict[str, Way] = pydantic.Field(min_length=1)
    """Ways of asking by name."""
    compare: tuple[tuple[str, str], ...] = ()
    """Pairs of ways: how often they answer alike what both are asked."""
    endpoint: Endpoint | None = None
    """Who is asked if no model is given."""
    quantize: Literal["int8", "int4"] | None = None
    """How the engine lays the model's weights out; null as they are."""
    expected_questions: Annotated[int, PlanOnly()] = pydantic.Field(400, ge=1)
    """How many questions all ways ask together: what a plan goes by."""

    @pydantic.model_validator(mode="after")
    def _known(self) -> AskTables:
        for name in (name for pair in self.compare for name in pair):
            if name not in self.ways:
                raise ValueError(f"compare names {name!r}, which is none of the ways {', '.join(self.ways)}")
        return self


def _cost(parameters: AskTables, shapes: Any) -> Cost:
    """A prompt's examples are read once, since prompts that begin alike share what is stored of that."""
    tokens = float(parameters.expected_questions * _TOKENS_A_QUESTION)
    weights = max((spec.parameter_count() for spec in shapes.models.values()), default=0)
    return Cost(tokens=tokens, flops=2.0 * tokens * weights, memory=6.0 * weights)


@stage(
    "ask_tables",
    parameters=AskTables,
    inputs={"model": Input("model", optional=True), "questions": Input("file", many=True)},
    outputs={"answers": "file"},
    plan=_cost,
)
def ask_tables(context: Context, parameters: AskTables) -> Outcome:
    """Let a model answer questions about tables in several ways, and score the answers that are known (S71).

    Questions are JSON lines as the stage ``table_questions`` leaves them. Time grows with questions times
    ways, and with the length of rows and examples.
    """
    from puna.evaluate.preprocessing_measures import run

    return run(context, parameters)
