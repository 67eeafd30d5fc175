"""How far a model's weights have moved from another's, layer by layer, read tensor by tensor and in parts.

The distance is relative and of the Frobenius norm: ``|W' - W| / |W|`` over all weights of a layer together,
summed in float64. A head that is the embedding is counted once. What has no counterpart of its shape, such
as an embedding that got new rows, has no distance and is named instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from puna.core.errors import PunaError
from puna.text.stored_weights import Weights, parts_of

_NAMES = {"model.embed_tokens.weight": "embedding", "lm_head.weight": "head", "model.norm.weight": "norm"}


@dataclass(frozen=True)
class Distances:
    """Relative distances by group (``embedding``, ``layers.N``, ``norm``, ``head``) and of all of them."""

    whole: float
    groups: Mapping[str, float]
    unlike: tuple[str, ...]
    """Groups with a tensor that the other has not, or in another shape, or that were all zero before."""

    def metrics(self, name: str) -> dict[str, float]:
        """By flat dotted names."""
        return {f"distance.{name}": self.whole} | {
            f"distance.{name}.{group}": value for group, value in self.groups.items()
        }


def group_of(name: str) -> str:
    """The group of a tensor: its layer, or what it is."""
    parts = name.split(".")
    return f"layers.{parts[2]}" if name.startswith("model.layers.") else _NAMES.get(name, name)


def _place(item: tuple[str, object]) -> tuple[int, str]:
    """Layers by their numbers, the others before them."""
    name, _, layer = item[0].partition(".")
    return (int(layer) if name == "layers" else -1, item[0])


def distances(before: Weights, after: Weights) -> Distances:
    """How far ``after`` lies from ``before``; time is that of reading both, memory that of a part of each."""
    squares: dict[str, list[float]] = {}
    unlike: set[str] = set()
    for name in {**before.shapes, **after.shapes}:
        shape = before.shapes.get(name)
        if shape is None or after.shapes.get(name) != shape:
            unlike.add(group_of(name))
            continue
        sums = squares.setdefault(group_of(name), [0.0, 0.0])
        for start, stop in parts_of(shape):
            old = before.part(name, start, stop).double()
            sums[0] += float((after.part(name, start, stop).double() - old).square().sum())
            sums[1] += float(old.square().sum())
    alike = {group: sums for group, sums in squares.items() if group not in unlike and sums[1] > 0.0}
    if not alike:
        raise PunaError(
            "the models have no layer of the same shape: there is no distance",
            where=after.label,
            expected=f"some tensors as in {before.label}",
            fix="set distances: false",
        )
    groups = {group: math.sqrt(moved / norm) for group, (moved, norm) in sorted(alike.items(), key=_place)}
    moved, norm = (sum(sums[side] for sums in alike.values()) for side in (0, 1))
    return Distances(math.sqrt(moved / norm), groups, tuple(sorted({*squares, *unlike} - set(alike))))
