"""Distillation objectives: divergences from a teacher's distribution, and distances of hidden states.

The student p_s learns from a teacher p_t of the same vocabulary, position by position:

* forward KL(p_t || p_s), which spreads the student over all the teacher finds likely (1503.02531);
* reverse KL(p_s || p_t), which keeps the student to what the teacher finds likely (2306.08543);
* either over the teacher's ``k`` likeliest tokens only, both sides renormalised there: exact, never
  negative, and the full divergence at k = vocabulary. Baichuan Alignment (2410.14940) holds a policy
  to its reference so, with k = 500. It says nothing about the mass outside those tokens.

The student's head is applied a chunk of positions at a time (:mod:`puna.train.linear_loss`); the teacher's
logits are made, or fetched, for the same chunk. Logits are finite: no token is ever ruled out. A temperature
divides both sides' logits, and the loss is not multiplied by its square.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from puna.core.errors import PunaError, unknown_name
from puna.train.arguments import precise, precise_dtype, require_positive, require_setting, require_shape
from puna.train.linear_loss import CHUNK, linear_loss, rows_at_a_time

Direction = Literal["forward", "reverse"]
DIRECTIONS = ("forward", "reverse")


@dataclass(frozen=True)
class PositionLoss:
    """What an objective over positions returns for one batch.

    ``total`` is the sum over the positions, weighted where weights are given (a differentiable
    scalar), ``positions`` the loss of each that was not left out, in reading order and unweighted
    ([count], not differentiable); both float32. Sums, not means, as in :mod:`puna.train.objectives`.
    """

    total: Tensor
    positions: Tensor

    @property
    def count(self) -> int:
        """How many positions were not left out."""
        return self.positions.numel()


@dataclass(frozen=True)
class TopTokens:
    """The likeliest tokens of a teacher at each position, likeliest first.

    ``ids`` is int32 or int64 [..., k]; ``log_probs`` [..., k] are natural logarithms of their
    probabilities in the whole distribution, in float16 or wider.
    """

    ids: Tensor
    log_probs: Tensor

    def __post_init__(self) -> None:
        require_shape("log_probs", self.log_probs, self.ids.shape)
        if self.ids.dtype not in (torch.int32, torch.int64):
            raise PunaError(
                "ids of tokens are whole numbers", found=self.ids.dtype, expected="int32 or int64"
            )

    def at(self, places: Tensor) -> TopTokens:
        """Those at some positions: ``places`` bool [positions], the teacher's being in one row."""
        return TopTokens(self.ids[places], self.log_probs[places])

    def first(self, k: int | None) -> TopTokens:
        """The ``k`` likeliest of them, or all if ``k`` is None."""
        held = self.ids.shape[-1]
        if k is None:
            return self
        require_setting(
            1 <= k <= held, "top-k divergence", "k", k, f"1 to {held}, the tokens the teacher kept"
        )
        return TopTokens(self.ids[..., :k], self.log_probs[..., :k])


@dataclass(frozen=True)
class LinearTeacher:
    """A teacher at hand: ``hidden`` [..., its width] and its head ``weight`` [vocabulary, its width]."""

    hidden: Tensor
    weight: Tensor

    def at(self, places: Tensor) -> LinearTeacher:
        """The teacher at some positions: ``places`` bool [positions], its positions being in one row."""
        return LinearTeacher(self.hidden[places], self.weight)


Teacher = LinearTeacher | TopTokens | Tensor
"""A teacher: at hand, its likeliest tokens, or its logits (or log-probabilities) [..., vocabulary]."""


def top_tokens(logits: Tensor, k: int) -> TopTokens:
    """The ``k`` likeliest tokens of ``logits`` [..., vocabulary], with their log-probabilities in float32."""
    require_setting(1 <= k <= logits.shape[-1], "top_tokens", "k", k, f"1 to {logits.shape[-1]}")
    scores = precise(logits)
    values, ids = scores.topk(k, dim=-1)
    return TopTokens(ids, values - scores.logsumexp(-1, keepdim=True))


@torch.no_grad()
def linear_top_tokens(hidden: Tensor, weight: Tensor, k: int, *, chunk: int = CHUNK) -> TopTokens:
    """:func:`top_tokens` of ``hidden @ weight.T``, a chunk of positions at a time; ids are int32.

    ``hidden`` is [..., width], ``weight`` [vocabulary, width]. What a cache of a teacher is made of.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    starts = range(0, max(len(rows), 1), chunk)
    parts = [top_tokens(rows[start : start + chunk] @ weight.T, k) for start in starts]
    shape = (*hidden.shape[:-1], k)
    ids = torch.cat([part.ids for part in parts]).to(torch.int32)
    return TopTokens(ids.reshape(shape), torch.cat([part.log_probs for part in parts]).reshape(shape))


@torch.no_grad()
def linear_likeliest(hidden: Tensor, weight: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """The likeliest token of ``hidden @ weight.T``, a chunk of positions at a time; int64 [...].

    ``hidden`` is [..., width], ``weight`` [vocabulary, width]. No gradient goes through it.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    starts = range(0, max(len(rows), 1), chunk)
    parts = [(rows[start : start + chunk] @ weight.T).argmax(-1) for start in starts]
    return torch.cat(parts).reshape(hidden.shape[:-1])


