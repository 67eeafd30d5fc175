"""The decode engine: one loop that reads for every method, request and model.

A request's method is a generator that says what it wants read. In each step the engine gathers what
all running requests want, cuts long prompts into chunks, reads in one pass a model, and resumes the
methods that have their answer. What a request gets depends on its prompt, its settings and its
index among the prompts (the index picks its generator), not on its neighbours.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from puna.core.errors import PunaError
from puna.core.progress import Track
from puna.decode.batching import Batcher, Job, Statistics
from puna.decode.request import TARGET, Loaded, Running
from puna.decode.sampling import Sampling
from puna.decode.scheduler import BatchSettings
from puna.decode.strategy import Strategy, StrategySettings, resolve
from puna.decode.ticket import Completion, Event, FinishReason, Ticket
from puna.model.paged import BLOCK
from puna.model.steppers import Kernels, Quantize, make_stepper
from puna.text.encode import encode_prompt

if TYPE_CHECKING:
    from puna.decode.grammar import Constraint
    from puna.model.llama import Llama
    from puna.model.paged import CachePolicy

__all__ = ["Completion", "Engine", "Event", "FinishReason", "Message", "Prompt", "Ticket"]

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]
Chosen = str | Mapping[str, Any] | StrategySettings | Strategy | None
"""A strategy: its name, a mapping with its name and settings, settings, or the strategy; None is plain."""
_USUAL_CACHE = 32_768


class Engine:
    """Generates text with a model that has a tokenizer.

    ``max_batch_tokens`` bounds the tokens of a step, ``chunk_tokens`` those of prompts in a step in
    which texts decode, ``max_running`` the texts that run at once. ``cache_tokens`` is the room for
    the keys of all of them (default: 32768, or the model's context if that is longer), for each
    model. ``models`` are further models that strategies use, by name. ``quantize`` lays the weights
    of all models out in integers; ``kernels`` says what runs them. ``policies`` gives the target's
    layers other cache policies than the model's own. Parameters that a model has in common with the
    model of the same name in the engine ``like`` are laid out once for both. The models are put into
    evaluation mode.
    """

    def __init__(
        self,
        model: Llama,
        *,
        quantize: Quantize | None = None,
        max_batch_tokens: int = 512,
        chunk_tokens: int = 128,
        cache_tokens: int | None = None,
        max_running: int = 64,
        kernels: Kernels = "auto",
        models: Mapping[str, Llama] | None = None,
        policies: Sequence[CachePolicy] | None = None,
        like: Engine | None = None,
    ) -> None:
        if model.tokenizer is None:
            raise PunaError("the model has no tokenizer", where=model.source, fix="open it with puna.load")
        if TARGET in (models or {}):
            raise PunaError("'target' is the engine's own model", found="a further model of that name")
        self.model = model.eval()
        self.tokenizer = model.tokenizer
        self.threaded = False  # whether a thread of its own runs the steps
        tokens = cache_tokens or max(_USUAL_CACHE, model.spec.max_positions)
        self._models: dict[str, Loaded] = {}
        for name, each in {TARGET: model, **(models or {})}.items():
            stepper = make_stepper(
                each,
                quantize=quantize,
                cache_tokens=tokens,
                kernels=kernels,
                policies=policies if name == TARGET else None,
                like=like._models[name].stepper if like is not None and name in like._models else None,
            )
            weight = each.spec.parameter_count() / model.spec.parameter_count()
            self._models[name] = Loaded(each.eval(), stepper, weight)
        self._batcher = Batcher(self._models, BatchSettings(max_batch_tokens, chunk_tokens), max_running)
        self._turn = threading.Lock()  # one step at a time, whoever asks for it
        self._mail = threading.Lock()  # guards what was submitted and is not in the batcher yet
        self._submitted: list[Job] = []
        self._closed = False
        self._numbers = itertools.count()
        self.woken = threading.Event()  # set when there is something new to do

    @property
    def kernels(self) -> str:
        """Which kernels run the target."""
        return self._models[TARGET].stepper.name

    @property
    def models(self) -> Mapping[str, Loaded]:
        """Its models with their steppers by name; its own is "target"."""
        return self._models

    @property
    def weight_bytes(self) -> int:
        """Bytes of the target's weights as they are laid out for decoding."""
        return self._models[TARGET].stepper.weight_bytes

    @property
    def held_bytes(self) -> int:
        """Bytes of the weights of all its models, without what is held by the engine it is ``like``."""
        return sum(
            loaded.stepper.weight_bytes - loaded.stepper.shared_bytes for loaded in self._models.values()
        )

    @property
    def statistics(self) -> Statistics:
        """Counts of what runs, waits and was done so far."""
        return self._batcher.statistics()

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt.

        A string gets the tokenizer's start token where the tokenizer adds one; messages are rendered
        by the chat template up to where the assistant answers; a list of ids is taken as it is.
        """
        if isinstance(prompt, str):
            start = [self.tokenizer.bos_id] if self.tokenizer.adds_bos else []
            ids = [*start, *self.tokenizer.encode(prompt)]
        elif prompt and isinstance(prompt[0], Mapping):
            ids = self._encode_messages(prompt)  # type: ignore[arg-type]
        else:
            ids = [int(token) for token in prompt]  # type: ignore[arg-type]
            self._check_ids("a prompt has ids", ids)
        if not ids:
            raise PunaError(
                "an empty prompt has no token to continue from", fix="give at least one character"
            )
        return ids

    def _check_ids(self, what: str, ids: Sequence[int]) -> None:
        wrong = [token for token in ids if not 0 <= token < self.model.spec.vocab_size]
        if wrong:
            raise PunaError(
                f"{what} outside the vocabulary",
                found=wrong[:5],
                expected=f"0 to {self.model.spec.vocab_size - 1}",
            )

    def _encode_messages(self, messages: Sequence[Message]) -> list[int]:
        if self.model.template is None:
            raise PunaError(
                "the model has no chat template, so messages cannot be rendered",
                where=self.model.source,
                fix="give a string, or a model with a chat template",
            )
        return encode_prompt(self.tokenizer, self.model.template, messages)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling | None = None, strategy: Chosen = None
    ) -> list[Completion]:
        """Complete each prompt; the results are in the order of the prompts, ``sampling.n`` of each.

        Raises :class:`PunaError` for a prompt that is empty or does not fit the context. Where
        prompt and ``max_tokens`` together do not fit, generation ends at the context with "length".
        """
        if isinstance(prompts, str) or (prompts and isinstance(prompts[0], Mapping | int)):
            raise PunaError("generate takes a list of prompts", found="one prompt", fix="put it into a list")
        chosen, settings = resolve(strategy), sampling or Sampling()
        jobs = [self._job(index, prompt, settings, chosen, None) for index, prompt in enumerate(prompts)]
        self._submit(jobs)
        try:
            with Track("generating", len(jobs), "prompts") as track:
                for job in jobs:
                    for _ in job.ticket.events():
                        pass
                    track.advance()
        finally:
            for job in jobs:
                if not job.ticket.done:
                    job.ticket.cancel()
        return [completion for job in jobs for completion in job.ticket.completions]

    def stream(
        self, prompt: Prompt, sampling: Sampling | None = None, strategy: Chosen = None
    ) -> Iterator[str]:
        """Yield the completion's text piece by piece; joined, the pieces are ``generate``'s text.

        Closing the iterator cancels the request.
        """
        settings = sampling or Sampling()
        if settings.n != 1:
            raise PunaError(
                "a stream is of one text", found=f"n = {settings.n}", fix="submit, and tell the choices apart"
            )
        ticket = self.submit(prompt, settings, strategy)
        try:
            for event in ticket.events():
                if event.text:
                    yield event.text
        finally:
            if not ticket.done:
                ticket.cancel()

    def submit(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        strategy: Chosen = None,
        on_event: Callable[[Event], None] | None = None,
        *,
        index: int = 0,
    ) -> Ticket:
        """Queue a request; any thread may call. ``index`` picks its generator, as in :meth:`generate`.

        ``on_event`` is called from the thread that runs the engine, in place of :meth:`Ticket.events`;
        it must not run the engine itself.
        """
        job = self._job(index, prompt, sampling or Sampling(), resolve(strategy), on_event)
        self._submit([job])
        return job.ticket

    def step(self) -> bool:
        """One round; returns False when nothing runs or waits."""
        with self._turn:
            self._take_in()
            self._batcher.sweep()
            self._batcher.step()
            self._batcher.sweep()
            return bool(self._batcher.running or self._batcher.waiting or self._submitted)

    def tend(self) -> None:
        """End what was cancelled now, if no step is running; else that happens at the end of the step."""
        self.woken.set()
        if self._turn.acquire(blocking=False):
            try:
                self._take_in()
                self._batcher.sweep()
            finally:
                self._turn.release()

    def cancel_all(self) -> None:
        """Cancel every request that has not ended, after the step that runs."""
        with self._turn:
            self._take_in()
            self._batcher.cancel()

    def close(self) -> None:
        """Refuse further requests; those submitted go on."""
        with self._mail:
            self._closed = True

    def open(self) -> None:
        """Take requests again."""
        with self._mail:
            self._closed = False

    def abandon(self, error: Exception) -> None:
        """A step has failed: end every request with ``error`` and free what they hold."""
        with self._turn:
            self._take_in()
            self._batcher.abandon(error)

    def _submit(self, jobs: Sequence[Job]) -> None:
        with self._mail:
            if self._closed:
                raise PunaError("the engine takes no further requests", found="it is being stopped")
            self._submitted += jobs
        self.woken.set()

    def _take_in(self) -> None:
        with self._mail:
            jobs, self._submitted = self._submitted, []
        for job in jobs:
            self._batcher.add(job)

    def _constraint(self, sampling: Sampling) -> Constraint | None:
        if not sampling.constrained:
            return None
        from puna.decode.grammar import Constraint

        return Constraint(
            self.tokenizer,
            self.model.spec.vocab_size,
            json_schema=sampling.json_schema,
            regex=sampling.regex,
        )

    def _job(
        self,
        index: int,
        prompt: Prompt,
        sampling: Sampling,
        strategy: Strategy,
        on_event: Callable[[Event], None] | None,
    ) -> Job:
        self._check_ids("stop_ids has ids", sampling.stop_ids)
        ids = self.encode(prompt)
        room = self.model.spec.max_positions - len(ids)
        if room < 1:
            raise PunaError(
                "the prompt does not fit the model's context",
                where=f"prompt {index}",
                found=f"{len(ids)} tokens",
                expected=f"at most {self.model.spec.max_positions - 1}, so that one can follow",
                fix="shorten the prompt or use a model with a longer context",
            )
        stored = self._models[TARGET].stepper.pool.capacity * BLOCK
        if len(ids) > stored:
            raise PunaError(
                "the prompt does not fit the cache",
                where=f"prompt {index}",
                found=f"{len(ids)} tokens",
                expected=f"at most {stored}",
                fix="make the engine with larger cache_tokens",
            )
        # The last token is produced and never stored.
        limit = min(sampling.max_tokens, room, stored - len(ids) + 1)
        ticket = Ticket(self, sampling.n, on_event)
        requests = [
            Running(
                ids,
                sampling,
                strategy,
                limit,
                index=index,
                choice=choice,
                models=self._models,
                constraint=self._constraint(sampling),
                asked=prompt,
            )
            for choice in range(sampling.n)
        ]
        return Job((next(self._numbers), 0), ticket, requests[0], requests[1:])
