"""Blockwise local distillation: every variant learns to do in its layer what the parent's half does there.

System S31, Puzzle (2411.19146), decoupled: a variant of attention stands before the parent's frozen feed-
forward, a variant of the feed-forward behind the parent's attention, so that m + n variants of a layer are
trained and not m times n blocks. Each reads what the parent's layer reads and learns what the parent's layer
gives: mean squared error over that of a block that gives zero. Variants do not see each other, so that a
layer comes out the same whichever layers are trained beside it. Left out: the paper's coupled pass over the
sub-space that a first search has shortlisted.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from puna.core.progress import Track
from puna.edit.sub_blocks.library import block_with
from puna.edit.sub_blocks.variants import Half, of_half
from puna.model.attention import lay_out
from puna.text.packing import Batch
from puna.train.optimizer import Optimizer, OptimizerSettings
from puna.train.schedule import factor, preset

if TYPE_CHECKING:
    from puna.model.llama import Block, Llama

Weights = dict[str, Tensor]
Key = tuple[Half, str]
"""Of a layer: a half and its variant."""


@dataclass(frozen=True)
class LocalSettings:
    """Steps of AdamW with a warm-up and a cosine behind it, for every variant alike."""

    steps: int
    learning_rate: float
    warmup_ratio: float = 0.05
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class Learnt:
    """A variant's float32 weights, and its losses: the first, and the mean of the last tenth of the steps."""

    weights: Weights
    first_loss: float
    last_loss: float


class Pupil:
    """One variant in its layer, with its optimiser."""

    def __init__(
        self, parent: Llama, layer: int, key: Key, weights: Mapping[str, Tensor], settings: LocalSettings
    ) -> None:
        self.half, self.variant = key
        own = {name: tensor.clone() for name, tensor in weights.items()}
        self.block = block_with(parent, layer, self.half, self.variant, own)
        for name, parameter in self.block.named_parameters():
            parameter.requires_grad_(name in own)
        chosen = OptimizerSettings(settings.learning_rate, max_grad_norm=settings.max_grad_norm)
        self.optimizer = Optimizer(self.block.named_parameters(), chosen)
        self.losses: list[float] = []

    def learn(self, output: Tensor, target: Tensor, rate: float) -> None:
        """One step towards the parent's output, [rows, time, hidden] both."""
        wanted = target.float()
        loss = (output.float() - wanted).square().mean() / wanted.square().mean()
        torch.autograd.backward([loss])
        self.optimizer.step(rate, 1.0, self.optimizer.gradient_norm(1.0))
        self.losses.append(float(loss.detach()))

    def learnt(self) -> Learnt:
        """What it has come to; its hooks are taken away."""
        weights = {name: tensor.clone().cpu() for name, tensor in self.optimizer.weights().items()}
        self.optimizer.close()
        last = self.losses[-max(1, len(self.losses) // 10) :]
        return Learnt(weights, self.losses[0], statistics.fmean(last))


def distil_layers(
    parent: Llama,
    starts: Mapping[int, Mapping[Key, Mapping[str, Tensor]]],
    batches: Iterable[Batch],
    settings: LocalSettings,
) -> dict[int, dict[Key, Learnt]]:
    """Train the variants of some layers on the same batches; ``starts`` are their weights, by layer.

    Time is a forward pass of the parent up to the last of the layers, and three of every variant (an
    attention variant's through the parent's feed-forward too); memory holds weights, gradients and moments of
    the variants and the activations of one batch.
    """
    pupils = {
        layer: [Pupil(parent, layer, key, weights, settings) for key, weights in variants.items()]
        for layer, variants in starts.items()
    }
    warmup = round(settings.warmup_ratio * settings.steps)
    schedule = preset("cosine", settings.steps, warmup)
    with Track("sub-blocks", settings.steps, "steps") as track:
        for step, batch in zip(range(settings.steps), batches, strict=False):
            _step(parent, pupils, batch.to(parent.device), factor(step, schedule))
            track.advance()
    return {
        layer: {(pupil.half, pupil.variant): pupil.learnt() for pupil in found}
        for layer, found in pupils.items()
    }


def _step(parent: Llama, pupils: Mapping[int, Sequence[Pupil]], batch: Batch, rate: float) -> None:
    ids = batch.input_ids
    layout = lay_out(len(ids), ids.shape[1], ids.device, batch.positions, batch.segments, None)
    with torch.no_grad():
        hidden = parent.model.embed_tokens(ids)
    rotations = parent._rotations(layout.positions, hidden.dtype)
    for layer in range(max(pupils) + 1):
        block = cast("Block", parent.model.layers[layer])
        with torch.no_grad():
            middle = block.attend(hidden, rotations, layout, None)
            target = block.feed(middle)
        for pupil in pupils.get(layer, ()):
            if pupil.half == "attention":
                output = pupil.block(hidden, rotations, layout, None)
            else:
                output = pupil.block.feed(middle)
            pupil.learn(output, target, rate)
        hidden = target


def untrained(starts: Mapping[Key, Mapping[str, Tensor]]) -> dict[Key, Learnt]:
    """The same without a step: initial weights."""
    return {
        key: Learnt(
            {name: tensor.float().cpu().clone() for name, tensor in weights.items()},
            float("nan"),
            float("nan"),
        )
        for key, weights in starts.items()
    }


def parent_half(parent: Llama, layer: int, half: Half) -> Weights:
    """The parent's own weights of a half, by their names in the layer."""
    return of_half(parent.state_dict(), layer, half)
