"""What a caller holds of a request: events as they come, and the completions at the end."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from puna.decode.trace import TraceRow

if TYPE_CHECKING:
    from puna.decode.engine import Engine

FinishReason = Literal["stop", "length", "cancelled", "error"]
Alternatives = list[tuple[int, float]]
"""Likeliest tokens and their log probabilities, falling."""


@dataclass(frozen=True)
class Completion:
    """What was generated for one prompt.

    ``ids`` are all produced tokens, the stop token included; ``text`` is without stop token and cut
    before a stop string. ``logprobs`` (natural logarithms, one per id) and ``top_logprobs`` only if
    they were asked for. ``lossless`` says whether the strategy keeps the target's own law. Of the
    prompt, ``cached_tokens`` were taken over from earlier texts.
    """

    text: str
    ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    logprobs: list[float] | None = None
    top_logprobs: list[Alternatives] | None = None
    strategy: str = "plain"
    lossless: bool = True
    trace: list[TraceRow] = field(default_factory=list, repr=False)
    cached_tokens: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Event:
    """What a step added to one of a request's texts; ``finish_reason`` only in the last event of each.

    "error" is the last event of a request that failed: ``Ticket.error`` says why.
    """

    text: str
    ids: list[int]
    logprobs: list[float] | None
    top_logprobs: list[Alternatives] | None
    trace: list[TraceRow]
    finish_reason: FinishReason | None
    choice: int = 0


class Ticket:
    """A request that was submitted. Its texts are told apart by ``choice``, 0 to n - 1."""

    def __init__(self, engine: Engine, choices: int, on_event: Callable[[Event], None] | None) -> None:
        self.error: Exception | None = None
        self.cancelled = False
        self._engine = engine
        self._on_event = on_event
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._completions: list[Completion | None] = [None] * choices
        self._left = choices
        self._done = False

    @property
    def done(self) -> bool:
        """Whether every text has ended, or the request has failed."""
        return self._done

    @property
    def completions(self) -> list[Completion]:
        """Every text; raises what made the request fail, if something did."""
        if self.error is not None:
            raise self.error
        if not self._done:
            raise RuntimeError("the request has not ended yet")
        return [found for found in self._completions if found is not None]

    @property
    def completion(self) -> Completion:
        """The first text."""
        return self.completions[0]

    def cancel(self) -> None:
        """End the request, from any thread; its cache is freed at once, or after the step that runs."""
        self.cancelled = True
        self._engine.tend()

    def events(self) -> Iterator[Event]:
        """Events as they come, to the last one; without a background thread this runs the engine.

        Raises what made the request fail. Leaving the iteration early does not cancel.
        """
        while True:
            try:
                event = self._events.get(block=self._engine.threaded, timeout=0.2)
            except queue.Empty:
                if not self._engine.threaded:
                    self._engine.step()
                continue
            if event is None:
                if self.error is not None:
                    raise self.error
                return
            yield event

    # ---- the engine's side -----------------------------------------------------------------------

    def put(self, event: Event) -> None:
        """Hand an event on. What a callback raises ends the request."""
        if self._on_event is None:
            self._events.put(event)
            return
        try:
            self._on_event(event)
        except Exception as error:
            self.error, self.cancelled = error, True

    def finish(self, choice: int, completion: Completion, last: Event) -> None:
        """Note that a text has ended, with its last event."""
        self._completions[choice] = completion
        self._left -= 1
        if not self._left:
            self._done = True
        self.put(last)
        if self._done:
            self._events.put(None)

    def fail(self, error: Exception) -> None:
        """Note that the request cannot go on."""
        if not self._done:
            self.error = error
            self._done = True
            if self._on_event is not None:
                self.put(Event("", [], None, None, [], "error"))
            self._events.put(None)
