"""POST /v1/chat/completions: the assistant's next message, with tools and forms where they are asked for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from puna.core.errors import PunaError
from puna.serve import responses
from puna.serve.errors import ApiError, from_puna
from puna.serve.house import (
    SSE_END,
    EventStream,
    House,
    begun,
    collect,
    extension,
    new_id,
    now,
    replace_param,
    sse,
    usage,
)
from puna.serve.requests import ChatBody
from puna.serve.told import Told, chat_logprobs
from puna.serve.tools import CallFinder, described, plain_messages, schema_of_a_call, template_knows_tools
from puna.text.encode import encode_prompt

if TYPE_CHECKING:
    from puna.decode.sampling import Sampling
    from puna.decode.strategy import Strategy
    from puna.serve.catalog import Served
    from puna.serve.desk import Answers


def chat_router(house: House) -> APIRouter:
    """The endpoint over the models of ``house``."""
    router = APIRouter(tags=["chat"])

    @router.post(
        "/v1/chat/completions",
        response_model=responses.ChatAnswer,
        responses={200: {"content": {"text/event-stream": {}}}},
    )
    async def chat(body: ChatBody, request: Request) -> Response:
        served = house.catalog.find(body.model)
        order = await house.unless_left(request, _order(house, served, body))
        if not body.stream:
            return JSONResponse(await house.unless_left(request, _whole(house, order)))
        answers = await house.unless_left(request, _begun(house, order))
        return EventStream(_stream(order, answers), answers, house)

    return router


@dataclass(frozen=True)
class _Order:
    """A request as the engine is asked for it."""

    served: Served
    body: ChatBody
    prompt: list[int]
    sampling: Sampling
    strategy: Strategy
    id: str
    created: int

    def head(self, kind: str) -> dict[str, Any]:
        """What every answer and every chunk of it begins with."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.served.name,
            "system_fingerprint": self.served.fingerprint,
        }

    def finder(self) -> CallFinder | None:
        """Looks for calls in one answer; None where there can be none."""
        if not self.body.tools or self.body.tool_choice == "none":
            return None
        names = [tool.function.name for tool in self.body.demanded or self.body.tools]
        return CallFinder(names, demanded=bool(self.body.demanded))


async def _order(house: House, served: Served, body: ChatBody) -> _Order:
    wanted = body.max_completion_tokens or body.max_tokens or house.settings.max_tokens
    logprobs: bool | int = (body.top_logprobs or True) if body.logprobs else False
    sampling = _formed(house, body, house.sampling(body, wanted, logprobs))
    house.desk.check_room(sampling.n)
    strategy = await house.strategy(body.strategy)
    prompt = await asyncio.to_thread(_encode, house, served, body)
    return _Order(served, body, prompt, sampling, strategy, new_id("chatcmpl"), now())


def _formed(house: House, body: ChatBody, sampling: Sampling) -> Sampling:
    """The settings with what the answer's form demands."""
    changes: dict[str, Any] = {}
    wanted = body.response_format
    if body.demanded:
        changes["json_schema"] = schema_of_a_call(body.demanded)
    elif wanted is not None and wanted.type == "json_object":
        changes["json_schema"] = {"type": "object"}
    elif wanted is not None and wanted.json_schema is not None:
        changes["json_schema"] = wanted.json_schema.schema_ or {}
    elif wanted is not None and wanted.regex is not None:
        changes["regex"] = wanted.regex
    param = _form_param(body)
    for value in changes.values():
        house.check_grammar(value, param)
    try:
        return replace(sampling, **changes)
    except PunaError as error:
        raise from_puna(error, param=param) from None


def _form_param(body: ChatBody) -> str:
    """The parameter that demands a form of the answer."""
    return "tools" if body.demanded else "response_format"


