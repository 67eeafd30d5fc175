"""Preference objectives: pure functions of the log-probabilities of chosen and rejected answers.

An answer's log-probability is the sum over its tokens, the prompt left out. Every function returns
one loss for each pair (KTO: for each answer) in nats, so that a step can sum them over micro-batches
and divide once. Where the sigmoid of a margin is meant, it is taken as ``logsigmoid``, in float32.

Sources: DPO 2305.18290 (Eq. 7), its conservative form with uncertain labels in the DPO authors' note
on noisy preferences; length-normalised DPO of FuseChat-3.0 2503.04222, after WRPO 2412.03187;
IPO 2310.12036 (Eq. 17); KTO 2402.01306 (Eq. 7); ORPO 2403.07691 (Eq. 7);
SimPO 2405.14734; CPO 2401.08417.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from puna.core.errors import PunaError
from puna.train.arguments import precise, require_positive, require_setting, require_shape


@dataclass(frozen=True)
class AnswerPairs:
    """A batch of pairs: summed log-probabilities in nats, each floating-point [pairs].

    ``chosen`` and ``rejected`` are the policy's; the two ``reference_`` ones the frozen reference's,
    needed by :func:`dpo`, :func:`length_normalised_dpo` and :func:`ipo`. ``chosen_tokens`` and
    ``rejected_tokens`` count the tokens that were summed, at least 1: answers only, no prompt.
    """

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor | None = None
    reference_rejected: Tensor | None = None
    chosen_tokens: Tensor | None = None
    rejected_tokens: Tensor | None = None

    def __post_init__(self) -> None:
        if self.chosen.ndim != 1:
            raise PunaError(
                "log-probabilities of answers are one number for each pair",
                found=list(self.chosen.shape),
                expected="[pairs]",
            )
        for name, value in vars(self).items():
            if value is not None:
                require_shape(name, value, self.chosen.shape)

    def log_ratios(self, objective: str) -> tuple[Tensor, Tensor]:
        """log policy - log reference of chosen and of rejected answers; both float32 [pairs]."""
        if self.reference_chosen is None or self.reference_rejected is None:
            raise PunaError(
                f"{objective} compares with a reference model",
                found="no log-probabilities of a reference",
                expected="reference_chosen and reference_rejected",
            )
        # The reference is frozen: no gradient flows there, whatever the caller hands in.
        reference_chosen, reference_rejected = (
            self.reference_chosen.detach(),
            self.reference_rejected.detach(),
        )
        return (
            precise(self.chosen) - precise(reference_chosen),
            precise(self.rejected) - precise(reference_rejected),
        )

    def lengths(self, objective: str) -> tuple[Tensor, Tensor]:
        """Tokens of chosen and of rejected answers, in the dtype of the sums; both [pairs]."""
        if self.chosen_tokens is None or self.rejected_tokens is None:
            raise PunaError(
                f"{objective} divides by the lengths of the answers",
                found="no counts of tokens",
                expected="chosen_tokens and rejected_tokens",
            )
        if bool(((self.chosen_tokens < 1) | (self.rejected_tokens < 1)).any()):
            raise PunaError(
                f"{objective} divides by the lengths of the answers",
                found="an answer of no token",
                expected="at least one token in each answer",
                fix="leave out pairs whose answer was cut away altogether",
            )
        dtype = precise(self.chosen).dtype
        return self.chosen_tokens.to(dtype), self.rejected_tokens.to(dtype)

    def means(self, objective: str) -> tuple[Tensor, Tensor]:
        """The policy's mean log-probability of a token of each answer; both float32 [pairs]."""
        chosen_length, rejected_length = self.lengths(objective)
        return precise(self.chosen) / chosen_length, precise(self.rejected) / rejected_length


@dataclass(frozen=True)
class PreferenceLoss:
    """What an objective returns: a loss for each pair and the implicit rewards behind it.

    ``losses`` is float32 [pairs] in nats (squared nats for IPO) with gradients. The rewards, float32
    [pairs], carry none; their difference is what the objective compares, apart from a target margin.
    """

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor

    @property
    def margins(self) -> Tensor:
        """Chosen minus rejected reward, [pairs]; above 0 where the policy ranks a pair rightly."""
        return self.chosen_rewards - self.rejected_rewards


@dataclass(frozen=True)
class DpoSettings:
    """``beta`` weighs the distance from the reference; ``label_smoothing`` is the share of flipped labels."""

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        require_positive("dpo", "beta", self.beta)
        _require_smoothing("dpo", self.label_smoothing)


