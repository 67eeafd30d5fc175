"""The stage ``question_answers``: a model's questions and answers about texts, as plain text (S20)."""

from __future__ import annotations

from typing import Any

import pydantic

from puna.core.stage import Context, Cost, Input, Outcome, stage
from puna.decode.draft_stages import Drawing, Kernels, Quantize

_CHARACTERS_PER_TOKEN = 4.0
_WEIGHTS_PER_SECOND = 2.0e11  # for plans only


class QuestionAnswers(Drawing):
    """Parameters of the stage ``question_answers``."""

    rows: int = pydantic.Field(100, ge=1)
    """Texts at most, drawn by the run's seed; each gives one question."""
    characters: int = pydantic.Field(600, ge=20)
    """Of each text the beginning alone, so many characters, cut at white space."""
    question: str = "{text}\n\nWrite one short question that this text answers. Write only the question."
    """What the model is asked for a question, with the place {text}."""
    answer: str = "{text}\n\nAnswer in one sentence: {question}"
    """What it is asked for its answer, with the places {text} and {question}."""
    joined: str = "Question: {question}\nAnswer: {answer}"
    """The plain text that is left, with the places {question} and {answer}."""
    question_tokens: int = pydantic.Field(32, ge=1)
    """Tokens of a question at most; it ends with its first line."""
    answer_tokens: int = pydantic.Field(64, ge=1)
    """Tokens of an answer at most."""
    wrong: float = pydantic.Field(0.0, ge=0, le=1)
    """Above 0: leave as ``spoilt`` the same pairs, a share of them with the answer to another question."""
    quantize: Quantize | None = None
    """Lay the weights out in integers: quicker, and not quite the model's own text."""
    kernels: Kernels = "auto"
    """What runs the model."""

    @pydantic.model_validator(mode="after")
    def _placed(self) -> QuestionAnswers:
        needed = {"question": ("{text}",), "answer": ("{question}",), "joined": ("{question}", "{answer}")}
        for name, places in needed.items():
            if missing := [place for place in places if place not in getattr(self, name)]:
                raise ValueError(f"{name} has no place {missing[0]}")
        return self


def _plan(parameters: QuestionAnswers, shapes: Any) -> Cost:
    """Each text is read twice, once for its question and once for the answer; both are written."""
    spec = shapes.models.get("model")
    weights = 0.0 if spec is None else float(spec.parameter_count())
    written = float(parameters.rows * (parameters.question_tokens + parameters.answer_tokens))
    read = 2 * parameters.rows * parameters.characters / _CHARACTERS_PER_TOKEN
    seconds = (written + read) * weights / _WEIGHTS_PER_SECOND
    return Cost(tokens=written, memory=4.0 * weights, seconds=seconds, kind="documents")


@stage(
    "question_answers",
    parameters=QuestionAnswers,
    inputs={"model": Input("model"), "corpus": Input("corpus")},
    outputs={"corpus": "corpus", "spoilt": "corpus"},
    plan=_plan,
)
def question_answers(context: Context, parameters: QuestionAnswers) -> Outcome:
    """Let an instruct model write a question about each text and its answer, and join them as plain text.

    Nobody checks the answers. Time grows with the tokens of texts, questions and answers.
    """
    from puna.decode.question_answers import run

    return run(context, parameters)