def kl(student: Tensor, teacher: Tensor, direction: Direction, *, temperature: float = 1.0) -> Tensor:
    """Divergence of two distributions given by logits [..., vocabulary], at each position [...], in nats.

    ``forward`` is KL(teacher || student), ``reverse`` KL(student || teacher). Differentiable in both.
    Rounding never makes it negative. For a batch of a large vocabulary, see :func:`linear_kl`.
    """
    _check_settings(direction, temperature)
    require_shape("the teacher's logits", teacher, student.shape)
    ours = (precise(student) / temperature).log_softmax(-1)
    theirs = (precise(teacher) / temperature).log_softmax(-1)
    value = _sum_of_logs(theirs, ours) if direction == "forward" else _sum_of_logs(ours, theirs)
    return value + (value.clamp(min=0) - value).detach()  # the gradient stays that of the formula


def top_k_kl(
    student: Tensor,
    teacher: TopTokens | Tensor,
    direction: Direction,
    *,
    k: int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """:func:`kl` over the teacher's ``k`` likeliest tokens, both sides renormalised there; [...] in nats.

    ``student`` are logits [..., vocabulary]; ``teacher`` logits of the same shape, or its tokens, of
    which the first ``k`` are taken (all without ``k``).
    """
    if isinstance(teacher, Tensor):
        require_shape("the teacher's logits", teacher, student.shape)
        teacher = top_tokens(teacher, _require_k(k))
    support = teacher.first(k)
    require_shape("the teacher's tokens", support.ids[..., 0], student.shape[:-1])
    _check_ids(support.ids, student.shape[-1])
    scores = student.gather(-1, support.ids.long())
    return kl(scores, support.log_probs, direction, temperature=temperature)


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher: LinearTeacher | Tensor,
    direction: Direction,
    *,
    weights: Tensor | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> PositionLoss:
    """:func:`kl` of ``hidden @ weight.T`` from the teacher over the whole vocabulary.

    ``hidden`` is [..., width], ``weight`` [vocabulary, width] in the same dtype; the teacher's
    positions are the same [...] and it gets no gradient. ``weights`` [...], bool or floating-point,
    multiply the positions' divergences in ``total``; where they are 0 nothing is computed, and
    nothing there matters. Products run in the dtype of ``hidden``, the rest in float32.
    """
    return _linear(hidden, weight, teacher, direction, None, weights, temperature, chunk)


def linear_top_k_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher: Teacher,
    direction: Direction,
    *,
    k: int | None = None,
    weights: Tensor | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> PositionLoss:
    """:func:`top_k_kl` of ``hidden @ weight.T``; arguments otherwise as in :func:`linear_kl`.

    ``k`` may be left out if the teacher is given as its tokens.
    """
    if isinstance(teacher, TopTokens):
        teacher = teacher.first(k)
        k = teacher.ids.shape[-1]
    k = _require_k(k)
    require_setting(k <= len(weight), "top-k divergence", "k", k, f"at most {len(weight)}, the vocabulary")
    return _linear(hidden, weight, teacher, direction, k, weights, temperature, chunk)


def hidden_cosine(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> PositionLoss:
    """1 - cosine of the angle between hidden states [..., width], at positions of ``mask`` (bool [...])."""
    ours, theirs = _masked_pair(student, teacher, mask)
    return _summed(1 - cosine_similarity(ours, theirs, dim=-1))


def hidden_mean_squared_error(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> PositionLoss:
    """Mean over the width of squared differences of hidden states [..., width], at positions of ``mask``."""
    ours, theirs = _masked_pair(student, teacher, mask)
    return _summed(((ours - theirs) ** 2).mean(-1))


def _masked_pair(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    require_shape("the teacher's hidden states", teacher, student.shape)
    if mask is None:
        mask = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device)
    require_shape("mask", mask, student.shape[:-1])
    return precise(student[mask]), precise(teacher.detach()[mask])


def _summed(losses: Tensor) -> PositionLoss:
    return PositionLoss(losses.sum(), losses.detach())


def _linear(
    hidden: Tensor,
    weight: Tensor,
    teacher: Teacher,
    direction: Direction,
    k: int | None,
    weights: Tensor | None,
    temperature: float,
    chunk: int | None,
) -> PositionLoss:
    _check_settings(direction, temperature)
    require_setting(chunk is None or chunk >= 1, "distillation", "chunk", chunk, "at least 1")
    positions = hidden.shape[:-1]
    _check_teacher(teacher, positions, len(weight))
    if weights is None:
        weights = torch.ones(positions, device=hidden.device)
    require_shape("weights", weights, positions)
    job = _Job(_flat(teacher), direction, k, temperature)
    flat = weights.detach().reshape(-1)
    places = flat.nonzero()[:, 0]  # [targets]
    factors = flat[places].to(precise_dtype(hidden))

    def to_gradient_(logits: Tensor, part: slice, losses: Tensor) -> None:
        ids, targets = job.targets(places[part])
        _divergence_to_gradient_(logits, ids, targets, factors[part], losses, job)

    rows = hidden.reshape(-1, hidden.shape[-1])
    sums = linear_loss(rows, weight, places, to_gradient_, dtype=factors.dtype, factors=factors, chunk=chunk)
    return PositionLoss(*sums)


@dataclass(frozen=True)
class _Job:
    """What one call computes; the teacher's positions are in one row."""

    teacher: Teacher
    direction: Direction
    k: int | None
    temperature: float

    def targets(self, places: Tensor) -> tuple[Tensor | None, Tensor]:
        """Ids (None for the whole vocabulary) and logits of the teacher at ``places``, [n, k] each."""
        if isinstance(self.teacher, TopTokens):
            return self.teacher.ids[places].long(), self.teacher.log_probs[places]
        if isinstance(self.teacher, LinearTeacher):
            logits = self.teacher.hidden[places] @ self.teacher.weight.T
        else:
            logits = self.teacher[places]
        if self.k is None:
            return None, logits
        values, ids = logits.topk(self.k, dim=-1)
        return ids, values


def _divergence_to_gradient_(
    logits: Tensor, ids: Tensor | None, targets: Tensor, factors: Tensor, losses: Tensor, job: _Job
) -> None:
    """Turn ``logits`` [n, vocabulary] into their gradient in place and fill ``losses`` [n].

    The float32 copies are made of a few rows at a time: on a CPU they then stay in the cache.
    """
    runs = rows_at_a_time(logits)
    for start in runs:
        part = slice(start, start + runs.step)
        scores = logits[part] if ids is None else logits[part].gather(1, ids[part])
        ours = (precise(scores) / job.temperature).log_softmax(-1)
        theirs = (targets[part].to(ours.dtype) / job.temperature).log_softmax(-1)
        if job.direction == "forward":
            divergence = _sum_of_logs(theirs, ours)
            gradient = ours.exp() - theirs.exp()
        else:
            divergence = _sum_of_logs(ours, theirs)
            gradient = ours.exp() * (ours - theirs - divergence[:, None])
        losses[part] = divergence.clamp(min=0)
        gradient = (gradient * (factors[part, None] / job.temperature)).to(logits.dtype)
        if ids is None:
            logits[part] = gradient
        else:
            logits[part].zero_().scatter_(1, ids[part], gradient)


def _sum_of_logs(first: Tensor, second: Tensor) -> Tensor:
    """KL(first || second) of log-probabilities over the last dimension."""
    return (first.exp() * (first - second)).sum(-1)


def _flat(teacher: Teacher) -> Teacher:
    """The teacher without gradients, its positions in one row."""
    if isinstance(teacher, TopTokens):
        ids, log_probs = teacher.ids.flatten(0, -2), teacher.log_probs.detach().flatten(0, -2)
        return TopTokens(ids, log_probs)
    if isinstance(teacher, LinearTeacher):
        return LinearTeacher(teacher.hidden.detach().flatten(0, -2), teacher.weight.detach())
    return teacher.detach().flatten(0, -2)


def _check_teacher(teacher: Teacher, positions: torch.Size, vocabulary: int) -> None:
    if isinstance(teacher, TopTokens):
        require_shape("the teacher's tokens", teacher.ids[..., 0], positions)
        _check_ids(teacher.ids, vocabulary)
        return
    if isinstance(teacher, LinearTeacher):
        require_shape("the teacher's hidden states", teacher.hidden[..., 0], positions)
        size = len(teacher.weight)
    else:
        require_shape("the teacher's logits", teacher[..., 0], positions)
        size = teacher.shape[-1]
    if size != vocabulary:
        raise PunaError(
            "teacher and student must share one vocabulary",
            found=f"{size} tokens of the teacher, {vocabulary} of the student",
            fix="take a teacher with the student's tokenizer",
        )


def _check_ids(ids: Tensor, vocabulary: int) -> None:
    if bool(((ids < 0) | (ids >= vocabulary)).any()):
        raise PunaError(
            "teacher and student must share one vocabulary",
            found=f"ids {int(ids.min())} to {int(ids.max())} among the teacher's tokens",
            expected=f"0 to {vocabulary - 1}",
        )


def _check_settings(direction: str, temperature: float) -> None:
    if direction not in DIRECTIONS:
        raise unknown_name("direction", direction, DIRECTIONS)
    require_positive("distillation", "temperature", temperature)


def _require_k(k: int | None) -> int:
    if k is None or k < 1:
        raise PunaError("a top-k divergence needs its k", found=k, expected="a number of tokens, at least 1")
    return k
