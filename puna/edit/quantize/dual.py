"""Two numbers for each group of a dual binary grid, learnt from the whole model: the training of DB-LLM.

System S18, DB-LLM (2402.11960). The codes of a weight are those of its nearest level, made anew in every
pass; only the two numbers a1 and a2 of each group get gradients, through the levels that their codes take.
The student learns the teacher's distribution by forward KL, position by position, and positions at which the
teacher is unsure count more: by its entropy over the mean entropy of the batch. Simplified: that weight is
our reading of "deviation-aware".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from puna.edit.quantize.grids import fit_dual
from puna.edit.quantize.planners import group_starts
from puna.edit.quantize.settings import DualBinary
from puna.model.nf4 import replace_layer
from puna.train.distillation import LinearTeacher, linear_kl
from puna.train.objectives import IGNORED, Loss

if TYPE_CHECKING:
    from puna.model.llama import Llama
    from puna.train.loader import MicroBatch


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, first: Tensor, second: Tensor, layer: DualLinear) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.layer = layer
        return functional.linear(hidden, layer.decoded(), layer.bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (hidden,) = ctx.saved_tensors
        has_first, has_second = ctx.layer.digits()
        decoded = ctx.layer.combined(has_first, has_second)
        to_weight = gradient.flatten(0, -2).T @ hidden.flatten(0, -2)  # [outputs, inputs]
        to_first = ctx.layer.sums(to_weight * has_first)
        return gradient @ decoded, to_first, ctx.layer.sums(to_weight * has_second), None


class DualLinear(nn.Module):
    """A linear layer with weights a1 * b1 + a2 * b2; ``first`` and ``second`` [outputs, groups] are
    learnt.
    """

    weight: Tensor

    def __init__(self, linear: nn.Linear, grid: DualBinary) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.group = grid.group or linear.in_features
        self.register_buffer("weight", linear.weight.detach().clone())
        self.bias = linear.bias
        weights = self.weight.T
        starts = group_starts(self.in_features, grid.group)
        both = [fit_dual(weights[start : start + self.group]) for start in starts]
        self.first = nn.Parameter(torch.stack([pair[0] for pair in both], dim=1))
        self.second = nn.Parameter(torch.stack([pair[1] for pair in both], dim=1))

    def _wide(self, values: Tensor) -> Tensor:
        return values.detach().repeat_interleave(self.group, dim=1)[:, : self.in_features]

    @torch.no_grad()
    def digits(self) -> tuple[Tensor, Tensor]:
        """b1 and b2 of the nearest levels, bool [outputs, inputs]."""
        first, second = self._wide(self.first), self._wide(self.second)
        best = self.weight.abs()
        has_first, has_second = (
            torch.zeros_like(best, dtype=torch.bool),
            torch.zeros_like(best, dtype=torch.bool),
        )
        for level, one, two in ((first, True, False), (second, False, True), (first + second, True, True)):
            distance = (self.weight - level).abs()
            nearer = distance < best
            best = torch.where(nearer, distance, best)
            has_first = torch.where(nearer, one, has_first)
            has_second = torch.where(nearer, two, has_second)
        return has_first, has_second

    def combined(self, has_first: Tensor, has_second: Tensor) -> Tensor:
        """The weights of digits."""
        return self._wide(self.first) * has_first + self._wide(self.second) * has_second

    @torch.no_grad()
    def decoded(self) -> Tensor:
        """The weights [outputs, inputs]."""
        return self.combined(*self.digits())

    def sums(self, values: Tensor) -> Tensor:
        """Sums over each group, [outputs, groups]."""
        padded = functional.pad(values, (0, -self.in_features % self.group))
        return padded.view(self.out_features, -1, self.group).sum(dim=2)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        found = _Product.apply(hidden, self.first, self.second, self)  # type: ignore[no-untyped-call]
        return cast(Tensor, found)


def put_in(model: Llama, grid: DualBinary) -> None:
    """Replace all projections in place; only their numbers are trained then."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name.startswith("model.layers."):
            replace_layer(model, name, DualLinear(module, grid))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith((".first", ".second")))


@torch.no_grad()
def take_out(model: Llama) -> None:
    """Plain layers again, with the weights of the numbers in half precision; nothing stays frozen."""
    for name, module in list(model.named_modules()):
        if isinstance(module, DualLinear):
            module.first.copy_(module.first.half().float())
            module.second.copy_(module.second.half().float())
            linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(module.decoded())
            linear.bias = module.bias
            replace_layer(model, name, linear)
    model.requires_grad_(True)


@dataclass(frozen=True)
class DeviationAware:
    """Forward KL from ``teacher``, weighted by the teacher's entropy."""

    teacher: Llama
    figures: tuple[str, ...] = ()

    def __call__(self, model: Llama, micro: MicroBatch) -> Loss:
        """Sum over the labelled positions."""
        batch = micro.batch
        labelled = batch.labels != IGNORED
        with torch.no_grad():
            theirs = self.teacher.hidden(batch.input_ids, batch.positions, batch.segments)
            entropies = torch.zeros(labelled.shape)
            entropies[labelled] = _entropy(theirs[labelled], self.teacher.head_weight)
        weights = entropies / entropies[labelled].mean().clamp(min=1e-6)
        hidden = model.hidden(batch.input_ids, batch.positions, batch.segments)
        teacher = LinearTeacher(theirs, self.teacher.head_weight)
        found = linear_kl(hidden, model.head_weight, teacher, "forward", weights=weights)
        return Loss(found.total, found.positions)


def _entropy(hidden: Tensor, head: Tensor) -> Tensor:
    """Entropy in nats of each position's distribution, [positions]."""
    parts = []
    for rows in torch.split(hidden, 64):
        logs = (rows @ head.T).float().log_softmax(-1)
        parts.append(-(logs.exp() * logs).sum(dim=-1))
    return torch.cat(parts)
