"""A request on its way, as a decoding method sees it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from puna.core.errors import PunaError
from puna.decode.lane import Forward, Lane
from puna.decode.pieces import TextPieces
from puna.decode.sampling import Law, Sampling, entropy_bits, make_law, penalised
from puna.decode.strategy import Strategy
from puna.decode.ticket import Alternatives, Completion, Event, FinishReason
from puna.decode.trace import TraceRow

if TYPE_CHECKING:
    from torch import Tensor

    from puna.decode.grammar import Constraint
    from puna.model.llama import Llama
    from puna.model.stepper import Stepper

TARGET = "target"
"""The name of the engine's own model among its models."""


@dataclass(frozen=True)
class Loaded:
    """A model of the engine; ``weight`` is its number of parameters over the target's."""

    model: Llama
    stepper: Stepper
    weight: float


class Running:
    """What a method is given: prompt, settings, lanes, and where to put its tokens.

    ``lane`` is the target's; it may hold a beginning of the prompt. ``ids`` are the tokens produced
    so far, ``random`` is the generator that every draw comes from. ``asked`` is the prompt as it was
    given: a text, ids, or messages.
    """

    def __init__(
        self,
        prompt: list[int],
        sampling: Sampling,
        strategy: Strategy,
        limit: int,
        *,
        index: int,
        choice: int,
        models: Mapping[str, Loaded],
        asked: str | Sequence[int] | Sequence[Mapping[str, Any]],
        constraint: Constraint | None = None,
    ) -> None:
        self.prompt = prompt
        self.asked = asked
        self.sampling = sampling
        self.strategy = strategy
        self.choice = choice
        self.random: torch.Generator = sampling.generator(index, choice)
        self.ids: list[int] = []
        self.trace: list[TraceRow] = []
        self.finish_reason: FinishReason | None = None
        self.cached_tokens = 0
        self.lanes: list[Lane] = []
        self._models = models
        self._constraint = constraint
        self._limit = limit
        tokenizer: Any = models[TARGET].model.tokenizer
        self.tokenizer = tokenizer
        stops = () if sampling.ignore_eos else tokenizer.stop_ids
        self._stop_ids = frozenset((*stops, *sampling.stop_ids))
        self._pieces = TextPieces(tokenizer.decode, sampling.stop)
        self._text: list[str] = []
        self._logprobs: list[float] = []
        self._alternatives: list[Alternatives] = []
        self._told = 0  # tokens that events have told of
        self._new_text = ""
        self._spent = 0.0

    # ---- the method's side -----------------------------------------------------------------------

    @property
    def lane(self) -> Lane:
        """The target's lane."""
        return self.lanes[0]

    @property
    def finished(self) -> bool:
        """Whether the text has ended."""
        return self.finish_reason is not None

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end the text."""
        return self._stop_ids

    @property
    def remaining(self) -> int:
        """Tokens that may still be produced."""
        return self._limit - len(self.ids)

    def model(self, name: str) -> Llama:
        """A model of the engine, "target" or a name from ``Engine(models=...)``."""
        return self._found(name).model

    def open_lane(self, name: str) -> Lane:
        """A fresh lane of a model of the engine; it is freed when the request ends."""
        loaded = self._found(name)
        lane = Lane(loaded.stepper, adopt=self.lanes.append, weight=loaded.weight)
        self.lanes.append(lane)
        return lane

    def _found(self, name: str) -> Loaded:
        if name not in self._models:
            raise PunaError(
                f"unknown model of the engine {name!r}",
                where=f"strategy {self.strategy.name!r}",
                expected=f"one of {', '.join(sorted(self._models))}",
                fix=f"give it one of that name: --companion {name}=MODEL, or Engine(models=...)",
            )
        return self._models[name]

    def law(
        self, logits: Tensor, ids: Sequence[int] | None = None, *, temperature: float | None = None
    ) -> Law:
        """The law that the settings make of raw logits [vocab] behind the produced tokens ``ids``.

        None: behind what was produced so far. Target and draft get their laws alike. A ``temperature``
        stands in for that of the settings.
        """
        sampling = self.sampling
        if temperature is not None:
            sampling = replace(sampling, temperature=temperature)
        if self.sampling.penalised:
            logits = penalised(logits, self.sampling, self.prompt, self.ids if ids is None else ids)
        if self._constraint is not None:
            allowed = self._constraint.mask(self.ids if ids is None else ids)
            if allowed is not None:
                logits = logits.cpu().masked_fill(~allowed, -math.inf)
        return make_law(logits, sampling)

    def emit(self, token: int, row: TraceRow, logits: Tensor | None = None) -> bool:
        """Produce a token; returns whether the text has ended, and then nothing more is taken.

        ``logits`` [vocab] are the raw ones of the model that answers for the token; log
        probabilities and the entropy come from them.
        """
        if self.finish_reason is not None:
            return True
        self.ids.append(token)
        self._note(row, logits)
        if token in self._stop_ids:
            self.finish_reason = "stop"
        else:
            self._new_text += self._pieces.push(token)
            if not self._pieces.stopped and len(self.ids) >= self._limit:
                self.finish_reason = "length"
        if self.finish_reason is not None:
            self._new_text += self._pieces.finish()
        if self._pieces.stopped:
            self.finish_reason = "stop"
        return self.finish_reason is not None

    def _note(self, row: TraceRow, logits: Tensor | None) -> None:
        """Keep the trace row, and what is told of the token's probability."""
        wanted, entropy = self.sampling.logprobs, row.entropy
        if logits is not None:
            if wanted:
                logs = logits.float().log_softmax(0)
                self._logprobs.append(float(logs[row.token]))
                if wanted is not True:
                    values, ids = logs.topk(min(wanted, len(logs)))
                    self._alternatives.append(list(zip(ids.tolist(), values.tolist(), strict=True)))
            if self.sampling.entropy and entropy is None:
                entropy = entropy_bits(logits)
        elif wanted:
            raise ValueError(f"strategy {self.strategy.name!r} emits tokens without their logits")
        cost = self._spent if row.cost is None else row.cost
        self._spent = 0.0
        self.trace.append(TraceRow(row.token, row.source, entropy, row.accepted, cost))

    # ---- the engine's side -----------------------------------------------------------------------

    def spend(self, forward: Forward) -> None:
        """Count what a forward cost; before the first token, what is read without output is the prompt."""
        tokens = len(forward.ids) if self.ids else min(len(forward.ids), forward.outputs)
        self._spent += tokens * forward.lane.weight

    def free(self) -> None:
        """Give up everything that is stored."""
        for lane in self.lanes:
            lane.sequence.free()

    def cancel(self) -> None:
        """End the text where it stands."""
        if self.finish_reason is None:
            self.finish_reason = "cancelled"
            self._new_text += self._pieces.finish()

    def end(self, reason: FinishReason = "stop") -> None:
        """End the text where it stands: the method has nothing more to say, or came to a limit of its own."""
        if self.finish_reason is None:
            self.finish_reason = reason
            self._new_text += self._pieces.finish()

    def news(self) -> Event | None:
        """What came since the last event; None if nothing did."""
        if self._told == len(self.ids) and not self._new_text and not self.finished:
            return None
        new = slice(self._told, len(self.ids))
        self._told = len(self.ids)
        text, self._new_text = self._new_text, ""
        self._text.append(text)
        counted = isinstance(self.sampling.logprobs, bool)
        return Event(
            text=text,
            ids=self.ids[new],
            logprobs=self._logprobs[new] if self.sampling.logprobs else None,
            top_logprobs=None if counted or not self.sampling.logprobs else self._alternatives[new],
            trace=self.trace[new],
            finish_reason=self.finish_reason,
            choice=self.choice,
        )

    def completion(self) -> Completion:
        """The text that has ended."""
        assert self.finish_reason is not None
        wanted = self.sampling.logprobs
        return Completion(
            text="".join(self._text),
            ids=self.ids,
            finish_reason=self.finish_reason,
            prompt_tokens=len(self.prompt),
            logprobs=self._logprobs if wanted else None,
            top_logprobs=self._alternatives if wanted and wanted is not True else None,
            strategy=self.strategy.name,
            lossless=self.strategy.lossless,
            trace=self.trace,
            cached_tokens=self.cached_tokens,
        )
