"""What every endpoint works with, and the ways that all kinds of answers share."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from puna.core.errors import PunaError
from puna.decode.sampling import Sampling
from puna.decode.strategy import resolve
from puna.serve.desk import Answers, Desk
from puna.serve.errors import ApiError, as_api_error, from_puna
from puna.serve.heads import Heads
from puna.serve.metrics import Metrics
from puna.serve.passes import Passes
from puna.serve.requests import Generation, StrategyChoice
from puna.serve.told import Told

if TYPE_CHECKING:
    from puna.decode.strategy import Strategy
    from puna.serve.catalog import Catalog, Served
    from puna.serve.settings import ServerSettings

T = TypeVar("T")


@dataclass
class House:
    """The models, the bounds, the desk at which requests are taken on, and what is counted."""

    catalog: Catalog
    settings: ServerSettings
    heads: Heads = field(default_factory=lambda: Heads({}))
    """Trained heads and plans by the names under which requests may have a strategy use them."""
    metrics: Metrics = field(init=False)
    desk: Desk = field(init=False)
    passes: Passes = field(default_factory=Passes)

    def __post_init__(self) -> None:
        self.metrics = Metrics({name: served.engine for name, served in self.catalog.items()})
        self.desk = Desk(self.settings, self.metrics)

    def sampling(self, body: Generation, max_tokens: int, logprobs: bool | int) -> Sampling:
        """The engine's settings for a request; what is out of the server's bounds is refused."""
        bounds = self.settings
        if max_tokens > bounds.max_tokens:
            raise _beyond("max_tokens", max_tokens, bounds.max_tokens)
        if int(logprobs) > bounds.max_logprobs:
            raise _beyond("logprobs", int(logprobs), bounds.max_logprobs)
        if len(body.stops) > bounds.max_stops:
            raise _beyond("stop", len(body.stops), bounds.max_stops)
        try:
            return Sampling(
                max_tokens=max_tokens,
                temperature=1.0 if body.temperature is None else body.temperature,
                top_p=1.0 if body.top_p is None else body.top_p,
                top_k=max(body.top_k, 0),
                min_p=body.min_p,
                repetition_penalty=body.repetition_penalty,
                presence_penalty=body.presence_penalty or 0.0,
                frequency_penalty=body.frequency_penalty or 0.0,
                seed=self.desk.seed(body.seed),
                stop=body.stops,
                stop_ids=body.stop_token_ids,
                logprobs=logprobs,
                entropy=body.trace,
                ignore_eos=body.ignore_eos,
                n=body.choices,
            )
        except PunaError as error:
            raise from_puna(error) from None

    async def strategy(self, chosen: str | StrategyChoice | None) -> Strategy:
        """The decoding method that a request names; heads are read from their files, so in a thread."""
        try:
            if isinstance(chosen, StrategyChoice):
                settings = {**self.heads.opened(chosen.name, chosen.settings), "name": chosen.name}
                return await asyncio.to_thread(resolve, settings)
            return await asyncio.to_thread(resolve, chosen)
        except PunaError as error:
            raise replace_param(from_puna(error), "strategy") from None

    def check_grammar(self, value: object, param: str) -> None:
        """Refuse a schema, expression or list of tools that is larger than allowed."""
        size = len(value if isinstance(value, str) else json.dumps(value))
        if size > self.settings.max_grammar_bytes:
            raise _beyond(param, size, self.settings.max_grammar_bytes)

    async def unless_left(self, request: Request, work: Awaitable[T]) -> T:
        """Do the work unless the client leaves before it is done; then it is cancelled."""
        doing = asyncio.ensure_future(work)
        leaving = asyncio.ensure_future(_has_left(request.receive))
        try:
            await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if doing.done():
                return doing.result()
            self.metrics.left.inc()
            raise ApiError(499, "the client has left", code="client_left")
        finally:
            await _ended(doing, leaving)


async def begun(answers: Answers) -> Answers:
    """The answers once the first news is there; closed if something goes wrong before."""
    try:
        await answers.begin()
    except BaseException:
        answers.close()
        raise
    return answers


def _beyond(name: str, found: int, bound: int) -> ApiError:
    return ApiError(
        400, f"{name}: {found} is beyond this server's bound of {bound}", param=name, code="beyond_bound"
    )


def replace_param(error: ApiError, param: str) -> ApiError:
    """The error with the parameter at fault."""
    error.param = param
    return error


def new_id(prefix: str) -> str:
    """An id that no other answer has."""
    return f"{prefix}-{uuid.uuid4().hex}"


def now() -> int:
    """The time, as OpenAI's interface writes it."""
    return int(time.time())


async def collect(answers: Answers, served: Served) -> list[Told]:
    """Wait for all of the answers."""
    told = [Told(served.engine.tokenizer) for _ in range(answers.count)]
    while found := await answers.news():
        for place, event in found:
            told[place].take(event)
    return told


def usage(served_prompts: list[list[int]], told: list[Told], answers: Answers) -> dict[str, Any]:
    """Counts of tokens, prompts counted once whatever ``n``."""
    prompt = sum(map(len, served_prompts))
    written = sum(len(one.ids) for one in told)
    cached = sum(answers.cached_tokens())
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def extension(strategy: Strategy, sampling: Sampling, told: Told, *, trace: bool) -> dict[str, Any]:
    """puna's own field: how a choice was decoded and what it cost."""
    found = {
        "strategy": strategy.name,
        "lossless": strategy.lossless,
        "seed": sampling.seed,
        "accounting": told.accounting(),
    }
    return {**found, "trace": told.trace()} if trace else found


def sse(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


SSE_END = b"data: [DONE]\n\n"


class EventStream(Response):
    """A stream of server-sent events that ends what it reads from, however it ends itself.

    An error after the beginning, when the status has been sent, becomes an event and the last one.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], answers: Answers, house: House) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._answers = answers
        self._house = house

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end, or until the client has left."""
        sending = asyncio.ensure_future(self._send_all(send))
        leaving = asyncio.ensure_future(_has_left(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
            else:
                self._house.metrics.left.inc()
        finally:
            self._answers.close()
            await _ended(sending, leaving)
            await self._events.aclose()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for part in self._events:
                await send({"type": "http.response.body", "body": part, "more_body": True})
        except Exception as error:
            last = sse(as_api_error(error).body) + SSE_END
            await send({"type": "http.response.body", "body": last, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _has_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _ended(*tasks: asyncio.Future[Any]) -> None:
    """Cancel what still runs, and wait until it has stopped."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
