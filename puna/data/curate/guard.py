"""Poisoned documents fail alone: a step that fails or takes too long is tried again on halves of its batch.

Two kinds of misbehaviour are told apart. What raises, or hangs where Python still hears a signal (its own
loops, ``re``, numpy between calls), is ended by a timer in this process. What kills or blocks the process
is noticed by whoever started it, who starts another and passes on the range of documents that was being
worked on; that range is then cut in halves until one document is left, which is not tried again.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from puna.core.errors import PunaError
from puna.data.curate.operator import BadDocument

Result = TypeVar("Result")
_SHORTEST = 1.0  # seconds; no part of a batch gets less


class StepTimeout(Exception):  # noqa: N818  (an event more than an error: what took too long is tried in parts)
    """A step took longer than it may."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise :class:`StepTimeout` in the block after ``seconds`` of processor time.

    Processor time, so that a busy machine fails nothing; what waits without working is left to whoever
    started this process. Without effect outside the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: object) -> None:
        raise StepTimeout

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@dataclass(frozen=True)
class Range:
    """Documents ``first`` to ``last`` of a shard, both included, at the step ``label``."""

    label: str
    first: int
    last: int


@dataclass
class Guard:
    """How long a step may take over a batch, what is known to be deadly, and who is told what is next."""

    seconds: float = 120.0
    deadly: frozenset[Range] = frozenset()
    tell: Callable[[Range | None, float], None] = field(default=lambda work, seconds: None)
    """Hears what is worked on next and for how many seconds it may be; None: nothing that has a bound."""

    def run(
        self, label: str, rows: Sequence[int], work: Callable[[int, int], Result]
    ) -> tuple[list[tuple[int, int, Result]], dict[int, str]]:
        """``work(start, stop)`` over the documents at ``rows`` of a shard, in as few parts as it takes.

        Returns the parts that went well, in order, and why documents failed, by place in ``rows``.
        A :class:`PunaError` is not a document's fault and is passed on.
        """
        return _Run(self, label, rows, work).all()


@dataclass
class _Run(Generic[Result]):
    guard: Guard
    label: str
    rows: Sequence[int]
    work: Callable[[int, int], Result]
    parts: list[tuple[int, int, Result]] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)

    def all(self) -> tuple[list[tuple[int, int, Result]], dict[int, str]]:
        if len(self.rows):
            self._part(0, len(self.rows), self.guard.seconds)
        return self.parts, self.failed

    def _part(self, start: int, stop: int, seconds: float) -> None:
        range_ = Range(self.label, int(self.rows[start]), int(self.rows[stop - 1]))
        if range_ in self.guard.deadly:
            self._halve(start, stop, seconds, "the process died or hung")
            return
        self.guard.tell(range_, seconds)
        try:
            with time_limit(seconds):
                made = self.work(start, stop)
        except PunaError:
            raise
        except BadDocument as error:
            self._halve(start, stop, seconds, str(error))
        except StepTimeout:
            self._halve(start, stop, seconds, f"took more than {seconds:g} s of processor time")
        except Exception as error:
            self._halve(start, stop, seconds, f"{type(error).__name__}: {error}"[:300])
        else:
            self.parts.append((start, stop, made))

    def _halve(self, start: int, stop: int, seconds: float, reason: str) -> None:
        if stop - start == 1:
            self.failed[start] = reason
            return
        middle = (start + stop) // 2
        part = max(seconds / 2, min(seconds, _SHORTEST))
        self._part(start, middle, part)
        self._part(middle, stop, part)
