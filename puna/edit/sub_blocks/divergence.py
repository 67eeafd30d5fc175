"""How far children are from their parent: mean KL(parent || child) over every token of some text.

System S31, Puzzle (2411.19146): the replace-one score of a variant is that of the parent with this one half
exchanged; a child's predicted divergence is the sum over its halves. Scores are measured layer by layer: what
the layer reads is kept, so that only the layers behind it run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, cast

import numpy
import torch
from torch import Tensor

from puna.core.progress import Track
from puna.edit.sub_blocks.library import Choice, Library, block_with, half_of
from puna.edit.sub_blocks.variants import HALVES, PARENT, Half
from puna.model.attention import Layout, lay_out
from puna.text.packing import Batch
from puna.train.distillation import kl

if TYPE_CHECKING:
    from puna.model.llama import Block, Llama

_CHUNK = 256  # positions whose logits are there together
Scores = dict[tuple[int, Half, str], float]


@torch.no_grad()
def final_states(model: Llama, batches: Iterable[Batch]) -> list[Tensor]:
    """Hidden states behind the last norm, [rows, time, hidden] for each batch."""
    return [_final(model, batch.to(model.device)) for batch in batches]


def _final(model: Llama, batch: Batch) -> Tensor:
    return model.hidden(batch.input_ids, batch.positions, batch.segments)


@torch.no_grad()
def summed_kl(parent: Llama, theirs: Tensor, child: Llama, ours: Tensor) -> float:
    """Sum over all positions of KL(parent || child) in nats, of final hidden states [rows, time, hidden]."""
    total = 0.0
    flat = [torch.split(states.flatten(0, 1), _CHUNK) for states in (theirs, ours)]
    for parents, childs in zip(*flat, strict=True):
        found = kl(child.logits(childs), parent.logits(parents), "forward")
        total += float(found.double().sum().cpu())
    return total


def mean_kl(parent: Llama, states: Sequence[Tensor], child: Llama, batches: Sequence[Batch]) -> float:
    """Mean over all tokens of KL(parent || child) in nats; ``states`` are the parent's final ones."""
    total = 0.0
    for batch, theirs in zip(batches, states, strict=True):
        with torch.no_grad():
            total += summed_kl(parent, theirs, child, _final(child, batch.to(child.device)))
    return total / _tokens(states)


def _tokens(states: Sequence[Tensor]) -> int:
    return sum(part.shape[0] * part.shape[1] for part in states)


class _Streams:
    """What the next layer reads, for all batches."""

    def __init__(self, model: Llama, batches: Sequence[Batch]) -> None:
        self.model = model
        self.layouts: list[Layout] = []
        self.hidden: list[Tensor] = []
        self.rotations = []
        for batch in batches:
            ids = batch.input_ids.to(model.device)
            here = batch.to(model.device)
            layout = lay_out(len(ids), ids.shape[1], ids.device, here.positions, here.segments, None)
            self.layouts.append(layout)
            self.hidden.append(model.model.embed_tokens(ids))
            self.rotations.append(model._rotations(layout.positions, self.hidden[-1].dtype))

    def through(self, place: int, blocks: Iterable[Block]) -> Tensor:
        """The stream of one batch behind some blocks."""
        hidden = self.hidden[place]
        for block in blocks:
            hidden = block(hidden, self.rotations[place], self.layouts[place], None)
        return hidden

    def advance(self, block: Block) -> None:
        """Go behind a block."""
        self.hidden = [self.through(place, [block]) for place in range(len(self.hidden))]


@torch.no_grad()
def replace_one(
    parent: Llama,
    library: Library,
    batches: Sequence[Batch],
    *,
    known: Callable[[int], Scores | None] = lambda _layer: None,
    finished: Callable[[int, Scores], None] = lambda _layer, _scores: None,
) -> Scores:
    """Mean KL(parent || parent with this half exchanged) of every variant of the library.

    ``known`` gives a layer's scores that were measured before, and ``finished`` is told of those that are.
    Time is a pass over the layers behind it for every variant; memory holds two streams of all batches.
    """
    states = final_states(parent, batches)
    streams = _Streams(parent, batches)
    blocks = cast("Sequence[Block]", list(cast("Iterable[Block]", parent.model.layers)))
    scores: Scores = {}
    with Track("replace-one scores", len(blocks), "layers") as track:
        for layer, block in enumerate(blocks):
            found = known(layer)
            if found is None:
                found = {}
                for half in HALVES:
                    for variant in library.variants(layer, half):
                        if variant != PARENT:
                            tensors = half_of(parent, library, layer, half, variant)
                            swapped = block_with(parent, layer, half, variant, tensors)
                            behind = [swapped, *blocks[layer + 1 :]]
                            found[layer, half, variant] = _score(parent, states, streams, behind)
                finished(layer, found)
            scores |= found
            streams.advance(block)
            track.advance()
    return scores


def _score(parent: Llama, states: Sequence[Tensor], streams: _Streams, behind: Sequence[Block]) -> float:
    total = 0.0
    for place, theirs in enumerate(states):
        ours = parent.model.norm(streams.through(place, behind))
        total += summed_kl(parent, theirs, parent, ours)
    return total / _tokens(states)


def predicted(scores: Scores, choice: Choice) -> float:
    """The sum of a child's replace-one scores; the parent's own halves have none."""
    return sum(
        scores[layer, half, variant]
        for layer, names in enumerate(choice)
        for half, variant in zip(HALVES, names, strict=True)
        if variant != PARENT
    )


def random_choices(library: Library, count: int, generator: numpy.random.Generator) -> list[Choice]:
    """Random children: each draws the share of its halves that are exchanged, then those, then for what."""
    found: list[Choice] = []
    for _ in range(count):
        share = generator.uniform(0, 1)
        names: list[list[str]] = []
        for layer in range(len(library.layers)):
            names.append([])
            for half in HALVES:
                others = [variant for variant in library.variants(layer, half) if variant != PARENT]
                exchanged = bool(others) and generator.uniform() < share
                drawn = others[int(generator.integers(len(others)))] if exchanged else PARENT
                names[-1].append(drawn)
        found.append(tuple((attention, feed_forward) for attention, feed_forward in names))
    return found
