"""The stage ``evaluate``: several models on several corpora, compared by pairs of documents."""

from __future__ import annotations

from typing import Any

import pydantic

from puna.core.stage import Context, Input, Outcome, Parameters, stage

Prompts = list[str | list[dict[str, str]]]


class Translation(Parameters):
    """How sentence pairs become prompts and how far an answer goes."""

    format: str = "Translate this text from {source_language} to {target_language}.\n{source_text}"
    """The prompt, with the places {source_text}, {source_language}, {target_language}."""
    chat: bool = True
    """Ask as a user's message through the chat template; otherwise the model continues the prompt."""
    rows: int = pydantic.Field(50, ge=1)
    """Sentence pairs of each corpus, chosen by the run's seed."""
    max_tokens: int = pydantic.Field(128, ge=1)
    stop: tuple[str, ...] = ("\n",)
    """Strings at which an answer is cut."""


class Evaluate(Parameters):
    """Parameters of the stage ``evaluate``."""

    baseline: str | None = None
    """The model that the others are compared with; by default the first one."""
    compare: tuple[tuple[str, str], ...] = ()
    """Further pairs [model, other] to compare."""
    untouched: tuple[str, ...] = ()
    """Corpora of what nothing was trained on: change there is forgetting."""
    max_documents: int | None = pydantic.Field(1000, ge=1)
    """Documents of each corpus at most, chosen by the run's seed; null takes all."""
    max_bytes: int | None = pydantic.Field(100_000, ge=1)
    """Bytes of text of each corpus at most; null takes all."""
    window: int = pydantic.Field(2048, ge=1)
    """Tokens a model sees at once, bounded by its context; longer documents are read in half-overlapping windows."""
    batch_tokens: int = pydantic.Field(2048, ge=1)
    """Tokens of a forward pass."""
    draws: int = pydantic.Field(2000, ge=100)
    """Bootstrap draws behind each interval."""
    prompts: dict[str, Prompts] = pydantic.Field(default_factory=dict)
    """Prompts for samples by language or topic: strings to continue or lists of messages to answer."""
    sample_tokens: int = pydantic.Field(64, ge=1)
    """Tokens of a sample at most."""
    translation: Translation | None = None
    """How to translate the corpora of sentence pairs; needed if there are any."""

    @pydantic.field_validator("prompts", mode="before")
    @classmethod
    def _one_list(cls, value: Any) -> Any:
        return {"": value} if isinstance(value, list) else value

    @pydantic.field_validator("prompts")
    @classmethod
    def _whole_messages(cls, value: dict[str, Prompts]) -> dict[str, Prompts]:
        for prompt in (prompt for prompts in value.values() for prompt in prompts):
            if not prompt:
                raise ValueError("a prompt is empty")
            if not isinstance(prompt, str) and any(set(message) != {"role", "content"} for message in prompt):
                raise ValueError("a message needs exactly the keys role and content")
        return value


@stage(
    "evaluate",
    parameters=Evaluate,
    inputs={"models": Input("model", many=True), "corpora": Input("corpus", many=True, optional=True)},
    outputs={"scores": "file"},
)
def evaluate(context: Context, parameters: Evaluate) -> Outcome:
    """Measure models side by side, with intervals: bits per byte, forgetting, fertility, translation, samples."""
    from puna.core.files import write_json
    from puna.evaluate.compare import evaluate_models
    from puna.evaluate.tables import report

    result = evaluate_models(
        context.inputs["models"],
        context.inputs.get("corpora") or {},
        parameters,
        seed=context.seed,
        dtype=context.dtype,
        device=context.device,
    )
    context.report.update(report(result))
    path = context.out / "scores.json"
    write_json(path, result.scores())
    return Outcome(outputs={"scores": path}, metrics=result.metrics())
