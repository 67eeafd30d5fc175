"""What the server answers, for its OpenAPI description.

The answers themselves are written as plain dictionaries; tests check every kind of them against these.
"""

from __future__ import annotations

from typing import Any, Literal

import pydantic

FinishReason = Literal["stop", "length", "tool_calls"]


class Answer(pydantic.BaseModel):
    """Base of every answer: nothing stands in it that is not described here."""

    model_config = pydantic.ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ErrorDetail(Answer):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Answer):
    """Every answer with a status of 400 or more."""

    error: ErrorDetail


class PromptDetails(Answer):
    """Which of the prompt's tokens were there already."""

    cached_tokens: int


class Usage(Answer):
    """Counts of tokens; of several answers the sum."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails | None = None


class TokenTrace(Answer):
    """One token: where it came from and what it cost."""

    id: int
    text: str
    source: str
    entropy: float | None
    """Bits, of the raw distribution."""
    accepted: bool | None
    """Whether the verifier took it; nothing where nothing was proposed."""
    cost: float
    """Tokens of forward passes, each weighted by its model's parameters over the target's."""


class Accounting(Answer):
    """What one answer cost and where its tokens came from."""

    tokens: int
    sources: dict[str, int]
    judged: int
    """Tokens at which a verifier judged a proposal, without what was drafted behind a refused one."""
    accepted: int
    cost: float
    mean_entropy: float | None


class Extension(Answer):
    """puna's own field of a choice: how it was decoded."""

    strategy: str | None
    lossless: bool
    """Whether the answer follows the model's own distribution exactly."""
    seed: int
    accounting: Accounting
    trace: list[TokenTrace] | None = None


class CompletionLogprobs(Answer):
    """Log-probabilities (natural) of a completion, as the older interface lists them."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Answer):
    """One answer to one prompt."""

    index: int
    text: str
    finish_reason: FinishReason
    logprobs: CompletionLogprobs | None
    puna: Extension


class CompletionAnswer(Answer):
    """POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class TopLogprob(Answer):
    """One of the likeliest tokens at a place."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A produced token and the likeliest ones at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    """Log-probabilities (natural) of a message."""

    content: list[TokenLogprob]
    refusal: None = None


class CalledFunction(Answer):
    """Which function is to be called, its arguments as JSON text."""

    name: str
    arguments: str


class CalledTool(Answer):
    """A call that the model wrote."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(Answer):
    """What the assistant said."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    tool_calls: list[CalledTool] | None = None


class ChatChoice(Answer):
    """One answer to the conversation."""

    index: int
    message: AnswerMessage
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None
    puna: Extension


class ChatAnswer(Answer):
    """POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class Embedding(Answer):
    """One text's vector: numbers, or little-endian float32 in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Answer):
    """Counts of tokens."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingAnswer(Answer):
    """POST /v1/embeddings."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


class ModelCard(Answer):
    """A name that requests may give as ``model``."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None
    """The model that an adapter is put on."""
    max_model_len: int
    """Tokens of prompt and answer together."""
    weight_bytes: int
    """Of its weights as they are laid out for decoding, which a step reads."""
    held_bytes: int
    """Of the weights that it holds itself: companions' too, without what it shares with the first model."""
    chat: bool
    """Whether it has a chat template."""


class ModelList(Answer):
    """GET /v1/models."""

    object: Literal["list"]
    data: list[ModelCard]


class StrategyCard(Answer):
    """A decoding method that requests may give as ``strategy``."""

    name: str
    lossless: bool | None
    """At its default settings; nothing for one that must be given settings."""
    says: str
    missing: list[str]
    """What this server lacks for it: models and files, each with the option that gives it."""
    example: dict[str, str]
    """Settings to begin with, where it has a use for files that the server was given."""
    settings: dict[str, Any]
    """JSON schema of its settings."""


class StrategyList(Answer):
    """GET /v1/strategies."""

    object: Literal["list"]
    data: list[StrategyCard]


class Health(Answer):
    """GET /health."""

    status: Literal["ok"]
    running: int
    waiting: int


class RunCard(Answer):
    """A run whose report can be read."""

    name: str
    title: str
    status: str
    scale: str
    started: str
    claims: str | None
    """How many of its claims hold, where they were judged."""
    report: str | None
    """Where the report is served."""


class RunList(Answer):
    """GET /runs."""

    folder: str
    data: list[RunCard]
