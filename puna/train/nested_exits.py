"""Learning to end in words at several depths: one set of weights whose beginnings are models too.

System S24, Sorted LLaMA (Kavehzadeh and others 2023, arXiv:2309.08968), its sorted fine-tuning: the loss of a
position is the mean of the cross-entropies behind the layers ``exits`` and behind the last, all through
the model's one final norm and head. There is no distillation and no exit has a head of its own. All depths
go through the head as rows of one product, a chunk at a time: neither their logits nor more than one
gradient of the head ever exist together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from puna.core.errors import PunaError
from puna.train.objectives import Loss, linear_cross_entropy

if TYPE_CHECKING:
    from puna.model.llama import Llama
    from puna.train.loader import MicroBatch


def check_exits(exits: Sequence[int], layers: int) -> None:
    """Refuse exits that are not behind layers below the last of ``layers``."""
    if exits and exits[-1] >= layers:
        raise PunaError(
            "an exit lies behind a layer below the last; the last is always learnt",
            where="exits",
            found=exits[-1],
            expected=f"at most {layers - 1}, the model has {layers} layers",
        )


@dataclass(frozen=True)
class NestedCrossEntropy:
    """The mean over all depths at every labelled token. ``exits`` are numbers of layers, rising."""

    exits: tuple[int, ...]

    @property
    def figures(self) -> tuple[str, ...]:
        """The cross-entropy behind each exit, and behind the last layer."""
        return (*(f"exit_{layer}" for layer in self.exits), "exit_last")

    def __call__(self, model: Llama, micro: MicroBatch) -> Loss:
        """Sums over the labelled tokens."""
        total, tokens = _losses(model, micro, self.exits)
        figures = dict(zip(self.figures, tokens.sum(-1), strict=True))
        return Loss(total / len(tokens), tokens[-1], figures)


@dataclass(frozen=True)
class CrossEntropyAtExits:
    """What is held out is measured by the whole model, as beside any objective, and behind each exit too."""

    exits: tuple[int, ...]

    @property
    def figures(self) -> tuple[str, ...]:
        """The cross-entropy behind each exit."""
        return tuple(f"exit_{layer}" for layer in self.exits)

    def __call__(self, model: Llama, micro: MicroBatch) -> Loss:
        """Sums over the labelled tokens."""
        _, tokens = _losses(model, micro, self.exits)
        *inner, whole = tokens.sum(-1)
        return Loss(whole, tokens[-1], dict(zip(self.figures, inner, strict=True)))


def _losses(model: Llama, micro: MicroBatch, exits: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The sum of the losses at all depths, and each of them, [depths, targets], not differentiable."""
    batch = micro.batch
    depths = (*exits, len(model.spec.blocks))
    states = model.hidden_at(depths, batch.input_ids, batch.positions, batch.segments)
    labels = batch.labels.repeat(len(depths), 1)
    loss = linear_cross_entropy(torch.cat(states), model.head_weight, labels)
    return loss.total, loss.tokens.view(len(depths), -1)