def dpo(pairs: AnswerPairs, settings: DpoSettings) -> PreferenceLoss:
    """-(1 - s) log sigmoid(m) - s log sigmoid(-m), where m = beta (log ratio chosen - log ratio rejected)."""
    chosen, rejected = pairs.log_ratios("dpo")
    losses = _sigmoid_loss(settings.beta * (chosen - rejected), settings.label_smoothing)
    return _with_rewards(losses, settings.beta * chosen, settings.beta * rejected)


@dataclass(frozen=True)
class LengthNormalisedDpoSettings:
    """``beta`` multiplies log ratios per token, so it is larger than DPO's by an answer's length."""

    beta: float = 10.0

    def __post_init__(self) -> None:
        require_positive("length_normalised_dpo", "beta", self.beta)


def length_normalised_dpo(pairs: AnswerPairs, settings: LengthNormalisedDpoSettings) -> PreferenceLoss:
    """-log sigmoid(beta log ratio chosen / tokens chosen - beta log ratio rejected / tokens rejected)."""
    chosen, rejected = _mean_log_ratios(pairs, "length_normalised_dpo")
    losses = _sigmoid_loss(settings.beta * (chosen - rejected))
    return _with_rewards(losses, settings.beta * chosen, settings.beta * rejected)


@dataclass(frozen=True)
class IpoSettings:
    """``beta`` is the paper's tau: the margin of log ratios per token that is aimed at is 1 / (2 beta)."""

    beta: float = 0.1

    def __post_init__(self) -> None:
        require_positive("ipo", "beta", self.beta)


def ipo(pairs: AnswerPairs, settings: IpoSettings) -> PreferenceLoss:
    """(log ratio chosen - log ratio rejected - 1 / (2 beta)) squared, log ratios as means over tokens.

    The paper writes them for whole answers; trl takes means, which it says the authors confirmed.
    """
    chosen, rejected = _mean_log_ratios(pairs, "ipo")
    losses = (chosen - rejected - 1 / (2 * settings.beta)) ** 2
    return _with_rewards(losses, settings.beta * chosen, settings.beta * rejected)


@dataclass(frozen=True)
class OrpoSettings:
    """``beta`` is the paper's lambda: the weight of the odds ratio beside the chosen answer's likelihood."""

    beta: float = 0.1

    def __post_init__(self) -> None:
        require_positive("orpo", "beta", self.beta)


def orpo(pairs: AnswerPairs, settings: OrpoSettings) -> PreferenceLoss:
    """Mean token loss of the chosen answer - beta log sigmoid(log odds chosen - log odds rejected).

    An answer's probability is the geometric mean of its tokens', its odds are p / (1 - p). No
    reference model. trl takes the likelihood over prompt and answer, and its mean over the tokens
    of a batch; here it is that of the answer, pair by pair.
    """
    chosen, rejected = pairs.means("orpo")
    log_odds = chosen - rejected - (_log_one_minus_exp(chosen) - _log_one_minus_exp(rejected))
    losses = -chosen - settings.beta * logsigmoid(log_odds)
    return _with_rewards(losses, settings.beta * chosen, settings.beta * rejected)


@dataclass(frozen=True)
class SimpoSettings:
    """``gamma`` is the margin, in units of the reward, that beta times the mean log-probability aims at."""

    beta: float = 2.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        require_positive("simpo", "beta", self.beta)
        require_setting(0 <= self.gamma < math.inf, "simpo", "gamma", self.gamma, "at least 0")


def simpo(pairs: AnswerPairs, settings: SimpoSettings) -> PreferenceLoss:
    """-log sigmoid(beta (mean log-probability chosen - rejected) - gamma); no reference model."""
    chosen, rejected = pairs.means("simpo")
    losses = _sigmoid_loss(settings.beta * (chosen - rejected) - settings.gamma)
    return _with_rewards(losses, settings.beta * chosen, settings.beta * rejected)


@dataclass(frozen=True)
class CpoSettings:
    """``likelihood_weight`` is that of the chosen answer's mean token loss beside the sigmoid."""

    beta: float = 0.1
    likelihood_weight: float = 1.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        require_positive("cpo", "beta", self.beta)
        weight = self.likelihood_weight
        require_setting(0 <= weight < math.inf, "cpo", "likelihood_weight", weight, "at least 0")
        _require_smoothing("cpo", self.label_smoothing)


