"""Requests in, steps out: admission, preemption, and the reading of one step.

A request is admitted once the blocks of its whole prompt can be reserved. Where a text finds no block
for what it wants to read, the youngest request gives all of its blocks back and waits, first in
line; what it had read is read again later, which its method does not notice.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from puna.decode.lane import Forward, Lane, Result, StepLogits, Steps
from puna.decode.request import TARGET, Loaded, Running
from puna.decode.scheduler import BatchSettings, plan_batch
from puna.decode.ticket import Ticket
from puna.model.paged import OutOfBlocks

if TYPE_CHECKING:
    from puna.model.stepper import Read, Stepper


@dataclass(frozen=True)
class Statistics:
    """Counts so far, and what runs now. Blocks and bytes are those of all models together.

    ``tokens_read`` counts what steps read, again after a preemption too; ``tokens_shared`` what
    prompts took over from earlier texts; ``tokens_written`` what was produced.
    """

    running: int
    waiting: int
    blocks_used: int
    blocks_free: int
    cache_bytes: int
    tokens_read: int
    tokens_shared: int
    tokens_written: int
    steps: int
    preemptions: int


@dataclass(eq=False)
class _Pending:
    """A forward that is being read: outputs are wanted from position ``first`` on."""

    lane: Lane
    first: int
    pieces: list[Tensor] = field(default_factory=list)
    skipped: int = 0
    depth: int = 0
    ready: Tensor | None = None
    result: Result | None = None


class Job:
    """A request with its method under way. With ``others`` it reads the prompt for all of them first."""

    def __init__(
        self, number: tuple[int, int], ticket: Ticket, request: Running, others: Sequence[Running]
    ) -> None:
        self.number = number  # of the ticket, then of the choice: the order of age
        self.ticket = ticket
        self.request = request
        self.others = others
        self.generator: Steps[None] | None = None  # None: not begun
        self.several = False  # whether the method asked for several forwards at once
        self.pending: list[_Pending] = []

    def holds(self, stepper: Stepper) -> bool:
        """Whether the job has blocks of this model."""
        return any(lane.stepper is stepper and any(lane.sequence.tables) for lane in self.request.lanes)


class Batcher:
    """Runs jobs over the models. Not thread-safe: the engine lets one caller in at a time."""

    def __init__(self, models: Mapping[str, Loaded], settings: BatchSettings, max_running: int) -> None:
        self._models = models
        self._settings = settings
        self._max_running = max_running
        self.waiting: list[Job] = []  # both in order of age
        self.running: list[Job] = []
        self._read = self._shared = self._written = self._steps = self._preemptions = 0

    def statistics(self) -> Statistics:
        """Counts so far."""
        pools = [loaded.stepper.pool for loaded in self._models.values()]
        return Statistics(
            running=len(self.running),
            waiting=len(self.waiting),
            blocks_used=sum(pool.used for pool in pools),
            blocks_free=sum(pool.free for pool in pools),
            cache_bytes=sum(pool.bytes for pool in pools),
            tokens_read=self._read,
            tokens_shared=self._shared,
            tokens_written=self._written,
            steps=self._steps,
            preemptions=self._preemptions,
        )

    def add(self, job: Job) -> None:
        """Let a job wait for its turn."""
        bisect.insort(self.waiting, job, key=lambda waiting: waiting.number)

    def sweep(self) -> None:
        """End the jobs whose tickets were cancelled."""
        for job in [*self.running, *self.waiting]:
            if job.ticket.cancelled:
                for request in (job.request, *job.others):
                    request.cancel()
                    self._tell(job.ticket, request)
                self._drop(job)

    def cancel(self) -> None:
        """End every job."""
        for job in (*self.running, *self.waiting):
            job.ticket.cancelled = True
        self.sweep()

    def abandon(self, error: Exception) -> None:
        """End every job with an error."""
        for job in (*self.running, *self.waiting):
            self._fail(job, error)

    @torch.inference_mode()
    def step(self) -> bool:
        """Read once with each model that has something to read; returns whether any job is left."""
        self._admit()
        for loaded in self._models.values():
            if self.running:
                self._advance(loaded.stepper)
        return bool(self.running or self.waiting)

    # ---- admission and preemption ------------------------------------------------------------------

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self._max_running:
            job = self.waiting[0]
            if not self._find_room(job):
                break
            del self.waiting[0]
            bisect.insort(self.running, job, key=lambda running: running.number)
            if job.generator is None:
                self._shared += job.request.cached_tokens
                self._begin(job)

    def _find_room(self, job: Job) -> bool:
        """Reserve what the job is about to read; beside others, a block for each of them must be left."""
        if job.generator is None:
            self._open(job.request)
            lane = job.request.lane
            wanted = [(lane, len(job.request.prompt) - lane.sequence.length)]
        else:
            for pending in job.pending:
                pending.lane.find_shared(pending.first)
            wanted = [(pending.lane, pending.lane.pending) for pending in job.pending]
        try:
            for lane, tokens in wanted:
                lane.sequence.reserve(tokens)
            found = all(lane.sequence.pool.free >= len(self.running) for lane, _ in wanted)
        except OutOfBlocks:
            found = False
        if not found and self.running:
            job.request.free()
            return False
        return True  # or the job is alone, and what it lacks is told when it is about to read it

    def _open(self, request: Running) -> None:
        """Give a new request the target's lane, holding what earlier texts share with its prompt."""
        stepper = self._models[TARGET].stepper
        sequence = stepper.pool.match(request.prompt)
        request.lanes[:] = [Lane(stepper, sequence, request.prompt[: sequence.length], request.lanes.append)]
        request.cached_tokens = sequence.length

    def _preempt(self, job: Job) -> None:
        """Take everything stored from a job and let it wait."""
        job.request.free()
        for pending in job.pending:
            pending.pieces.clear()
            pending.skipped = 0
            pending.result = None
        self.running.remove(job)
        self.add(job)
        self._preemptions += 1

    # ---- one pass of one model ---------------------------------------------------------------------

    def _advance(self, stepper: Stepper) -> None:
        wanted = [
            (job, pending)
            for job in self.running
            for pending in job.pending
            if pending.lane.stepper is stepper and len(pending.lane.ids) > pending.lane.sequence.length
        ]
        if not wanted:
            return
        for _, pending in wanted:
            pending.lane.find_shared(pending.first)
        planned: list[tuple[Job, _Pending, Read]] = []
        counts = plan_batch([pending.lane.pending for _, pending in wanted], self._settings)
        for (job, pending), count in zip(wanted, counts, strict=True):
            if count and job in self.running:
                read = pending.lane.next_read(count, pending.first)
                if self._reserve(job, stepper, read):
                    planned.append((job, pending, read))
        planned = [
            entry for entry in planned if entry[0] in self.running
        ]  # others lost their blocks meanwhile
        if planned:
            self._read_and_resume(stepper, planned)

    def _reserve(self, job: Job, stepper: Stepper, read: Read) -> bool:
        """Find blocks for a read, at the cost of younger jobs; False if the job itself has to wait."""
        while True:
            try:
                read.sequence.reserve(len(read.ids))
                return True
            except OutOfBlocks as error:
                holders = [other for other in self.running if other is job or other.holds(stepper)]
                if len(holders) == 1:
                    self._cut(job, error)
                    return False
                self._preempt(holders[-1])
                if holders[-1] is job:
                    return False

    def _read_and_resume(self, stepper: Stepper, planned: Sequence[tuple[Job, _Pending, Read]]) -> None:
        outputs = stepper.step([read for _, _, read in planned])
        self._steps += 1
        done: list[tuple[Job, _Pending]] = []
        told = zip(stepper.skipped, stepper.depths, stepper.ready, strict=True)
        for (job, pending, read), hidden, (skipped, depth, ready) in zip(planned, outputs, told, strict=True):
            self._read += len(read.ids)
            pending.skipped += skipped
            pending.depth, pending.ready = depth, ready
            if read.outputs or not pending.pieces:
                pending.pieces.append(hidden)
            pending.lane.share()
            if not pending.lane.pending:
                done.append((job, pending))
        joined = [
            pending.pieces[0] if len(pending.pieces) == 1 else torch.cat(pending.pieces)
            for _, pending in done
        ]
        logits = StepLogits(stepper, joined, [pending.ready for _, pending in done])
        for place, (_, pending) in enumerate(done):
            counts = {"skipped": pending.skipped, "depth": pending.depth}
            pending.result = Result(joined[place], logits, place, **counts)
        for job in dict.fromkeys(job for job, _ in done):
            results = [pending.result for pending in job.pending if pending.result is not None]
            if len(results) == len(job.pending):
                self._resume(job, results if job.several else results[0])

    # ---- methods -------------------------------------------------------------------------------------

    def _begin(self, job: Job) -> None:
        lane = job.request.lane
        if job.others:
            job.generator = _read_prompt(lane, job.request.prompt)
        else:
            job.generator = job.request.strategy.run(job.request)
        self._resume(job, None)

    def _resume(self, job: Job, answer: Any) -> None:
        """Let the method go on to what it wants read next, and tell what it produced."""
        assert job.generator is not None
        request, asked = job.request, None
        written = len(request.ids)
        try:
            asked = job.generator.send(answer)
        except StopIteration:
            if job.others:
                self._fork(job)
                return
            request.end()
        except Exception as error:
            self._fail(job, error)
            return
        self._written += len(request.ids) - written
        if request.finished or asked is None:
            self._tell(job.ticket, request)
            self._drop(job)
            return
        job.several = not isinstance(asked, Forward)
        forwards = (asked,) if isinstance(asked, Forward) else asked
        job.pending = []
        for forward in forwards:
            forward.lane.extend(forward)
            request.spend(forward)
            job.pending.append(_Pending(forward.lane, len(forward.lane.ids) - forward.outputs))
        self._tell(job.ticket, request)

    def _fork(self, job: Job) -> None:
        """The prompt has been read but for its end: every text goes on from there on its own."""
        requests = (job.request, *job.others)
        self.running.remove(job)
        lane = job.request.lane
        for request in job.others:
            other = lane.fork()
            job.request.lanes.remove(other)
            request.lanes[:] = [Lane(lane.stepper, other.sequence, other.ids, request.lanes.append)]
            request.cached_tokens = len(lane.ids)
        for choice, request in enumerate(requests):
            alone = Job((job.number[0], choice), job.ticket, request, ())
            bisect.insort(self.running, alone, key=lambda running: running.number)
            self._begin(alone)

    def _tell(self, ticket: Ticket, request: Running) -> None:
        event = request.news()
        if event is not None:
            if event.finish_reason is not None:
                ticket.finish(request.choice, request.completion(), event)
            else:
                ticket.put(event)

    def _cut(self, job: Job, error: OutOfBlocks) -> None:
        """The cache is full with this job alone: its text ends here, or has never begun."""
        if not job.request.ids:
            self._fail(job, error)
            return
        job.request.end("length")
        self._tell(job.ticket, job.request)
        self._drop(job)

    def _fail(self, job: Job, error: Exception) -> None:
        """End every text of the job's ticket with an error."""
        job.ticket.fail(error)
        for other in [*self.running, *self.waiting]:
            if other.ticket is job.ticket:
                self._drop(other)

    def _drop(self, job: Job) -> None:
        """Forget a job and free what it holds."""
        if job.generator is not None:
            job.generator.close()
        for request in (job.request, *job.others):
            request.free()
        for queue in (self.running, self.waiting):
            if job in queue:
                queue.remove(job)


def _read_prompt(lane: Lane, prompt: Sequence[int]) -> Steps[None]:
    """Read all of the prompt but its last token, which each text reads for itself."""
    if len(prompt) > len(lane.ids) + 1:
        yield from lane.read(prompt[len(lane.ids) : -1], outputs=0)
