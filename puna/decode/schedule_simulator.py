"""An event simulator of batching policies: when each token of each request would come.

System S76, SARATHI (arXiv:2308.16369). Time is virtual: a step costs what a :class:`StepCosts`, measured
or given, says of its rows and of the query-key pairs of its attention. The policy "decode_maximal" is
the engine's own scheduler; "prefill_first" is the baseline, which reads waiting prompts whole before
anyone decodes, as iteration-level schedulers before SARATHI did. In a pipeline, as many batches are
under way as there are stages, each of its own requests, and a stage that waits is a bubble.

Simplified: memory is never short, stages of a pipeline cost the same and sending takes no time.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from puna.core.errors import PunaError
from puna.core.seeds import numpy_generator
from puna.decode.scheduler import SHORT, BatchSettings, plan_batch

Policy = Callable[[Sequence[int]], Sequence[int]]
"""From the tokens that each running request has pending, the oldest first, to those it reads now."""


@dataclass(frozen=True)
class StepCosts:
    """Seconds of a step: ``table`` has (rows, seconds) without attention, straight lines between.

    Beyond the table the last line goes on. Attention adds ``key`` for each stored key that a text looks
    at in the step, read once, and ``pair`` for each query that meets it.
    """

    table: tuple[tuple[int, float], ...]
    pair: float
    key: float = 0.0

    def __post_init__(self) -> None:
        rows = [row for row, _ in self.table]
        if len(rows) < 2 or sorted(set(rows)) != rows or min(seconds for _, seconds in self.table) <= 0:
            raise PunaError(
                "step costs need two or more rising numbers of rows, each with a positive time",
                found=self.table,
            )

    def of(self, rows: int, pairs: int, keys: int) -> float:
        """Seconds of a step with so many rows, whose attention has so many pairs and reads so many keys."""
        place = min(max(bisect.bisect_left([row for row, _ in self.table], rows), 1), len(self.table) - 1)
        (low, before), (high, after) = self.table[place - 1], self.table[place]
        flat = before + (after - before) * (rows - low) / (high - low)
        return max(flat, self.table[0][1]) + pairs * self.pair + keys * self.key


@dataclass(frozen=True)
class Arrival:
    """A request: when it comes (seconds), tokens of its prompt, tokens it will write."""

    time: float
    prompt: int
    output: int


def draw_arrivals(
    count: int, prompt: int, output: int, spread: float, rate: float, seed: int
) -> list[Arrival]:
    """``count`` requests whose lengths lie around ``prompt`` and ``output``.

    Lengths are log-normal with the given means and deviation ``spread`` of the logarithm; 0: all equal.
    They come as a Poisson process of ``rate`` a second, or all at once if that is 0.
    """
    generator = numpy_generator(seed, "decode", "arrivals")

    def lengths(mean: int) -> list[int]:
        drawn = generator.lognormal(math.log(mean) - spread**2 / 2, spread, count)
        return [max(1, round(float(length))) for length in drawn]

    gaps = generator.exponential(1.0 / rate, count) if rate else [0.0] * count
    times = itertools.accumulate(map(float, gaps))
    return [Arrival(*each) for each in zip(times, lengths(prompt), lengths(output), strict=True)]


def decode_maximal(settings: BatchSettings) -> Policy:
    """The engine's policy."""
    return lambda pending: plan_batch(pending, settings)


def prefill_first(settings: BatchSettings) -> Policy:
    """The baseline: waiting prompts whole, in order, as many as the bound admits; else all that decode."""

    def plan(pending: Sequence[int]) -> list[int]:
        counts, left = [0] * len(pending), settings.max_batch_tokens
        prompts = [place for place, tokens in enumerate(pending) if tokens > SHORT]
        for place in prompts or range(len(pending)):
            if pending[place] <= left or not any(counts):  # a prompt above the bound goes alone, whole
                counts[place] = pending[place]
                left -= counts[place]
        return counts

    return plan


