"""How much to take of each layer, and how many units that makes.

An allocator turns shares of layers into the next ones; :func:`removals` turns shares into whole units. All
of them are pure functions of numbers.

``uniform`` takes the same share of every layer. ``adaptive`` (Adapt-Pruner, S27, 2502.03460) takes more of a
layer that matters less: in each of T steps a layer's share grows by total / T less an amplitude times its
centred importance, I = -(mean cosine of the stream before and behind the layer), and stays within 0 and 0.99.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from puna.model.spec import LlamaSpec
from puna.model.units import Kind, number_of, unit_parameters

MOST = 0.99
"""Of a layer, the largest share that is taken."""
_IN_LAYER: tuple[Kind, ...] = ("head_group", "channel")


def centred(importance: Sequence[float]) -> list[float]:
    """Importances less their mean, over the largest magnitude of that: mean 0, largest magnitude 1.

    All zero where the layers matter equally.
    """
    mean = math.fsum(importance) / len(importance)
    differences = [value - mean for value in importance]
    largest = max(map(abs, differences))
    return [difference / largest if largest else 0.0 for difference in differences]


@dataclass(frozen=True)
class Pace:
    """How far one of ``steps`` steps goes towards ``total``, and how far importance pulls layers apart."""

    total: float
    steps: int
    amplitude: float


Allocator = Callable[[Sequence[float], Sequence[float], Pace], list[float]]
"""From the layers' shares and their centred importance to the shares after one step."""


def uniform(shares: Sequence[float], importance: Sequence[float], pace: Pace) -> list[float]:
    """Every layer's share grows alike."""
    return [_within(share + pace.total / pace.steps) for share in shares]


def adaptive(shares: Sequence[float], importance: Sequence[float], pace: Pace) -> list[float]:
    """A share grows the more, the less its layer matters; it may shrink, though what is gone stays gone."""
    return [
        _within(share + pace.total / pace.steps - pace.amplitude * value)
        for share, value in zip(shares, importance, strict=True)
    ]


ALLOCATORS: dict[str, Allocator] = {"uniform": uniform, "adaptive": adaptive}


def _within(share: float) -> float:
    return min(MOST, max(0.0, share))


Removals = dict[tuple[Kind, int], int]
"""Units taken out of the whole decoder, by kind and layer."""


def removals(
    spec: LlamaSpec,
    kinds: Sequence[Kind],
    shares: Sequence[float],
    already: Mapping[tuple[Kind, int], int],
    order: Mapping[int, float] | None = None,
    *,
    settle: bool = True,
) -> Removals:
    """Whole units that make up a share of each layer's weights, at least those that are gone ``already``.

    Head groups are few and large, and rounding layer by layer would let all layers lose one at once. So the
    fractions add up over the layers, and whole groups go where most is owed; where layers owe the same,
    those with the lowest number in ``order`` come first. What whole groups leave over is made up in
    channels, if this is to ``settle`` what is owed. Each half keeps a unit.
    """
    layers = range(len(shares))
    found: Removals = {}
    sizes = {kind: [unit_parameters(spec, kind, layer) for layer in layers] for kind in _IN_LAYER}
    total = {kind: [number_of(spec, kind, layer) for layer in layers] for kind in _IN_LAYER}
    owed = 0.0  # weights, over all layers
    for kind in _IN_LAYER:
        if kind not in kinds:
            continue
        exact = [share * total[kind][layer] for layer, share in enumerate(shares)]
        gone = [already.get((kind, layer), 0) for layer in layers]
        there = math.fsum(exact[layer] * sizes[kind][layer] for layer in layers)
        if kind == "head_group":
            counts = _shared_out(exact, gone, total[kind], order or {})
        else:
            factor = 1 + (owed / there if there and settle else 0.0)
            wanted = [
                min(round(factor * part), all_ - 1) for part, all_ in zip(exact, total[kind], strict=True)
            ]
            counts = [max(before, number) for before, number in zip(gone, wanted, strict=True)]
        owed += math.fsum((exact[layer] - counts[layer]) * sizes[kind][layer] for layer in layers)
        found |= {(kind, layer): counts[layer] for layer in layers if total[kind][layer]}
    return found


def _shared_out(
    exact: Sequence[float], already: Sequence[int], total: Sequence[int], order: Mapping[int, float]
) -> list[int]:
    """Whole numbers that add up to the rounded-down sum of ``exact``: each goes where most is owed."""
    counts = list(already)
    # A hair more, so that a sum of fractions that ought to be whole is.
    left = math.floor(math.fsum(exact) + 1e-9) - sum(counts)
    while left > 0:
        open_ = [
            layer for layer in range(len(exact)) if exact[layer] > 0 and counts[layer] + 1 < total[layer]
        ]
        if not open_:
            break
        owes = {layer: round(exact[layer] - counts[layer], 9) for layer in open_}
        counts[min(open_, key=lambda layer: (-owes[layer], order.get(layer, 0.0), layer))] += 1
        left -= 1
    return counts


def weight_of(spec: LlamaSpec, taken: Mapping[tuple[Kind, int], int]) -> int:
    """Weights of so many units of each kind and layer, none of which share any."""
    return sum(number * unit_parameters(spec, kind, layer) for (kind, layer), number in taken.items())
