"""What follows the rounding in three methods of the study, by puna's own loop at a small budget.

* DB-LLM's numbers (:mod:`puna.edit.quantize.dual`).
* QLoRA (2305.14314; S18): a LoRA over weights in NF4, trained on text, then added to the decoded weights.
* IR-QLoRA (2402.05445; S18): a LoRA with parameter-free ways around it, h = A x + b1 * groupmean(x) and y = B
  h + b2 * repeat(h), b1 and b2 learnt and 0 at first. Both are linear, so they are put into A and B after
  training: A + b1 * P, B + b2 * R. Widths that the rank does not divide are refused.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from puna.core.errors import PunaError
from puna.edit.quantize.dual import DeviationAware, put_in, take_out
from puna.edit.quantize.settings import DualBinary
from puna.model.adapters import NAME, LoraSettings, add_lora, lora_layers, merge_lora
from puna.text.encode import Encoded
from puna.text.packing import pack
from puna.train.loader import Feed
from puna.train.loop import Loop, LoopSettings
from puna.train.objectives import CrossEntropy, Objective
from puna.train.optimizer import Optimizer, OptimizerSettings
from puna.train.schedule import preset

if TYPE_CHECKING:
    from puna.model.llama import Llama


@dataclass(frozen=True)
class Budget:
    """How much a training after rounding may take. ``rate`` of learning; rows of a step; the LoRA's rank."""

    steps: int = 12
    rows: int = 2
    rate: float = 2e-4
    rank: int = 16


def learn(model: Llama, rows: Tensor, objective: Objective, budget: Budget, seed: int) -> None:
    """Train what needs a gradient on ``rows`` [rows, time], in place."""
    encoded = [Encoded(row, [False] + [True] * (len(row) - 1)) for row in rows.tolist()]
    tokens = budget.rows * rows.shape[1]
    feed = Feed(
        pack(encoded, rows.shape[1], mode="off"), batch_tokens=tokens, micro_batch_tokens=tokens, seed=seed
    )
    steps, total = feed.count(max_steps=budget.steps)
    schedule = preset("constant", steps, 1)
    optimizer = Optimizer(model.named_parameters(), OptimizerSettings(learning_rate=budget.rate))
    scratch = Path(tempfile.mkdtemp(prefix="puna-tuning-"))
    try:
        settings = LoopSettings(steps, total, schedule, seed=seed, logging_steps=steps)
        Loop(model, feed, objective, optimizer, settings, out=scratch, recipe={}).run()
    finally:
        optimizer.close()
        shutil.rmtree(scratch, ignore_errors=True)
    model.eval()


def tune_dual(
    model: Llama, teacher: Llama, grid: DualBinary, rows: Tensor, budget: Budget, seed: int
) -> None:
    """Round ``model``, plain and exact, to the dual grid and learn its numbers from ``teacher``."""
    put_in(model, grid)
    learn(model, rows, DeviationAware(teacher), budget, seed)
    take_out(model)


def tune_lora(model: Llama, rows: Tensor, budget: Budget, seed: int, *, pooled: bool) -> None:
    """Learn a LoRA over rounded weights and add it to them. The weights under it stay as they are
    meanwhile.
    """
    add_lora(model, LoraSettings(r=budget.rank, alpha=2.0 * budget.rank), seed=seed)
    if pooled:
        pool(model)
    learn(model, rows, CrossEntropy(), budget, seed)
    if pooled:
        settle(model)
    merge_lora(model)


class _Around(nn.Module):
    """A matrix plus a learnt number times a fixed matrix: group means on the way in, repetition on the
    way out.
    """

    fixed: Tensor

    def __init__(self, fixed: Tensor) -> None:
        super().__init__()
        self.register_buffer("fixed", fixed)
        self.strength = nn.Parameter(torch.zeros(()))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.strength * self.fixed


def pool(model: Llama) -> None:
    """Give each LoRA its ways around; the model does not change by a bit, since they begin at 0."""
    for name, layer in lora_layers(model):
        down, up = layer.lora_A[NAME], layer.lora_B[NAME]
        rank, inputs = down.weight.shape
        outputs = len(up.weight)
        if inputs % rank or outputs % rank:
            raise PunaError(
                "ways around a LoRA need widths that its rank divides",
                where=name,
                found=f"{inputs} inputs and {outputs} outputs at rank {rank}",
            )
        groups = torch.eye(rank)
        parametrize.register_parametrization(
            down, "weight", _Around(groups.repeat_interleave(inputs // rank, dim=1) * (rank / inputs))
        )
        parametrize.register_parametrization(
            up, "weight", _Around(groups.repeat_interleave(outputs // rank, dim=0))
        )


def settle(model: Llama) -> None:
    """Put the ways around into the LoRA's own matrices."""
    for linear in _pooled(model):
        parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)


def _pooled(model: Llama) -> Iterable[Any]:
    for _, layer in lora_layers(model):
        yield layer.lora_A[NAME]
        yield layer.lora_B[NAME]
