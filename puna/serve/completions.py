"""POST /v1/completions: texts that go on from prompts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from puna.core.errors import PunaError
from puna.decode.reading import ScoredPrompt
from puna.serve import responses
from puna.serve.errors import ApiError, from_puna
from puna.serve.house import SSE_END, EventStream, House, begun, collect, extension, new_id, now, sse, usage
from puna.serve.requests import CompletionBody
from puna.serve.told import Told, completion_logprobs

if TYPE_CHECKING:
    from puna.decode.sampling import Sampling
    from puna.decode.strategy import Strategy
    from puna.serve.catalog import Served
    from puna.serve.desk import Answers

_USUAL_TOKENS = 16  # OpenAI's


def completions_router(house: House) -> APIRouter:
    """The endpoint over the models of ``house``."""
    router = APIRouter(tags=["completions"])

    @router.post(
        "/v1/completions",
        response_model=responses.CompletionAnswer,
        responses={200: {"content": {"text/event-stream": {}}}},
    )
    async def completions(body: CompletionBody, request: Request) -> Response:
        served = house.catalog.find(body.model)
        order = await house.unless_left(request, _order(house, served, body))
        if not body.stream:
            return JSONResponse(await house.unless_left(request, _whole(house, order)))
        answers = await house.unless_left(request, _begun(house, order))
        return EventStream(_stream(order, answers), answers, house)

    return router


@dataclass(frozen=True)
class _Order:
    """A request as the engine is asked for it. ``strategies``: one for each prompt."""

    served: Served
    body: CompletionBody
    prompts: list[list[int]]
    sampling: Sampling
    strategies: Sequence[Strategy]
    id: str
    created: int

    @property
    def told(self) -> bool:
        """Whether tokens are wanted that were made; with ``max_tokens`` 0 the one that was is not."""
        return self.body.max_tokens != 0

    def head(self) -> dict[str, Any]:
        """What every answer and every chunk of it begins with."""
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.served.name,
            "system_fingerprint": self.served.fingerprint,
        }


async def _order(house: House, served: Served, body: CompletionBody) -> _Order:
    usual = min(_USUAL_TOKENS, house.settings.max_tokens)
    wanted = usual if body.max_tokens is None else body.max_tokens
    logprobs: bool | int = False if body.logprobs is None else (body.logprobs or True)
    sampling = house.sampling(body, max(wanted, 1), logprobs)
    house.desk.check_room(len(body.prompts) * sampling.n)
    strategy = await house.strategy(body.strategy)
    for prompt in body.prompts:
        if isinstance(prompt, str):
            served.check_length(prompt, "prompt")
    try:
        prompts = [await asyncio.to_thread(served.engine.encode, prompt) for prompt in body.prompts]
    except PunaError as error:
        raise from_puna(error, param="prompt") from None
    strategies: Sequence[Strategy] = [strategy] * len(prompts)
    if body.echo and body.logprobs is not None:
        strategies = [cast("Strategy", ScoredPrompt(strategy, body.logprobs)) for _ in prompts]
    return _Order(served, body, prompts, sampling, strategies, new_id("cmpl"), now())


async def _begin(house: House, order: _Order) -> Answers:
    return await house.desk.take(order.served, order.prompts, order.sampling, order.strategies)


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
        number = place // order.sampling.n
        before = _echoed(order, number)
        if not order.told:
            one = Told(order.served.engine.tokenizer)
            one.finish_reason = "length"
        choices.append(
            {
                "index": place,
                "text": before + one.text,
                "finish_reason": one.finish_reason,
                "logprobs": _logprobs(order, number, one, 0, len(before), first=True),
                "puna": extension(order.strategies[number], order.sampling, one, trace=order.body.trace),
            }
        )
    counted = told if order.told else []
    return {**order.head(), "choices": choices, "usage": usage(order.prompts, counted, answers)}


async def _stream(order: _Order, answers: Answers) -> AsyncGenerator[bytes, None]:
    told = [Told(order.served.engine.tokenizer) for _ in range(answers.count)]
    with_usage = order.body.stream_options is not None and order.body.stream_options.include_usage
    none = {"usage": None} if with_usage else {}
    begun: set[int] = set()
    offsets = [0] * answers.count
    while found := await answers.news():
        for place, event in found:
            one, number, known = told[place], place // order.sampling.n, len(told[place].ids)
            one.take(event)
            first = place not in begun
            begun.add(place)
            before = _echoed(order, number) if first else ""
            text = before + (event.text if order.told else "")
            choice: dict[str, Any] = {
                "index": place,
                "text": text,
                "finish_reason": one.finish_reason,
                "logprobs": _logprobs(order, number, one, known, offsets[place] + len(before), first=first),
            }
            offsets[place] += len(text)
            if one.finish_reason is not None:
                choice["puna"] = extension(order.strategies[number], order.sampling, one, trace=False)
            if order.body.trace and order.told:
                choice["puna"] = {**choice.get("puna", {}), "trace": one.trace(known)}
            yield sse({**order.head(), "choices": [choice], **none})
    if with_usage:
        counted = told if order.told else []
        yield sse({**order.head(), "choices": [], "usage": usage(order.prompts, counted, answers)})
    yield SSE_END


def _echoed(order: _Order, number: int) -> str:
    """The prompt's text, where it is to stand before the answer's."""
    if not order.body.echo:
        return ""
    prompt = order.body.prompts[number]
    return prompt if isinstance(prompt, str) else order.served.engine.tokenizer.decode(prompt)


def _logprobs(
    order: _Order, number: int, told: Told, known: int, offset: int, *, first: bool
) -> dict[str, Any] | None:
    """Log-probabilities of the tokens from ``known`` on, with ``first`` those of an echoed prompt before."""
    if order.body.logprobs is None:
        return None
    ids: list[int] = []
    values: list[float | None] = []
    top: list[Any] = []
    strategy = order.strategies[number]
    if first and isinstance(strategy, ScoredPrompt):
        ids, values, top = list(order.prompts[number]), list(strategy.logprobs), list(strategy.top)
        offset = 0
        if len(values) != len(ids):
            raise ApiError(500, "the prompt was not scored", code="internal_error")
    if order.told:
        ids += told.ids[known:]
        values += told.logprobs[known:]
        top += told.top[known:] if told.top else [[] for _ in told.ids[known:]]
    return completion_logprobs(order.served.texts, ids, values, top, offset)
