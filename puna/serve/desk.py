"""Where requests are taken on: how many at once, how long they may wait, and what becomes of them.

The engines run in threads of their own. Their events come over here, into the server's event loop, and
wait for whoever reads them; a slow reader finds several at once. What waits is bounded, for an
answer is: by its tokens.
"""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from puna.core import seeds
from puna.core.errors import PunaError
from puna.serve.errors import ApiError, from_puna

if TYPE_CHECKING:
    from puna.decode.sampling import Sampling
    from puna.decode.strategy import Strategy
    from puna.decode.ticket import Event, Ticket
    from puna.serve.catalog import Served
    from puna.serve.metrics import Metrics
    from puna.serve.settings import ServerSettings

_REMEMBERED = 64  # answers by whose time Retry-After is told


class Desk:
    """Takes requests on as long as there is room, and counts."""

    def __init__(self, settings: ServerSettings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.open = 0
        self._numbers = 0
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)

    def seed(self, given: int | None) -> int:
        """The seed of a request: its own, or one derived from the server's and the request's number."""
        self._numbers += 1
        return seeds.derive(self.settings.seed, "request", self._numbers) if given is None else given

    def check_room(self, answers: int) -> None:
        """Raise 429 if so many more answers find no room."""
        if answers > self.settings.max_answers:
            raise ApiError(
                400,
                f"{answers} answers in one request; this server makes at most {self.settings.max_answers}",
                param="n",
                code="too_many_answers",
            )
        if self.open + answers > self.settings.max_queue:
            self.metrics.refused.labels("queue").inc()
            raise ApiError(
                429,
                "the server is busy: its queue is full",
                code="queue_full",
                retry_after=self.retry_after,
            )

    @property
    def retry_after(self) -> int:
        """Seconds after which room is likely: as long as an answer took lately."""
        usual = statistics.median(self._seconds) if self._seconds else 1.0
        return max(1, min(60, math.ceil(usual)))

    async def take(
        self,
        served: Served,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        strategies: Sequence[Strategy],
    ) -> Answers:
        """Submit prompts, each with its strategy; raises where there is no room or the engine refuses one."""
        self.check_room(len(prompts) * sampling.n)
        answers = Answers(self, served, len(prompts), sampling.n)
        self.metrics.prompt_tokens.labels(served.name).inc(sum(map(len, prompts)))
        try:
            # Making a law out of a schema takes time; other requests go on meanwhile.
            await asyncio.to_thread(answers.submit, prompts, sampling, strategies)
        except PunaError as error:
            answers.close()
            raise from_puna(error) from None
        except BaseException:
            answers.close()
            raise
        return answers

    def note(self, seconds: float) -> None:
        """An answer took so long."""
        self._seconds.append(seconds)


class Answers:
    """The answers to one request: ``prompts`` times ``n`` texts that grow, told apart by their place."""

    def __init__(self, desk: Desk, served: Served, prompts: int, n: int) -> None:
        self.served = served
        self.count = prompts * n
        self.tickets: list[Ticket] = []
        self._desk = desk
        self._n = n
        self._start = time.monotonic()
        self._begun = False
        self._left = self.count
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self._news: deque[tuple[int, Event]] = deque()
        self._woken = asyncio.Event()
        desk.open += self.count

    def submit(
        self, prompts: Sequence[list[int]], sampling: Sampling, strategies: Sequence[Strategy]
    ) -> None:
        """Hand the prompts to the engine; in a thread."""
        for number, (prompt, strategy) in enumerate(zip(prompts, strategies, strict=True)):

            def take(event: Event, first: int = number * self._n) -> None:
                self._news.append((first + event.choice, event))
                self._wake()

            ticket = self.served.engine.submit(prompt, sampling, strategy, on_event=take)
            self.tickets.append(ticket)
            if self._closed:
                ticket.cancel()

    def _wake(self) -> None:
        """Called by the engine's thread."""
        if not self._closed:
            self._loop.call_soon_threadsafe(self._woken.set)

    async def news(self) -> list[tuple[int, Event]]:
        """What has come since the last time, by place; nothing once every answer has ended.

        Raises what made an answer fail, and 429 or 504 where one waits or runs for too long.
        """
        await self._wait()
        found = [self._news.popleft() for _ in range(len(self._news))]  # the engine may add meanwhile
        if found:
            self._count(found)
        return found

    async def begin(self) -> None:
        """Wait for the first news, so that what goes wrong before it still has a status of its own."""
        await self._wait()
        if self._news and self._news[0][1].finish_reason == "error":
            self._raise_failure()

    async def _wait(self) -> None:
        """Until there is news or nothing more to come."""
        while not self._news and self._left:
            self._woken.clear()
            if self._news:
                break
            settings = self._desk.settings
            limit = settings.request_seconds if self._begun else settings.queue_seconds
            try:
                async with asyncio.timeout(max(0.0, self._start + limit - time.monotonic())):
                    await self._woken.wait()
            except TimeoutError:
                raise self._late() from None

    def cached_tokens(self) -> list[int]:
        """Of each prompt that has its answer: tokens that earlier texts had read already."""
        return [
            ticket.completion.cached_tokens for ticket in self.tickets if ticket.done and not ticket.error
        ]

    def close(self) -> None:
        """Whoever asked has left or has everything: what still runs is cancelled, and there is room again."""
        if self._closed:
            return
        self._closed = True
        for ticket in self.tickets:
            if not ticket.done:
                ticket.cancel()
        self._desk.open -= self._left
        self._left = 0

    def _raise_failure(self) -> None:
        """The engine gave up on one of the texts."""
        for ticket in self.tickets:
            if isinstance(ticket.error, PunaError):
                raise from_puna(ticket.error)
            if ticket.error is not None:
                raise ticket.error

    def _late(self) -> ApiError:
        if self._begun:
            self._desk.metrics.refused.labels("time").inc()
            seconds = self._desk.settings.request_seconds
            return ApiError(504, f"the answer took longer than {seconds:g} s", code="timeout")
        self._desk.metrics.refused.labels("wait").inc()
        return ApiError(
            429,
            f"no token within {self._desk.settings.queue_seconds:g} s: the server is busy",
            code="queue_timeout",
            retry_after=self._desk.retry_after,
        )

    def _count(self, found: Sequence[tuple[int, Event]]) -> None:
        seconds = time.monotonic() - self._start
        metrics, model = self._desk.metrics, self.served.name
        if not self._begun:
            self._begun = True
            metrics.first_token.labels(model).observe(seconds)
        for _, event in found:
            if event.finish_reason == "error":
                self._raise_failure()
            metrics.answer_tokens.labels(model).inc(len(event.ids))
            if event.finish_reason is not None:
                self._left -= 1
                self._desk.open -= 1
                self._desk.note(seconds)
                metrics.whole.labels(model).observe(seconds)
                metrics.answers.labels(model, event.finish_reason).inc()