@dataclass
class _Request:
    arrival: Arrival
    stored: int = 0
    written: int = 0
    waited: int = 0  # steps since its last token in which it was not read
    times: list[float] = field(default_factory=list)

    @property
    def pending(self) -> int:
        return 1 if self.written else self.arrival.prompt - self.stored

    def read(self, tokens: int) -> int:
        """Store ``tokens``; returns the query-key pairs that took."""
        pairs = tokens * self.stored + tokens * (tokens + 1) // 2
        self.stored += tokens
        return pairs


@dataclass(frozen=True)
class Simulated:
    """What a simulation gave. ``costs`` are seconds of each step, ``gaps`` between tokens of one request.

    ``first`` is the time from a request's arrival to its first token; ``skipped`` the most steps in
    a row that passed over a request that was decoding. ``idle`` is the share of the stages' time,
    between the first and the last step, in which they had nothing to do.
    """

    costs: list[float]
    gaps: list[float]
    first: list[float]
    skipped: int
    seconds: float
    tokens: int
    idle: float

    @property
    def variance(self) -> float:
        """Variance of the cost of a step, in squared seconds."""
        return statistics.pvariance(self.costs)

    @property
    def throughput(self) -> float:
        """Written tokens a second."""
        return self.tokens / self.seconds

    def gap(self, share: float) -> float:
        """The gap between tokens that a ``share`` of them does not exceed."""
        ordered = sorted(self.gaps)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def simulate(
    arrivals: Sequence[Arrival], costs: StepCosts, policy: Policy, *, max_running: int, stages: int = 1
) -> Simulated:
    """Run the requests to their ends; with ``stages`` above 1, through a pipeline of so many.

    Each of the pipeline's batches has ``max_running`` requests of its own.
    """
    waiting = sorted(arrivals, key=lambda arrival: arrival.time)
    lines: list[list[_Request]] = [[] for _ in range(stages)]
    free = [0.0] * stages  # when each stage has nothing to do any more
    ready = [(0.0, line) for line in range(stages)]  # when each batch may be planned again
    heapq.heapify(ready)
    done: list[_Request] = []
    spent: list[float] = []
    skipped = taken = 0
    while ready:
        now, line = heapq.heappop(ready)
        running = lines[line]
        while taken < len(waiting) and len(running) < max_running and waiting[taken].time <= now:
            running.append(_Request(waiting[taken]))
            taken += 1
        if not running:
            if taken < len(waiting):
                heapq.heappush(ready, (max(now, waiting[taken].time), line))
            continue
        counts = policy([request.pending for request in running])
        pairs = sum(request.read(count) for request, count in zip(running, counts, strict=True) if count)
        keys = sum(request.stored for request, count in zip(running, counts, strict=True) if count)
        cost = costs.of(sum(counts), pairs, keys)
        spent.append(cost)
        end = now
        for stage in range(stages):
            end = max(end, free[stage]) + cost / stages
            free[stage] = end
        for request, count in zip(running, counts, strict=True):
            skipped = max(skipped, _written(request, count, end))
        done += [request for request in running if request.written == request.arrival.output]
        lines[line] = [request for request in running if request.written < request.arrival.output]
        heapq.heappush(ready, (end, line))
    begun = min(arrival.time for arrival in arrivals)
    return Simulated(
        costs=spent,
        gaps=[after - before for request in done for before, after in itertools.pairwise(request.times)],
        first=[request.times[0] - request.arrival.time for request in done],
        skipped=skipped,
        seconds=max(free) - begun,
        tokens=sum(request.written for request in done),
        idle=1 - sum(spent) / (stages * (max(free) - begun)),
    )


def _written(request: _Request, count: int, end: float) -> int:
    """Note the token that a step gave, if it gave one; returns how often the request was passed over."""
    if count and request.stored >= request.arrival.prompt:
        request.written += 1
        request.times.append(end)
        request.waited = 0
    elif request.written:
        request.waited += 1
    return request.waited