def _encode(house: House, served: Served, body: ChatBody) -> list[int]:
    """Token ids of the conversation, up to where the assistant is to answer."""
    engine = served.engine
    template = engine.model.template
    if template is None:
        raise ApiError(
            400,
            f"the model {served.name!r} has no chat template; use /v1/completions",
            param="model",
            code="no_chat_template",
        )
    tools = [] if body.tool_choice == "none" else body.tools or []
    if tools:
        house.check_grammar([described(tool) for tool in tools], "tools")
    served.check_length("".join(message.text for message in body.messages), "messages")
    by_template = bool(tools) and template_knows_tools(template)
    messages = plain_messages(body.messages, tools, told_by_template=by_template)
    try:
        return encode_prompt(
            engine.tokenizer,
            template,
            messages,
            tools=[described(tool) for tool in tools] if by_template else None,
        )
    except PunaError as error:
        raise from_puna(error, param="messages") from None


async def _begin(house: House, order: _Order) -> Answers:
    try:
        return await house.desk.take(order.served, [order.prompt], order.sampling, [order.strategy])
    except ApiError as error:
        # The engine alone knows whether a schema or expression can be followed.
        if order.sampling.constrained and error.code == "invalid_value":
            raise replace_param(error, _form_param(order.body)) from None
        raise


async def _begun(house: House, order: _Order) -> Answers:
    return await begun(await _begin(house, order))


async def _whole(house: House, order: _Order) -> dict[str, Any]:
    answers = await _begin(house, order)
    try:
        told = await collect(answers, order.served)
    finally:
        answers.close()
    choices = []
    for place, one in enumerate(told):
        text, calls = one.text, []
        finder = order.finder()
        if finder is not None:
            text = finder.push(text) + finder.finish()
            calls = finder.calls
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message["content"] = text if text.strip() else None
            message["tool_calls"] = calls
        choices.append(
            {
                "index": place,
                "message": message,
                "finish_reason": "tool_calls" if calls else one.finish_reason,
                "logprobs": _logprobs(order, one, 0),
                "puna": extension(order.strategy, order.sampling, one, trace=order.body.trace),
            }
        )
    head = order.head("chat.completion")
    return {**head, "choices": choices, "usage": usage([order.prompt], told, answers)}


async def _stream(order: _Order, answers: Answers) -> AsyncGenerator[bytes, None]:
    head = order.head("chat.completion.chunk")
    with_usage = order.body.stream_options is not None and order.body.stream_options.include_usage
    none = {"usage": None} if with_usage else {}

    def chunk(choice: dict[str, Any]) -> bytes:
        return sse({**head, "choices": [choice], **none})

    told = [Told(order.served.engine.tokenizer) for _ in range(answers.count)]
    finders = [order.finder() for _ in told]
    for place in range(answers.count):
        delta = {"role": "assistant", "content": "", "refusal": None}
        yield chunk({"index": place, "delta": delta, "logprobs": None, "finish_reason": None})
    while found := await answers.news():
        for place, event in found:
            one, known = told[place], len(told[place].ids)
            one.take(event)
            delta, reason = _delta(event.text, one, finders[place])
            choice: dict[str, Any] = {
                "index": place,
                "delta": delta,
                "logprobs": _logprobs(order, one, known),
                "finish_reason": reason,
            }
            if reason is not None:
                choice["puna"] = extension(order.strategy, order.sampling, one, trace=False)
            if order.body.trace:
                choice["puna"] = {**choice.get("puna", {}), "trace": one.trace(known)}
            yield chunk(choice)
    if with_usage:
        yield sse({**head, "choices": [], "usage": usage([order.prompt], told, answers)})
    yield SSE_END


def _delta(text: str, told: Told, finder: CallFinder | None) -> tuple[dict[str, Any], str | None]:
    """What a chunk adds to a message, and why the message ends, if it does."""
    reason = told.finish_reason
    if finder is None:
        return ({"content": text} if text else {}), reason
    known = len(finder.calls)
    text = finder.push(text) + (finder.finish() if reason is not None else "")
    delta: dict[str, Any] = {"content": text} if text else {}
    if finder.calls[known:]:
        delta["tool_calls"] = [
            {"index": place, **call} for place, call in enumerate(finder.calls[known:], start=known)
        ]
    return delta, "tool_calls" if reason is not None and finder.calls else reason


def _logprobs(order: _Order, told: Told, known: int) -> dict[str, Any] | None:
    if not order.body.logprobs:
        return None
    top = told.top[known:] if order.body.top_logprobs else []
    return chat_logprobs(order.served.texts, told.ids[known:], told.logprobs[known:], top)
