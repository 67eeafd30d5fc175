"""Lanes: one model's reading of one text, as methods see it.

A method asks for tokens to be read by yielding :class:`Forward`; the engine answers with a
:class:`Result` once a step, or several, have read them. In between a lane may lose what it has
stored (its request was preempted): it knows its tokens and how each was read, so that reading them
again gives the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from puna.model.rope import depends_on_length
from puna.model.stepper import FeedForwardSkip, Read, Stepper

if TYPE_CHECKING:
    from torch import Tensor

    from puna.model.early_exit import EarlyExit
    from puna.model.paged import PagedSequence

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Forward:
    """Tokens that follow what ``lane`` has read; of the last ``outputs`` the hidden states are wanted."""

    lane: Lane
    ids: tuple[int, ...]
    outputs: int = 1
    skip: FeedForwardSkip | None = None
    exits: EarlyExit | None = None


Steps: TypeAlias = Generator["Forward | tuple[Forward, ...]", Any, T]
"""A generator that yields a forward and is sent its result, or several and is sent a list of results."""


class Result:
    """What reading gave: ``hidden`` [outputs, hidden] after the final norm, and logits when asked for.

    ``skipped`` counts feed-forwards that were left out, ``depth`` the layers below the outputs. Results
    of one step make their logits together, the first time one of them is asked.
    """

    __slots__ = ("_logits", "_place", "depth", "hidden", "skipped")

    def __init__(
        self, hidden: Tensor, logits: StepLogits, place: int, *, skipped: int = 0, depth: int = 0
    ) -> None:
        self.hidden = hidden
        self.skipped = skipped
        self.depth = depth
        self._logits = logits
        self._place = place

    @property
    def logits(self) -> Tensor:
        """Float32 logits [outputs, vocab]."""
        return self._logits.of(self._place)


class StepLogits:
    """Logits of all that a step gave, made in one product when the first of them is looked at.

    ``ready`` are those that are made already.
    """

    __slots__ = ("_hidden", "_parts", "_stepper")

    def __init__(
        self, stepper: Stepper, hidden: Sequence[Tensor], ready: Sequence[Tensor | None] | None = None
    ) -> None:
        self._stepper = stepper
        self._hidden = hidden
        self._parts: list[Tensor | None] = list(ready) if ready else [None] * len(hidden)

    def of(self, place: int) -> Tensor:
        """Logits of the hidden states at ``place``."""
        found = self._parts[place]
        if found is not None:
            return found
        missing = [index for index, part in enumerate(self._parts) if part is None]
        if len(missing) == 1:
            self._parts[place] = made = self._stepper.logits(self._hidden[place])
            return made
        import torch

        logits = self._stepper.logits(torch.cat([self._hidden[index] for index in missing]))
        for index, part in zip(
            missing, torch.split(logits, [len(self._hidden[index]) for index in missing]), strict=True
        ):
            self._parts[index] = part
        return self.of(place)


@dataclass(slots=True)
class _Mark:
    """How the tokens before ``end`` (and after the mark before) were read."""

    end: int
    extent: int
    skip: FeedForwardSkip | None


class Lane:
    """A text in one model: the tokens given to it, and what is stored of them.

    ``ids`` are the tokens read. ``sequence`` may hold fewer of them after a preemption or a deep
    crop; the engine reads them again before it reads on. ``adopt`` is told of each fork. ``weight``
    is what reading a token costs, in tokens of the target.
    """

    __slots__ = ("_adopt", "_by_length", "_exits", "_marks", "ids", "sequence", "stepper", "weight")

    def __init__(
        self,
        stepper: Stepper,
        sequence: PagedSequence | None = None,
        ids: Sequence[int] = (),
        adopt: Callable[[Lane], None] | None = None,
        weight: float = 1.0,
    ) -> None:
        self.stepper = stepper
        self.sequence = stepper.sequence() if sequence is None else sequence
        self.ids = list(ids)
        self.weight = weight
        self._adopt = adopt
        self._by_length = any(depends_on_length(b.rope) for b in stepper.spec.blocks if b.attention == "full")
        self._marks: list[_Mark] = []  # only if reading differs from token to token
        self._exits: EarlyExit | None = None  # of the last token; those before are read as if without

    def read(
        self,
        ids: Sequence[int],
        outputs: int = 1,
        skip: FeedForwardSkip | None = None,
        exits: EarlyExit | None = None,
    ) -> Steps[Result]:
        """``result = yield from lane.read(ids)``: read ``ids`` behind what was read before.

        Of the last ``outputs`` of them, at most all, the result has hidden states and logits. With
        ``exits`` a single token is read, which may leave early.
        """
        if not 0 <= outputs <= len(ids) or not ids or (exits is not None and len(ids) > 1):
            raise ValueError(f"{outputs} outputs of {len(ids)} tokens{' with exits' if exits else ''}")
        result: Result = yield Forward(self, tuple(ids), outputs, skip, exits)
        return result

    def catch_up(self, ids: Sequence[int], outputs: int = 1) -> Steps[Result]:
        """Read what ``ids`` has beyond its longest common beginning with what was read; the rest is cropped.

        At least the last ``outputs`` tokens, and the very last, are read, also if they were read before.
        """
        common = min(_common(self.ids, ids), len(ids) - max(outputs, 1))
        self.crop(common)
        return (yield from self.read(ids[common:], outputs))

    def crop(self, length: int) -> None:
        """Forget every token after the first ``length``."""
        if length >= len(self.ids):
            return
        del self.ids[length:]
        for mark in self._marks:
            mark.end = min(mark.end, length)
        if length < self.sequence.length:
            if self.sequence.can_crop(length):
                self.sequence.crop(length)
            else:
                self.sequence.free()  # a window has moved past what it would need: read again

    def fork(self) -> Lane:
        """Another lane that has read the same; what is stored is shared."""
        other = Lane(self.stepper, self.sequence.fork(), self.ids, self._adopt, self.weight)
        other._marks = [_Mark(mark.end, mark.extent, mark.skip) for mark in self._marks]
        if self._adopt is not None:
            self._adopt(other)
        return other

    def free(self) -> None:
        """Forget everything."""
        self.ids.clear()
        self._marks.clear()
        self.sequence.free()

    # ---- the engine's side -----------------------------------------------------------------------

    @property
    def pending(self) -> int:
        """Tokens that are still to be stored."""
        return len(self.ids) - self.sequence.length

    def find_shared(self, first_output: int) -> None:
        """If nothing is stored, take over what earlier texts share with this one, up to ``first_output``."""
        if self.sequence.length == 0 and not self._marks and not any(self.sequence.tables):
            self.sequence = self.stepper.pool.match(self.ids[: first_output + 1])

    def share(self) -> None:
        """Let later texts find what is stored, if it depends on the tokens alone."""
        if not self._marks:
            self.stepper.pool.remember(self.sequence, self.ids)

    def extend(self, forward: Forward) -> None:
        """Take a forward's tokens on; they are stored by the reads that :meth:`next_read` gives."""
        self.ids.extend(forward.ids)
        self._exits = forward.exits
        if self._by_length or self._marks or forward.skip is not None:
            start = len(self.ids) - len(forward.ids)
            if not self._marks and start:
                self._marks.append(_Mark(start, start, None))
            self._marks.append(_Mark(len(self.ids), len(self.ids), forward.skip))

    def next_read(self, tokens: int, first_output: int) -> Read:
        """The next ``tokens`` that are to be stored, or fewer where reading changes.

        Outputs are asked for from position ``first_output`` on.
        """
        start = self.sequence.length
        end = min(start + tokens, len(self.ids))
        extent, skip, exits = None, None, None
        if self._exits is not None:
            # What was read before and lost is read again in full: the keys are the same.
            before = len(self.ids) - 1
            exits, end = (self._exits, end) if start == before else (None, min(end, before))
        if self._marks:
            mark = next(mark for mark in self._marks if mark.end > start)
            end, extent, skip = min(end, mark.end), mark.extent, mark.skip
        outputs = max(0, end - max(start, first_output))
        return Read(self.sequence, self.ids[start:end], outputs, skip, extent, exits)


def together(*branches: Steps[T]) -> Steps[list[T]]:
    """Run several generators side by side: what they ask for in a round is read in the same steps."""
    answers: dict[int, T] = {}
    asked: dict[int, Forward | tuple[Forward, ...]] = {}

    def resume(place: int, answer: Any) -> None:
        try:
            asked[place] = branches[place].send(answer)
        except StopIteration as stop:
            asked.pop(place, None)
            answers[place] = stop.value

    for place in range(len(branches)):
        resume(place, None)
    while asked:
        counts = {place: 1 if isinstance(ask, Forward) else len(ask) for place, ask in asked.items()}
        forwards = [
            forward for ask in asked.values() for forward in ((ask,) if isinstance(ask, Forward) else ask)
        ]
        results = iter((yield tuple(forwards)))
        answered = {place: list(itertools.islice(results, count)) for place, count in counts.items()}
        for place, found in answered.items():
            resume(place, found[0] if isinstance(asked[place], Forward) else found)
    return [answers[place] for place in range(len(branches))]


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    shorter = min(len(left), len(right))
    if list(left[:shorter]) == list(right[:shorter]):
        return shorter
    return next(place for place in range(shorter) if left[place] != right[place])
