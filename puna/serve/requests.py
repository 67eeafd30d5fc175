"""Bodies of requests, by the names of OpenAI's interface; what is not understood is refused, never dropped.

Fields beyond OpenAI's are those of other servers (``top_k``, ``min_p``, ``repetition_penalty``,
``stop_token_ids``, ``ignore_eos``) and puna's own: ``strategy`` and ``trace``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic


def _whole(text: str) -> str:
    """Text that can be written as UTF-8: JSON can spell half a character, which nothing can tokenise."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a surrogate pair at character {error.start}") from None
    return text


def _integer(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


# JSON's types are taken at their word: "5" is no number and 1 no truth; but 5.0 is an integer there.
_INT = pydantic.BeforeValidator(_integer)
Text = Annotated[str, pydantic.AfterValidator(_whole)]
Float = Annotated[float, pydantic.Field(strict=True)]
Bool = Annotated[bool, pydantic.Field(strict=True)]
Token = Annotated[int, pydantic.Field(strict=True, ge=0), _INT]
Tokens = Annotated[list[Token], pydantic.Field(min_length=1)]
NotEmpty = Annotated[Text, pydantic.Field(min_length=1)]
Texts = (
    NotEmpty
    | Annotated[list[NotEmpty], pydantic.Field(min_length=1)]
    | Tokens
    | Annotated[list[Tokens], pydantic.Field(min_length=1)]
)
"""A text, token ids, or a list of either; an empty one has no token to go on from."""
Seed = Annotated[int, pydantic.Field(strict=True, ge=-(2**63), le=2**63 - 1), _INT]
Penalty = Annotated[Float, pydantic.Field(ge=-2, le=2)]


class Body(pydantic.BaseModel):
    """Base of every body: unknown keys are errors, and so are nan and infinity."""

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class StrategyChoice(Body):
    """A decoding method by name, with its settings."""

    name: Text
    settings: dict[str, Any] = {}


class StreamOptions(Body):
    """What a stream carries besides text."""

    include_usage: Bool = False
    """One more chunk before the end with the counts of tokens."""


class Generation(Body):
    """What both kinds of completion share."""

    model: Text
    """A name that /v1/models lists."""
    temperature: Annotated[Float, pydantic.Field(ge=0, le=2)] | None = None
    """0 is greedy; 1 where nothing is said."""
    top_p: Annotated[Float, pydantic.Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, pydantic.Field(strict=True, ge=-1), _INT] = 0
    """0 or -1: every token."""
    min_p: Annotated[Float, pydantic.Field(ge=0, le=1)] = 0.0
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[Float, pydantic.Field(gt=0, le=10)] = 1.0
    seed: Seed | None = None
    n: Annotated[int, pydantic.Field(strict=True, ge=1), _INT] | None = None
    stop: Text | list[Text] | None = None
    stop_token_ids: list[Token] = []
    ignore_eos: Bool = False
    stream: Bool | None = None
    stream_options: StreamOptions | None = None
    strategy: Text | StrategyChoice | None = None
    """A decoding method of the engine, by name or with settings; plain decoding without."""
    trace: Bool = False
    """Tell of every token its source, entropy, acceptance and cost, in the field ``puna``."""
    user: Text | None = None
    """Taken and not used."""
    logit_bias: Annotated[dict[str, Float], pydantic.Field(max_length=0)] | None = None
    """Refused unless empty: biases of single tokens are not supported."""

    @pydantic.model_validator(mode="after")
    def _options_of_a_stream(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream: true")
        return self

    @property
    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def choices(self) -> int:
        """How many answers each prompt gets."""
        return self.n or 1


class CompletionBody(Generation):
    """POST /v1/completions."""

    prompt: Texts
    """A text, token ids, or a list of either."""
    max_tokens: Annotated[int, pydantic.Field(strict=True, ge=0), _INT] | None = None
    """16 where nothing is said; 0 only with ``echo``."""
    logprobs: Annotated[int, pydantic.Field(strict=True, ge=0), _INT] | None = None
    """Alternatives to tell of at each token."""
    echo: Bool | None = None
    """Begin the text with the prompt; with ``logprobs`` its tokens are scored too."""
    best_of: Annotated[int, pydantic.Field(strict=True, ge=1), _INT] | None = None
    """Refused unless it equals ``n``."""
    suffix: Annotated[str, pydantic.Field(max_length=0)] | None = None
    """Refused unless empty."""

    @pydantic.model_validator(mode="after")
    def _supported(self) -> CompletionBody:
        if self.best_of not in (None, self.choices):
            raise ValueError("best_of other than n is not supported")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0: that is for echo: true alone")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list of prompts."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class TextPart(Body):
    """A part of a message's content; texts are the only kind."""

    type: Literal["text"]
    text: Text


class FunctionCall(Body):
    """Which function an assistant called, its arguments as JSON text."""

    name: Text
    arguments: Text


class ToolCall(Body):
    """A call of an assistant's message."""

    id: Text
    type: Literal["function"] = "function"
    function: FunctionCall


Content = Text | list[TextPart]


class _Said(Body):
    """What messages share."""

    content: Content | None = None

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class SystemMessage(_Said):
    """Instructions; ``developer`` is the newer name of ``system``."""

    role: Literal["system", "developer"]
    content: Content


class UserMessage(_Said):
    """What the user said."""

    role: Literal["user"]
    content: Content


class AssistantMessage(_Said):
    """What the model said earlier, or called."""

    role: Literal["assistant"]
    tool_calls: Annotated[list[ToolCall], pydantic.Field(min_length=1)] | None = None
    refusal: None = None

    @pydantic.model_validator(mode="after")
    def _not_empty(self) -> AssistantMessage:
        if self.content is None and not self.tool_calls:
            raise ValueError("a message needs a content")
        return self


class ToolMessage(_Said):
    """What a called function gave."""

    role: Literal["tool"]
    content: Content
    tool_call_id: Text
    name: Text | None = None
    """The function's name; taken and not used."""


ChatMessage = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, pydantic.Field(discriminator="role")
]


class Function(Body):
    """A function that the model may call; ``parameters`` is a JSON schema."""

    name: Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: Bool | None = None
    """Taken; the arguments follow the schema whenever a call is demanded."""


class Tool(Body):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    """The function that must be called."""

    name: Text


class NamedTool(Body):
    """A demand to call one function."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Body):
    """A schema that the answer must follow."""

    name: Text
    description: Text | None = None
    schema_: Annotated[dict[str, Any] | None, pydantic.Field(alias="schema")] = None
    strict: Bool | None = None
    """Taken; a schema is always followed."""


class ResponseFormat(Body):
    """What form the answer must have; ``regex`` is puna's own."""

    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: JsonSchema | None = None
    regex: Text | None = None

    @pydantic.model_validator(mode="after")
    def _complete(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type: json_schema, and it must be there")
        if (self.type == "regex") != (self.regex is not None):
            raise ValueError("regex goes with type: regex, and it must be there")
        return self


class ChatBody(Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], pydantic.Field(min_length=1)]
    max_tokens: Annotated[int, pydantic.Field(strict=True, ge=1), _INT] | None = None
    max_completion_tokens: Annotated[int, pydantic.Field(strict=True, ge=1), _INT] | None = None
    """The newer name of ``max_tokens``; without either, the server's bound."""
    logprobs: Bool | None = None
    top_logprobs: Annotated[int, pydantic.Field(strict=True, ge=0), _INT] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: Bool | None = None
    """Taken: a demanded call is one call; a model that may choose can write several."""
    response_format: ResponseFormat | None = None
    metadata: dict[str, str] | None = None
    """Taken and not used."""
    store: Literal[False] | None = None
    """Nothing is stored."""
    service_tier: Literal["auto", "default"] | None = None
    """There is one."""

    @pydantic.model_validator(mode="after")
    def _fits_together(self) -> ChatBody:
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ValueError("give max_tokens or max_completion_tokens, not both")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is for logprobs: true")
        names = [tool.function.name for tool in self.tools or []]
        if len(set(names)) < len(names):
            raise ValueError("two tools have the same name")
        if self.tool_choice not in (None, "none", "auto") and not names:
            raise ValueError("tool_choice demands a call and there are no tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(
                f"tool_choice names {self.tool_choice.function.name!r}, which is not among the tools"
            )
        constrained = self.response_format is not None and self.response_format.type != "text"
        if constrained and self.tool_choice not in (None, "none", "auto"):
            raise ValueError("response_format and a demanded tool call exclude each other")
        return self

    @property
    def demanded(self) -> list[Tool]:
        """The tools of which one must be called; none if the model may choose."""
        if self.tool_choice == "required":
            return self.tools or []
        if isinstance(self.tool_choice, NamedTool):
            wanted = self.tool_choice.function.name
            return [tool for tool in self.tools or [] if tool.function.name == wanted]
        return []


class EmbeddingBody(Body):
    """POST /v1/embeddings."""

    model: Text
    input: Texts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, pydantic.Field(strict=True, ge=1), _INT] | None = None
    """Refused unless it is the size of the model's hidden states."""
    user: Text | None = None
    """Taken and not used."""

    @property
    def inputs(self) -> list[str] | list[list[int]]:
        """The texts as a list."""
        if isinstance(self.input, str):
            return [self.input]
        if isinstance(self.input[0], int):
            return [self.input]
        return self.input