def cpo(pairs: AnswerPairs, settings: CpoSettings) -> PreferenceLoss:
    """DPO's loss with a uniform reference, plus the weighted mean token loss of the chosen answer.

    The counts of tokens are needed unless ``likelihood_weight`` is 0. trl takes the mean over the
    tokens of a batch, here it is taken pair by pair.
    """
    chosen, rejected = precise(pairs.chosen), precise(pairs.rejected)
    losses = _sigmoid_loss(settings.beta * (chosen - rejected), settings.label_smoothing)
    if settings.likelihood_weight:
        losses = losses - settings.likelihood_weight * pairs.means("cpo")[0]
    return _with_rewards(losses, settings.beta * chosen, settings.beta * rejected)


@dataclass(frozen=True)
class KtoSettings:
    """``beta`` as in DPO; the weights balance desirable and undesirable answers where one kind is rarer."""

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        require_positive("kto", "beta", self.beta)
        require_positive("kto", "desirable_weight", self.desirable_weight)
        require_positive("kto", "undesirable_weight", self.undesirable_weight)


@dataclass(frozen=True)
class AnswerLoss:
    """Loss of each answer, float32 [answers] with gradients, and its implicit reward without."""

    losses: Tensor
    rewards: Tensor


def kto(
    policy: Tensor, reference: Tensor, desirable: Tensor, baseline: Tensor, settings: KtoSettings
) -> AnswerLoss:
    """sigmoid(beta (z - log ratio)) of desirable, sigmoid(beta (log ratio - z)) of undesirable answers.

    Answers need no pairs: ``policy`` and ``reference`` are summed log-probabilities [answers],
    ``desirable`` bool [answers], ``baseline`` the scalar z of :func:`kto_baseline`. Each loss is
    multiplied by the weight of its kind.
    """
    require_shape("reference", reference, policy.shape)
    require_shape("desirable", desirable, policy.shape)
    require_shape("baseline", baseline, ())
    if desirable.dtype != torch.bool:
        raise PunaError("kto asks of each answer if it is desirable", found=desirable.dtype, expected="bool")
    log_ratios = precise(policy) - precise(reference.detach())
    above = settings.beta * (log_ratios - precise(baseline.detach()))
    losses = torch.where(
        desirable,
        settings.desirable_weight * torch.sigmoid(-above),
        settings.undesirable_weight * torch.sigmoid(above),
    )
    return AnswerLoss(losses, (settings.beta * log_ratios).detach())


def kto_baseline(policy: Tensor, reference: Tensor) -> Tensor:
    """z of KTO: the mean log ratio of answers to prompts they do not belong to, at least 0; no gradient.

    ``policy`` and ``reference`` are summed log-probabilities of such mismatched answers, [answers].
    It estimates KL(policy || reference), which cannot be negative.
    """
    require_shape("reference", reference, policy.shape)
    if not policy.numel():
        raise PunaError("the baseline of kto is a mean", found="no answer", expected="at least one")
    return (precise(policy.detach()) - precise(reference.detach())).mean().clamp(min=0)


def _mean_log_ratios(pairs: AnswerPairs, objective: str) -> tuple[Tensor, Tensor]:
    chosen, rejected = pairs.log_ratios(objective)
    chosen_length, rejected_length = pairs.lengths(objective)
    return chosen / chosen_length, rejected / rejected_length


def _sigmoid_loss(margins: Tensor, label_smoothing: float = 0.0) -> Tensor:
    losses = -logsigmoid(margins)
    if label_smoothing:  # without it an infinite loss of the flipped label would turn to NaN
        losses = (1 - label_smoothing) * losses - label_smoothing * logsigmoid(-margins)
    return losses


def _log_one_minus_exp(values: Tensor) -> Tensor:
    """log(1 - exp(values)) of negative ``values``, by whichever form loses no digits (Maechler 2012).

    A probability that rounds to 1 is taken as the largest below it, so loss and gradient stay finite.
    """
    values = values.clamp(max=-torch.finfo(values.dtype).eps)
    near = values > -math.log(2)
    # Each form sees only values that are safe for it: the gradient of an unused infinity would be NaN.
    by_expm1 = torch.log(-torch.expm1(torch.where(near, values, -0.5)))
    by_log1p = torch.log1p(-torch.exp(torch.where(near, -1.0, values)))
    return torch.where(near, by_expm1, by_log1p)


def _with_rewards(losses: Tensor, chosen: Tensor, rejected: Tensor) -> PreferenceLoss:
    return PreferenceLoss(losses, chosen.detach(), rejected.detach())


def _require_smoothing(objective: str, value: float) -> None:
    expected = "at least 0 and below 0.5, the share of flipped labels"
    require_setting(0 <= value < 0.5, objective, "label_smoothing", value, expected)
