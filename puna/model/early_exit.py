"""Leaving the decoder early: a token whose law is certain at an inner layer is not read by the layers above.

The instance-aware exits of S24, Sorted LLaMA (Kavehzadeh and others 2023, arXiv:2309.08968). At each exit
the final norm and the head are asked; where the likeliest token's probability exceeds the exit's
threshold, that is the token's law, else the climb goes on. Layers above an exit have no keys of what left
below them, so its stream waits there and is read together with the next token that comes by: the keys are
then those of a full pass, to the bit where a row does not depend on the rows beside it.

Every sixteenth token of a text goes through all layers, so that no more than fifteen ever wait: that
bounds memory and the longest step, and what waits still finds its keys in a layer with a window.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from puna.core.errors import PunaError
from puna.model.paged import BLOCK

if TYPE_CHECKING:
    from puna.model.spec import LlamaSpec
    from puna.model.stepper import Read


@dataclass(frozen=True)
class EarlyExit:
    """Behind which layers a token may leave, counted from 1, and above which probability of its likeliest.

    A threshold of 1 or more is never exceeded.
    """

    layers: tuple[int, ...]
    thresholds: tuple[float, ...]

    def __post_init__(self) -> None:
        rising = all(later > earlier for earlier, later in itertools.pairwise((0, *self.layers)))
        if not self.layers or not rising:
            raise PunaError(
                "exits are numbers of layers that rise from 1 on", where="exits", found=list(self.layers)
            )
        if len(self.thresholds) != len(self.layers) or any(not value >= 0 for value in self.thresholds):
            raise PunaError(
                "each exit needs a threshold of at least 0",
                where="thresholds",
                found=list(self.thresholds),
                expected=f"{len(self.layers)} numbers",
            )

    def check(self, layers: int) -> None:
        """Refuse an exit that is not below the last of so many layers."""
        if self.layers[-1] >= layers:
            raise PunaError(
                "an exit lies behind a layer below the last",
                where="exits",
                found=self.layers[-1],
                expected=f"at most {layers - 1}, the model has {layers} layers",
            )

    def threshold(self, layer: int) -> float | None:
        """The threshold of the exit behind ``layer``; None where there is none."""
        return dict(zip(self.layers, self.thresholds, strict=True)).get(layer)


@dataclass
class Climbed:
    """What a step gave, read by read.

    ``outputs`` [outputs, hidden] behind the final norm, ``depths`` the layers below them, ``ready`` their
    logits [outputs, vocab] where an exit has asked for them already, ``skipped`` feed-forwards left out.
    """

    outputs: list[Tensor]
    depths: list[int]
    ready: list[Tensor | None]
    skipped: list[int]


class LayerRanges(Protocol):
    """What the climb asks of a stepper."""

    spec: LlamaSpec
    skipped: Sequence[int]
    depths: Sequence[int]
    ready: Sequence[Tensor | None]

    def run(
        self, reads: Sequence[Read], first: int, last: int, entering: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        """Layers ``first`` to ``last`` - 1 over rows [rows, hidden] that enter, or the embeddings of the ids.

        Gives, per read, states [outputs, hidden] behind the final norm, and the stream [rows, hidden], for
        which nobody asks behind the last layer.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [rows, vocab] of such states."""
        ...


@dataclass
class _Climber:
    """A read on its way up: its new rows [rows, hidden] between two exits; None: they are still ids."""

    place: int
    read: Read
    stream: Tensor | None = field(default=None)


def read_through(stepper: LayerRanges, reads: Sequence[Read]) -> list[Tensor]:
    """A step: all reads through all layers, or as far as they climb; sequences advance.

    Room has been reserved. Gives, per read, states behind the final norm; what else is told of the step
    is set on the stepper.
    """
    if any(read.exits is not None or read.sequence.waiting for read in reads):
        climbed = climb(stepper, reads)
        outputs, stepper.skipped = climbed.outputs, climbed.skipped
        stepper.depths, stepper.ready = climbed.depths, climbed.ready
    else:
        layers = len(stepper.spec.blocks)
        outputs, _ = stepper.run(reads, 0, layers, None)
        stepper.depths, stepper.ready = [layers] * len(reads), [None] * len(reads)
    for read in reads:
        read.sequence.advance(len(read.ids))
    return outputs


def climb(stepper: LayerRanges, reads: Sequence[Read]) -> Climbed:
    """Read texts of which some may leave early, or have rows that wait; room has been reserved."""
    layers = len(stepper.spec.blocks)
    nothing: list[Tensor | None] = [None] * len(reads)
    climbed = Climbed([torch.empty(0)] * len(reads), [layers] * len(reads), nothing, [0] * len(reads))
    groups: dict[tuple[int, ...], list[_Climber]] = {}
    for place, read in enumerate(reads):
        inner = set(read.sequence.waiting)
        if read.exits is not None:
            read.exits.check(layers)
            inner.update(read.exits.layers)
        if read.skip is not None and inner:
            raise ValueError("a text is read with exits or with skips, not with both")
        groups.setdefault(tuple(sorted(inner)), []).append(_Climber(place, read))
    for inner_layers, climbers in groups.items():
        for first, last in itertools.pairwise((0, *inner_layers, layers)):
            climbers = _pass(stepper, climbers, first, last, climbed)
            if not climbers:
                break
    return climbed


def _pass(
    stepper: LayerRanges, climbers: Sequence[_Climber], first: int, last: int, climbed: Climbed
) -> list[_Climber]:
    """Take the climbers, and what waits before ``first``, through some layers; gives those that go on."""
    top = last == len(stepper.spec.blocks)
    lines, rows = [], []
    for climber in climbers:
        read, sequence = climber.read, climber.read.sequence
        outputs = read.outputs if top or _may_leave(read, last) else 0
        if climber.stream is None:
            lines.append(replace(read, outputs=outputs, exits=None))
            continue
        stream = climber.stream
        waiting = sequence.waiting.pop(first, None)
        stream = stream if waiting is None else torch.cat((waiting, stream))
        rows.append(stream)
        start = sequence.length + len(read.ids) - len(stream)
        placeholders = (0,) * len(stream)  # the rows enter as they are: ids only count them
        lines.append(replace(read, ids=placeholders, outputs=outputs, start=start, exits=None))
    outputs_of, streams = stepper.run(lines, first, last, torch.cat(rows) if rows else None)
    if top:
        for climber, hidden, skipped in zip(climbers, outputs_of, stepper.skipped, strict=True):
            climbed.outputs[climber.place] = hidden
            climbed.skipped[climber.place] = skipped
        return []
    parts = torch.split(streams, [len(line.ids) for line in lines])
    leaving = _leaving(stepper, climbers, outputs_of, last, climbed)
    going = []
    for climber, stream, leaves in zip(climbers, parts, leaving, strict=True):
        if leaves:
            climber.read.sequence.wait(last, stream.clone())  # not a view into the rows of other texts
        else:
            going.append(_Climber(climber.place, climber.read, stream))
    return going


def must_climb(position: int) -> bool:
    """Whether the token at this position of a text goes through all layers, however certain they are."""
    return position % BLOCK == BLOCK - 1


def _may_leave(read: Read, layer: int) -> bool:
    """Whether a read may leave behind ``layer``, should it be certain."""
    last = read.sequence.length + len(read.ids) - 1
    return (
        read.exits is not None
        and read.outputs > 0
        and read.exits.threshold(layer) is not None
        and not must_climb(last)
    )


def _leaving(
    stepper: LayerRanges, climbers: Sequence[_Climber], hidden: Sequence[Tensor], layer: int, climbed: Climbed
) -> list[bool]:
    """Which climbers are certain enough to leave behind ``layer``; what they leave with is noted."""
    asking = [place for place, climber in enumerate(climbers) if _may_leave(climber.read, layer)]
    leaving = [False] * len(climbers)
    if not asking:
        return leaving
    asked = [hidden[place] for place in asking]
    logits = torch.split(stepper.logits(torch.cat(asked)), [len(rows) for rows in asked])
    for place, found in zip(asking, logits, strict=True):
        climber = climbers[place]
        assert climber.read.exits is not None
        threshold = climber.read.exits.threshold(layer)
        assert threshold is not None
        if float(found[-1].softmax(0).amax()) > threshold:
            leaving[place] = True
            climbed.outputs[climber.place] = hidden[place]
            climbed.depths[climber.place] = layer
            climbed.ready[climber.place] = found
    return leaving
