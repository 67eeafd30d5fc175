"""Policy-gradient objectives of GRPO: pure functions of token log-probabilities with a mask.

Several answers are drawn for each prompt, and an answer's advantage is its reward against the others
of its prompt (DeepSeekMath 2402.03300). The policy follows it within a clipped ratio to the policy
that drew them. The distance from a reference is the exact divergence over the reference's likeliest
tokens (Baichuan Alignment 2410.14940; :func:`puna.train.distillation.linear_top_k_kl`, reverse),
which is never negative, and not an estimate from the drawn token. Simplified against that paper: the
divergence is a term of the loss here, where the paper takes it into the tokens' rewards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from puna.core.errors import PunaError, unknown_name
from puna.train.arguments import precise, require_setting, require_shape

Scale = Literal["group", "batch", "none"]
SCALES = ("group", "batch", "none")
Aggregation = Literal["sequence_mean", "token_mean"]
AGGREGATIONS = ("sequence_mean", "token_mean")

_SMALLEST_DEVIATION = 1e-4  # added to the standard deviation, as in trl


def group_advantages(rewards: Tensor, group_size: int, scale: Scale = "group") -> Tensor:
    """Advantages float32 [answers] of ``rewards`` [answers], the answers of one prompt side by side.

    A reward minus the mean of its group of ``group_size``, divided by the standard deviation (n - 1)
    of the group, of the batch, or (``none``, 2503.20783) not at all. NaN is an answer that could not
    be scored: it enters no mean and its advantage is 0, as is that of the only scored one of a group.
    """
    if scale not in SCALES:
        raise unknown_name("scale of advantages", scale, SCALES)
    require_setting(group_size >= 2, "group_advantages", "group_size", group_size, "at least 2")
    if rewards.ndim != 1 or not len(rewards) or len(rewards) % group_size:
        raise PunaError(
            "rewards do not fill groups",
            found=list(rewards.shape),
            expected=f"[answers], a multiple of {group_size} answers",
        )
    if bool(rewards.isinf().any()):
        raise PunaError("a reward is infinite", expected="finite rewards, or NaN for an unscored answer")
    groups = precise(rewards.detach()).view(-1, group_size)
    advantages = groups - groups.nanmean(dim=1, keepdim=True)
    if scale == "group":
        advantages = advantages / (_deviation(groups) + _SMALLEST_DEVIATION)
    elif scale == "batch":
        advantages = advantages / (_deviation(groups.view(1, -1)) + _SMALLEST_DEVIATION)
    return advantages.nan_to_num(nan=0.0).view(-1)


def _deviation(rows: Tensor) -> Tensor:
    """Standard deviation (n - 1) of each row, [rows, 1], without its NaNs; NaN for fewer than two numbers."""
    counts = (~rows.isnan()).sum(dim=1, keepdim=True)
    squares = (rows - rows.nanmean(dim=1, keepdim=True)) ** 2
    return (squares.nansum(dim=1, keepdim=True) / (counts - 1)).sqrt()


@dataclass(frozen=True)
class GrpoSettings:
    """The ratio to the drawing policy is clipped to [1 - ``clip_low``, 1 + ``clip_high``].

    ``kl_weight`` multiplies the divergence from the reference. ``aggregation`` says what is averaged:
    ``sequence_mean`` the answers' means over their tokens (trl's loss type ``grpo``), ``token_mean``
    all tokens alike (``bnpo`` on one batch, ``dapo`` over a step; 2503.14476).
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_weight: float = 0.0
    aggregation: Aggregation = "sequence_mean"

    def __post_init__(self) -> None:
        require_setting(0 < self.clip_low <= 1, "grpo", "clip_low", self.clip_low, "above 0 and at most 1")
        require_setting(0 < self.clip_high < math.inf, "grpo", "clip_high", self.clip_high, "above 0")
        require_setting(0 <= self.kl_weight < math.inf, "grpo", "kl_weight", self.kl_weight, "at least 0")
        if self.aggregation not in AGGREGATIONS:
            raise unknown_name("aggregation", self.aggregation, AGGREGATIONS)


@dataclass(frozen=True)
class PolicyLoss:
    """What :func:`grpo` returns for one batch.

    ``total`` is a sum (float32 scalar with gradients); a step divides the totals of its batches by
    the sum of their ``count``: answers for ``sequence_mean``, tokens for ``token_mean``. ``clipped``
    is the share of tokens whose gradient the clip holds back (float32 scalar).
    """

    total: Tensor
    count: int
    clipped: Tensor


def token_weights(mask: Tensor, aggregation: Aggregation) -> Tensor:
    """Weight of each token in a total: float32 [answers, tokens], 0 where ``mask`` (bool) is False.

    Hand them to ``linear_top_k_kl`` as ``weights`` to sum its divergences as :func:`grpo` sums its
    losses.
    """
    if aggregation not in AGGREGATIONS:
        raise unknown_name("aggregation", aggregation, AGGREGATIONS)
    if mask.dtype != torch.bool or mask.ndim != 2:
        raise PunaError(
            "a mask of answers' tokens is expected",
            found=f"{mask.dtype}, {list(mask.shape)}",
            expected="bool, [answers, tokens]",
        )
    weights = mask.to(torch.float32)
    if aggregation == "sequence_mean":
        weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1)
    return weights


def grpo(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    settings: GrpoSettings,
    *,
    kl: Tensor | None = None,
) -> PolicyLoss:
    """-min(ratio A, clipped ratio A) + kl_weight KL for each token, summed as the settings say.

    ``log_probs`` of the drawn tokens under the policy and ``old_log_probs`` under the one that drew
    them are [answers, tokens], ``advantages`` [answers], ``mask`` bool [answers, tokens] with the
    answers' own tokens. ``kl`` [answers, tokens] are divergences from the reference, at hand for
    small vocabularies; for large ones leave it and ``kl_weight`` out here and add ``kl_weight`` times
    the total of ``linear_top_k_kl`` under :func:`token_weights`.
    """
    for name, tensor in (("old_log_probs", old_log_probs), ("mask", mask), ("kl", kl)):
        if tensor is not None:
            require_shape(name, tensor, log_probs.shape)
    weights = token_weights(mask, settings.aggregation)
    require_shape("advantages", advantages, log_probs.shape[:1])
    if (kl is None) != (settings.kl_weight == 0):
        raise PunaError(
            "grpo takes divergences and their weight together",
            found=f"kl_weight={settings.kl_weight}, {'no kl' if kl is None else 'kl'}",
            expected="both, or neither",
        )
    # Masked before the exponential: a gradient through what stands in the padding could be NaN.
    log_ratios = torch.where(mask, precise(log_probs) - precise(old_log_probs.detach()), 0.0)
    advantage = precise(advantages.detach())[:, None]
    ratios = log_ratios.exp()
    within = ratios.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    losses = -torch.minimum(ratios * advantage, within * advantage)
    if kl is not None:
        losses = losses + settings.kl_weight * torch.where(mask, precise(kl), 0.0)
    with torch.no_grad():
        held = mask & (within * advantage < ratios * advantage)
        clipped = held.sum() / mask.sum().clamp(min=1)
    count = len(mask) if settings.aggregation == "sequence_mean" else int(mask.sum())
    return PolicyLoss((weights * losses).sum(), count, clipped)
