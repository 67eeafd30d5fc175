"""S15: the gap monitor. What a training does to what was known, from its first steps on, arXiv:2406.14833.

An evaluation at the end hides that general loss rises at first and recovers: what is watched are its highest
value, where it was reached, and how much of the rise is gone in the end. Beside it, how far the first and the
last layers have moved: ``|W' - W| / |W|`` of all weights of so many layers together, Frobenius. The paper
finds the ratio of the two above 1.35 early in the gap, with five layers on each side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from puna.core.errors import PunaError

if TYPE_CHECKING:
    from puna.model.llama import Llama

RATIO = "update.ratio"
MEASURED = ("update.bottom", "update.top", RATIO)
_JUDGED = (".loss", ".bits_per_byte")


class LayerUpdates:
    """How far ``layers`` of a decoder at each end are from where they were when this was made.

    Memory: a copy of those layers' weights.
    """

    def __init__(self, model: Llama, layers: int) -> None:
        blocks = model.model.layers
        if 2 * layers > len(blocks):
            raise PunaError(
                "the watched layers at both ends overlap",
                where="watched_layers",
                found=f"{layers} of {len(blocks)} layers at each end",
                expected=f"at most {len(blocks) // 2}",
            )
        self._sides = {
            "update.bottom": _copied(blocks[:layers]),
            "update.top": _copied(blocks[len(blocks) - layers :]),
        }

    @classmethod
    def of(cls, model: Llama, layers: int | None) -> LayerUpdates | None:
        """Of so many layers; None if none are watched."""
        return None if layers is None else cls(model, layers)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """``update.bottom``, ``update.top`` and their ratio, 1 where neither has moved."""
        found = {name: _moved(pairs) for name, pairs in self._sides.items()}
        bottom, top = found["update.bottom"], found["update.top"]
        found[RATIO] = bottom / top if top else (1.0 if not bottom else math.inf)
        return found


def _copied(blocks: Any) -> list[tuple[Tensor, Tensor]]:
    """Each weight as it changes, and as it is now."""
    return [(weight, weight.detach().clone()) for weight in blocks.parameters()]


def _moved(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    squares = [
        (float((now.detach() - before).double().square().sum()), float(before.double().square().sum()))
        for now, before in pairs
    ]
    return math.sqrt(sum(moved for moved, _ in squares) / sum(norm for _, norm in squares))


def gaps(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of each held-out corpus C and its figure F, over all evaluations of a run:

    * ``highest.C.F``: the highest value; ``rise.C.F``: how far it lies above the first, relative
    * ``rise_at.C.F``: the share of the tokens at which it was reached
    * ``recovered.C.F``: the share of the rise that is gone in the end; 1 where there was none
    * ``highest.update.ratio``: the highest ratio of the layers' updates behind the first step, where they are
      watched
    """
    found: dict[str, float] = {}
    if not evaluations:
        return found
    last = evaluations[-1]
    for name in (name for name in last if name.endswith(_JUDGED)):
        values = [line[name] for line in evaluations]
        highest = max(values)
        place = values.index(highest)
        risen = highest - values[0]
        found[f"highest.{name}"] = highest
        found[f"rise.{name}"] = risen / values[0]
        found[f"rise_at.{name}"] = evaluations[place]["tokens"] / last["tokens"] if last["tokens"] else 0.0
        found[f"recovered.{name}"] = (highest - values[-1]) / risen if risen else 1.0
    if RATIO in last:
        found[f"highest.{RATIO}"] = max(line[RATIO] for line in evaluations if line["tokens"] or last is line)
    return found


def gap_curves(evaluations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Held-out text over the run as a change against its beginning, and how far the layers moved.

    Nothing of a run that was measured at both ends alone: it shows no way down and back.
    """
    if len(evaluations) < 3:
        return []
    tokens = [line["tokens"] for line in evaluations]
    names = [name for name in evaluations[-1] if name.endswith(".bits_per_byte")]
    changes = [
        {
            "name": name.removesuffix(".bits_per_byte"),
            "x": tokens,
            "y": [100 * (line[name] / evaluations[0][name] - 1) for line in evaluations],
        }
        for name in names
    ]
    updates = [
        {"name": name.removeprefix("update."), "x": tokens, "y": [line[name] for line in evaluations]}
        for name in MEASURED
        if name in evaluations[-1]
    ]
    both = (
        ("Held-out text against the beginning", "bits per byte, %", changes),
        ("Relative update of the first and last layers", "", updates),
    )
    return [{"title": title, "x": "tokens", "y": unit, "series": series} for title, unit, series in both]
