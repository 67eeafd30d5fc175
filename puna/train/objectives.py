"""The loss at the head, and what an objective is to the loop.

An objective gives the summed loss of a micro-batch (:class:`Loss`): sums, so that neither the cut
into micro-batches nor the number of processes matters. The head is applied and the loss taken only
at positions that have a label, a chunk of positions at a time (:mod:`puna.train.linear_loss`), so
that the logits of a whole batch never exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from puna.train.linear_loss import add_product, chunk_for, linear_loss, rows_at_a_time

if TYPE_CHECKING:
    from puna.model.llama import Llama
    from puna.train.loader import MicroBatch

IGNORED = -100
"""The label of a position at which nothing is learnt."""


@dataclass(frozen=True)
class Loss:
    """What an objective returns for one batch.

    ``total`` is the sum of the losses of its units, tokens or pairs (a differentiable float32
    scalar), ``tokens`` the cross-entropy of each labelled position in nats, or its divergence from a
    teacher, in reading order (float32, [targets], not differentiable). ``figures`` are sums over the
    units of what else is logged, scalars. The step divides by the units of all its micro-batches on all
    processes.
    """

    total: Tensor
    tokens: Tensor
    figures: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def targets(self) -> int:
        """How many positions have a label."""
        return self.tokens.numel()


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk: int | None = None) -> Loss:
    """Cross-entropy of ``softmax(hidden @ weight.T)`` against ``labels`` at labelled positions.

    ``hidden`` is [..., width], ``weight`` [vocabulary, width] in the same dtype, ``labels`` int64
    [...] with :data:`IGNORED` where nothing is learnt. Products run in the dtype of ``hidden``, the
    softmax and the sums over chunks in float32. Only gradients that are needed are computed.
    """
    flat = labels.reshape(-1)
    places = (flat != IGNORED).nonzero()[:, 0]  # [targets]
    wanted = flat[places]

    def to_gradient_(logits: Tensor, part: slice, losses: Tensor) -> None:
        _softmax_minus_one_hot_(logits, wanted[part], losses)

    rows = hidden.reshape(-1, hidden.shape[-1])
    return Loss(*linear_loss(rows, weight, places, to_gradient_, chunk=chunk))


def linear_log_probs(hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk: int | None = None) -> Tensor:
    """Log-probability of each label under ``softmax(hidden @ weight.T)``, in reading order.

    Arguments as in :func:`linear_cross_entropy`; float32 [targets], differentiable token by token. A
    token's gradient towards ``hidden`` is made in the forward pass and scaled in the backward pass;
    that towards ``weight``, if it is needed, takes the logits a second time.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    log_probs: Tensor = _LinearLogProbs.apply(  # type: ignore[no-untyped-call]
        flat, weight, labels.reshape(-1), chunk_for(weight, chunk)
    )
    return log_probs


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        places = (labels != IGNORED).nonzero()[:, 0]  # [targets]
        rows, wanted = hidden[places], labels[places]
        losses = torch.empty(len(places), dtype=torch.float32, device=hidden.device)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        row_gradient = torch.empty_like(rows) if needs_hidden else None
        for start in range(0, len(places), chunk):
            part = slice(start, start + chunk)
            logits = rows[part] @ weight.T  # [chunk, vocabulary]
            _softmax_minus_one_hot_(logits, wanted[part], losses[part])
            if row_gradient is not None:
                torch.mm(logits, weight, out=row_gradient[part])
        kept = (rows, weight, wanted) if needs_weight else (None, None, None)
        ctx.save_for_backward(places, row_gradient, *kept)
        ctx.shape, ctx.chunk = hidden.shape, chunk
        return losses.neg_()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        places, row_gradient, rows, weight, wanted = ctx.saved_tensors
        to_hidden = to_weight = None
        if row_gradient is not None:
            to_hidden = row_gradient.new_zeros(ctx.shape)
            to_hidden[places] = (row_gradient * -gradient[:, None]).to(row_gradient.dtype)
        if rows is not None:
            for start in range(0, len(places), ctx.chunk):
                part = slice(start, start + ctx.chunk)
                logits = rows[part] @ weight.T
                _softmax_minus_one_hot_(logits, wanted[part], torch.empty_like(gradient[part]))
                scaled = (rows[part] * -gradient[part, None]).to(rows.dtype)
                to_weight = add_product(to_weight, logits.T @ scaled)
            to_weight = torch.zeros_like(weight) if to_weight is None else to_weight.to(weight.dtype)
        return to_hidden, to_weight, None, None


def _softmax_minus_one_hot_(logits: Tensor, wanted: Tensor, losses: Tensor) -> None:
    """Turn ``logits`` [n, vocabulary] into d loss / d logits in place and fill ``losses`` [n].

    The float32 copies are made of a few rows at a time: on a CPU they then stay in the cache, which
    makes this several times faster than over the whole chunk.
    """
    runs = rows_at_a_time(logits)
    for start in runs:
        part = logits[start : start + runs.step]
        label = wanted[start : start + runs.step, None]
        scores = part.float()
        probabilities = torch.softmax(scores, dim=-1)
        # log sum exp, read off at the most probable token: its probability is never zero
        log_sum = scores.amax(-1) - probabilities.amax(-1).log()
        losses[start : start + runs.step] = log_sum - scores.gather(1, label)[:, 0]
        probabilities.scatter_add_(1, label, torch.full_like(label, -1.0, dtype=torch.float32))
        part.copy_(probabilities)


Unit = Literal["tokens", "pairs"]
"""What a step's loss is the mean of."""


class Objective(Protocol):
    """What the loop asks of an objective: the loss of one micro-batch.

    ``figures`` names what it logs beside the loss: the keys of every :class:`Loss` it returns.
    """

    @property
    def figures(self) -> tuple[str, ...]:
        """Names of the figures of each loss."""
        ...

    def __call__(self, model: Llama, micro: MicroBatch) -> Loss:
        """The summed loss of the units in ``micro``, on the model's device."""
        ...


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy at every labelled token; which tokens have labels, the rows say.

    Of documents every token is learnt (``clm``), of conversations the turns of the trained roles,
    end of turn included (``sft``).
    """

    figures: tuple[str, ...] = ()

    def __call__(self, model: Llama, micro: MicroBatch) -> Loss:
        """Sum over the labelled tokens."""
        batch = micro.batch
        hidden = model.hidden(batch.input_ids, batch.positions, batch.segments)
        return linear_cross_entropy(hidden, model.head_weight, batch.labels)


@dataclass(frozen=True)
class ObjectiveKind:
    """An objective's name stands for this: the corpus it learns from, and what its loss is the mean of."""

    kind: Literal["documents", "messages", "preferences"]
    unit: Unit


OBJECTIVES: dict[str, ObjectiveKind] = {
    "clm": ObjectiveKind("documents", "tokens"),
    "sft": ObjectiveKind("messages", "tokens"),
    "distill": ObjectiveKind("documents", "tokens"),
    "distill_sft": ObjectiveKind("messages", "tokens"),
    "dpo": ObjectiveKind("preferences", "pairs"),
    "length_normalised_dpo": ObjectiveKind("preferences", "pairs"),
    "ipo": ObjectiveKind("preferences", "pairs"),
    "orpo": ObjectiveKind("preferences", "pairs"),
    "simpo": ObjectiveKind("preferences", "pairs"),
    "cpo": ObjectiveKind("preferences", "pairs"),
}
