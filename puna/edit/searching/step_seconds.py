"""What a decoding step of a child takes on this machine: a measured table whose entries add up.

System S29. Parameters are not throughput, and timing each of a search's children in an engine of its own
would take longer than the search. So a few children are timed in turn: for each width one with that width in
every layer, at the largest and at the smallest depth. What the layers between them take is a layer's time at
that width; what is left is the rest, the head above all. A child's time is the sum.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from puna.core.progress import Track
from puna.model.search_space import Genes, SearchSpace
from puna.model.slicing import sliced
from puna.model.stepper import Read
from puna.model.steppers import Quantize, make_stepper

if TYPE_CHECKING:
    from puna.model.llama import Llama


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of everything but the layers, and of a layer by the number of its width."""

    rest: float
    layers: tuple[float, ...]

    def of(self, space: SearchSpace, genes: Genes) -> float:
        """Seconds of a step of a child."""
        own = space.canonical(genes)
        return self.rest + sum(self.layers[own[1 + layer]] for layer in space.layers(own))


def table_of(space: SearchSpace, seconds: Mapping[Genes, float]) -> StepSeconds:
    """The table from the seconds of :func:`timed_children`; with one depth all counts as layers."""
    deep, shallow = space.depths[0], space.depths[-1]
    layers: list[float] = []
    rests: list[float] = []
    for width in range(max(space.choices[1:])):
        most, fewest = (seconds[_alike(space, depth, width)] for depth in (0, len(space.depths) - 1))
        each = (most - fewest) / (deep - shallow) if deep > shallow else most / deep
        layers.append(max(each, 0.0))
        rests.append(most - deep * layers[-1])
    return StepSeconds(sum(rests) / len(rests), tuple(layers))


def _alike(space: SearchSpace, depth: int, width: int) -> Genes:
    """A child with one width in every layer, or the last that a layer has."""
    widths = (min(width, count - 1) for count in space.choices[1:])
    return space.canonical((depth, *widths))


def timed_children(space: SearchSpace) -> list[Genes]:
    """The children to be timed: every width at the largest and the smallest depth."""
    depths, widths = (0, len(space.depths) - 1), range(max(space.choices[1:]))
    return list(dict.fromkeys(_alike(space, depth, width) for depth in depths for width in widths))


def measure_step_seconds(
    model: Llama, space: SearchSpace, quantize: Quantize | None, *, context: int, rounds: int
) -> StepSeconds:
    """Time one-token steps behind ``context`` tokens, all children in turn; medians of ``rounds``.

    Memory holds the weights of all children that are timed.
    """
    steppers = {}
    for genes in timed_children(space):
        child = sliced(model, space.kept(genes))
        steppers[genes] = make_stepper(child, quantize=quantize, cache_tokens=context + 64)
    texts = {genes: stepper.sequence() for genes, stepper in steppers.items()}
    for genes, stepper in steppers.items():
        if context > 1:
            stepper.step([Read(texts[genes], [token % 7 + 1 for token in range(context - 1)])])
    seconds: dict[Genes, list[float]] = {genes: [] for genes in steppers}
    with Track("timing steps", rounds + 1, "rounds") as track:
        for turn in range(rounds + 1):
            for genes in list(steppers) if turn % 2 else list(steppers)[::-1]:
                stepper, text = steppers[genes], texts[genes]
                begun = time.perf_counter()
                stepper.logits(stepper.step([Read(text, [1])])[0])
                took = time.perf_counter() - begun
                text.crop(context - 1)
                if turn:  # the first is not counted
                    seconds[genes].append(took)
            track.advance()
    return table_of(space, {genes: statistics.median(found) for genes, found in seconds.items()})
