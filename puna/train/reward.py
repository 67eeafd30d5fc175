"""The objective of reward models: Bradley-Terry, with a squared error where absolute scores exist.

A reward model learns from pairs which answer is better (Bradley and Terry 1952; 2203.02155, Eq. 1).
Pairs fix only differences of rewards. Where some rows also carry an absolute score, Baichuan
Alignment (2410.14940) adds ``alpha [(r_w - s_w)^2 + (r_l - s_l)^2]``; rows without one get alpha 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from puna.core.errors import PunaError
from puna.train.arguments import precise, require_setting, require_shape


@dataclass(frozen=True)
class RewardSettings:
    """``alpha`` weighs the squared errors; at 0 the loss is Bradley-Terry's alone."""

    alpha: float = 0.0

    def __post_init__(self) -> None:
        require_setting(0 <= self.alpha < math.inf, "bradley_terry", "alpha", self.alpha, "at least 0")


@dataclass(frozen=True)
class RewardLoss:
    """``losses`` float32 [pairs] with gradients; ``scored`` bool [pairs], where the squared error counted."""

    losses: Tensor
    scored: Tensor


def bradley_terry(
    chosen: Tensor,
    rejected: Tensor,
    settings: RewardSettings,
    *,
    chosen_scores: Tensor | None = None,
    rejected_scores: Tensor | None = None,
) -> RewardLoss:
    """-log sigmoid(r_w - r_l) + alpha [(r_w - s_w)^2 + (r_l - s_l)^2] for each pair.

    ``chosen`` and ``rejected`` are rewards [pairs]; the scores [pairs] are on the scale that rewards
    shall have, NaN where there is none. A row counts as scored if both its answers are, and the
    others enter the ranking only. At ``alpha`` 0 the scores change nothing.
    """
    require_shape("rejected", rejected, chosen.shape)
    chosen, rejected = precise(chosen), precise(rejected)
    losses = -logsigmoid(chosen - rejected)
    if chosen_scores is None and rejected_scores is None:
        return RewardLoss(losses, torch.zeros_like(losses, dtype=torch.bool))
    if chosen_scores is None or rejected_scores is None:
        missing = "chosen_scores" if chosen_scores is None else "rejected_scores"
        raise PunaError("scores of one side only", found=f"no {missing}", expected="both, or neither")
    require_shape("chosen_scores", chosen_scores, chosen.shape)
    require_shape("rejected_scores", rejected_scores, chosen.shape)
    if bool((chosen_scores.isinf() | rejected_scores.isinf()).any()):
        raise PunaError("an absolute score is infinite", expected="finite scores, or NaN for none")
    scored = ~(chosen_scores.isnan() | rejected_scores.isnan())
    if settings.alpha:
        errors = _squared_error(chosen, chosen_scores) + _squared_error(rejected, rejected_scores)
        losses = losses + settings.alpha * torch.where(scored, errors, 0.0)
    return RewardLoss(losses, scored)


def _squared_error(rewards: Tensor, scores: Tensor) -> Tensor:
    """Squared error [pairs]; a missing score is 0 here, since the gradient through NaN would be NaN."""
    return (rewards - scores.detach().to(rewards.dtype).nan_to_num(nan=0.0)) ** 2
