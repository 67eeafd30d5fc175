"""Time of a step by its rows and its attention, measured on this machine for the simulator.

System S76, SARATHI (arXiv:2308.16369): what a decoding row costs in a step that a prompt's chunk fills
anyway, against a step of its own. Steps to be compared are timed in turn, to and fro, so that a machine
that slows down slows all of them. What the rows add to a chunk's step is a small difference of two large
times, which vary by more than it from one step to the next: it takes many rounds, and is told with its
interval.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from puna.core.errors import PunaError
from puna.core.progress import Track
from puna.decode.schedule_simulator import StepCosts
from puna.model.paged import PagedSequence
from puna.model.stepper import Read

if TYPE_CHECKING:
    from puna.model.stepper import Stepper


class Seconds(NamedTuple):
    """Of one step: through the layers, and for the logits of the rows that decode."""

    layers: float
    head: float

    @property
    def whole(self) -> float:
        """Both."""
        return self.layers + self.head


class Share(NamedTuple):
    """A median over rounds, between the ends of its 95% interval."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Piggyback:
    """Median seconds of three steps: the decoding rows alone, the chunk alone, both in one.

    ``share`` is what the decoding rows add to the chunk's step over what they cost in a step of their
    own, their logits in both; ``layers`` is the same without logits. The chunk does not end its prompt,
    so that nobody else needs the head.
    """

    decode_only: float
    chunk_only: float
    mixed: float
    share: Share
    layers: Share


