"""Time of a step by its rows and its attention, measured on this machine for the simulator.

System S76, SARATHI (arXiv:2308.16369): what a decoding row costs in a step that a prompt's chunk fills
anyway, against a step of its own. Steps to be compared are timed in turn, so that a machine that slows
down slows all of them.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from puna.core.errors import PunaError
from puna.core.progress import Track
from puna.decode.schedule_simulator import StepCosts
from puna.model.paged import PagedSequence
from puna.model.stepper import Read

if TYPE_CHECKING:
    from puna.model.stepper import Stepper


@dataclass(frozen=True)
class Piggyback:
    """Median seconds of three steps: the decoding rows alone, the chunk alone, both in one.

    ``marginal_share`` is what a decoding row adds to the chunk's step over what it costs in a step of
    decoding rows: the median of the rounds, so that a slow one does not count.
    """

    decode_only: float
    chunk_only: float
    mixed: float
    marginal_share: float


class _Bench:
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

    def seconds(self, decodes: int, chunk: int) -> float:
        """Of a step with so many decoding rows and a chunk of a fresh prompt; undone afterwards."""
        reads = [Read(sequence, self.ids[:1]) for sequence in self.decoding[:decodes]]
        if chunk:
            reads.append(Read(self.prompt, self._some(chunk)))
        begun = time.perf_counter()
        self.stepper.step(reads)
        took = time.perf_counter() - begun
        for sequence in self.decoding[:decodes]:
            sequence.crop(self.context)
        self.prompt.crop(0)
        return took

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
    bench = _Bench(stepper, ids, decodes, context)
    kinds = {"decode": (decodes, 0), "chunk": (0, rows - decodes), "mixed": (decodes, rows - decodes)}
    taken: dict[str, list[float]] = {kind: [] for kind in kinds}
    with Track("timing mixed steps", repeats + 1, "rounds") as track:
        for turn in range(repeats + 1):  # the first is not counted
            for kind, (texts, chunk) in kinds.items():
                seconds = bench.seconds(texts, chunk)
                if turn:
                    taken[kind].append(seconds)
            track.advance()
    for sequence in (*bench.decoding, bench.prompt):
        sequence.free()
    rounds = zip(taken["decode"], taken["chunk"], taken["mixed"], strict=True)
    share = statistics.median((mixed - chunk) / decode for decode, chunk, mixed in rounds)
    median = {kind: statistics.median(times) for kind, times in taken.items()}
    return Piggyback(median["decode"], median["chunk"], median["mixed"], share)


def measure_costs(
    stepper: Stepper, ids: Sequence[int], *, rows: Sequence[int], long_context: int, repeats: int
) -> StepCosts:
    """A cost table over ``rows``, and the costs of attention; each a median of ``repeats``.

    Up to 16 rows are texts of one new token, more are a prompt's chunk. A key's cost is that of 4 texts
    going on behind ``long_context`` tokens against behind 16, a pair's that of a chunk of 64
    behind so many tokens against a fresh one. What attention the table's own steps had is taken off.
    """
    short, long = _Bench(stepper, ids, 16, 16), _Bench(stepper, ids, _TEXTS, long_context)
    steps: dict[object, Callable[[], float]] = {
        row: functools.partial(short.seconds, *((row, 0) if row <= 16 else (0, row))) for row in set(rows)
    }
    steps |= {
        "near": functools.partial(short.seconds, _TEXTS, 0),
        "far": functools.partial(long.seconds, _TEXTS, 0),
        "fresh": functools.partial(short.seconds, 0, _CHUNK),
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