class StepBench:
    """Texts of a given length in a stepper, and steps over them that can be taken again."""

    def __init__(self, stepper: Stepper, ids: Sequence[int], texts: int, context: int) -> None:
        self.stepper = stepper
        self.ids = list(ids)
        stepper.pool.sharing = False
        self.decoding = [stepper.sequence() for _ in range(texts)]
        for sequence in self.decoding:
            stepper.step([Read(sequence, self._some(context), 0)])
        self.context = context
        self.prompt: PagedSequence = stepper.sequence()

    def _some(self, count: int) -> list[int]:
        return (self.ids * (count // len(self.ids) + 1))[:count]

    def step(self, decodes: int, chunk: int) -> Seconds:
        """A step with so many decoding rows and a chunk of a fresh prompt; undone afterwards."""
        import torch

        reads = [Read(sequence, self.ids[:1]) for sequence in self.decoding[:decodes]]
        if chunk:
            reads.append(Read(self.prompt, self._some(chunk), 0))
        begun = time.perf_counter()
        hidden = self.stepper.step(reads)
        through = time.perf_counter()
        if decodes:
            self.stepper.logits(torch.cat(hidden[:decodes]))
        ended = time.perf_counter()
        for sequence in self.decoding[:decodes]:
            sequence.crop(self.context)
        self.prompt.crop(0)
        return Seconds(through - begun, ended - through)

    def layers(self, decodes: int, chunk: int) -> float:
        """Seconds of such a step through the layers."""
        return self.step(decodes, chunk).layers

    def longer(self, chunk: int) -> float:
        """Seconds of a step in which one of the texts reads a chunk; undone afterwards."""
        begun = time.perf_counter()
        self.stepper.step([Read(self.decoding[0], self._some(chunk))])
        took = time.perf_counter() - begun
        self.decoding[0].crop(self.context)
        return took


_TEXTS, _CHUNK = 4, 64  # of the steps behind a long context


def measure_piggyback(
    stepper: Stepper, ids: Sequence[int], *, decodes: int, rows: int, context: int, repeats: int
) -> Piggyback:
    """Median seconds of the three steps, timed in turn; the mixed one has ``rows`` rows in all."""
    if decodes >= rows:
        raise PunaError("a mixed step has no room for a chunk", found=f"{decodes} decodes in {rows} rows")
    bench = StepBench(stepper, ids, decodes, context)
    kinds = ((decodes, 0), (0, rows - decodes), (decodes, rows - decodes))
    rounds: list[list[Seconds]] = []
    with Track("timing mixed steps", repeats + 1, "rounds") as track:
        for turn in range(repeats + 1):
            order = kinds if turn % 2 else kinds[::-1]
            taken = {kind: bench.step(*kind) for kind in order}
            if turn:  # the first is not counted
                rounds.append([taken[kind] for kind in kinds])
            track.advance()
    for sequence in (*bench.decoding, bench.prompt):
        sequence.free()
    decode, chunk, mixed = zip(*rounds, strict=True)
    return Piggyback(
        decode_only=statistics.median(time.whole for time in decode),
        chunk_only=statistics.median(time.whole for time in chunk),
        mixed=statistics.median(time.whole for time in mixed),
        share=_share([time.whole for time in decode], _added(chunk, [time.whole for time in mixed])),
        layers=_share([time.layers for time in decode], _added(chunk, [time.layers for time in mixed])),
    )


def _added(chunk: Sequence[Seconds], mixed: Sequence[float]) -> list[float]:
    """What the mixed step of each round took longer than that of the chunk."""
    return [both - alone.whole for alone, both in zip(chunk, mixed, strict=True)]


def _share(decode: Sequence[float], added: Sequence[float]) -> Share:
    """The medians' ratio, its interval from the order of what was added."""
    ordered, alone, count = sorted(added), statistics.median(decode), len(added)
    aside = max(0, math.floor(count / 2 - 0.98 * math.sqrt(count)))  # of a sign test at 5%
    return Share(
        *(seconds / alone for seconds in (ordered[aside], statistics.median(added), ordered[-1 - aside]))
    )


def measure_costs(
    stepper: Stepper, ids: Sequence[int], *, rows: Sequence[int], long_context: int, repeats: int
) -> StepCosts:
    """A cost table over ``rows``, and the costs of attention, without logits; each a median of ``repeats``.

    Up to 16 rows are texts of one new token, more are a prompt's chunk. A key's cost is that of 4 texts
    going on behind ``long_context`` tokens against behind 16, a pair's that of a chunk of 64
    behind so many tokens against a fresh one. What attention the table's own steps had is taken off.
    """
    short, long = StepBench(stepper, ids, 16, 16), StepBench(stepper, ids, _TEXTS, long_context)
    steps: dict[object, Callable[[], float]] = {
        row: functools.partial(short.layers, *((row, 0) if row <= 16 else (0, row))) for row in set(rows)
    }
    steps |= {
        "near": functools.partial(short.layers, _TEXTS, 0),
        "far": functools.partial(long.layers, _TEXTS, 0),
        "fresh": functools.partial(short.layers, 0, _CHUNK),
        "behind": functools.partial(long.longer, _CHUNK),
    }
    taken: dict[object, list[float]] = {kind: [] for kind in steps}
    with Track("timing steps", repeats + 1, "rounds") as track:
        for turn in range(repeats + 1):
            for kind, step in steps.items():
                seconds = step()
                taken[kind] += [seconds] if turn else []
            track.advance()
    median = {kind: statistics.median(times) for kind, times in taken.items()}
    # A single row meets each key it reads once; a chunk meets each as often as it has rows.
    both = max(0.0, median["far"] - median["near"]) / (_TEXTS * (long_context - 16))
    behind = (median["behind"] - median["fresh"]) / long_context
    pair = min(max(0.0, (behind - both) / (_CHUNK - 1)), both)
    key = both - pair
    table: list[tuple[int, float]] = []
    for row in sorted(set(rows)):
        attention = row * 17 * both if row <= 16 else row * key + row * (row + 1) // 2 * pair
        table.append((row, max(median[row] - attention, 0.5 * median[row])))
    for sequence in (*short.decoding, short.prompt, *long.decoding, long.prompt):
        sequence.free()
    return StepCosts(tuple(table), pair, key)
