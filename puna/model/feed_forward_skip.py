"""Skipping feed-forward halves of middle layers, per token, once the residual stream saturates.

System S53, FFN-SkipLLM (Jaiswal and others 2024, arXiv:2404.03865). All attention runs, so every layer
stores keys and values of every token. In the middle layers a token's feed-forward is run and the stream
before it compared with the stream after it; once their cosine passes a threshold, the feed-forwards of the
middle layers that follow are left out for this token, until the middle or the token's budget ends. The
layer that is tested has been computed: it is never the one that is saved.

The paper gives no numbers for cold layers, threshold and budget; :func:`plan_skip` chooses them from
cosines measured on calibration text, and may answer that nothing is saturated enough to skip.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from puna.core.errors import PunaError
from puna.core.seeds import derive

Rule = Literal["saturation", "random"]
_OPERATIONS = 2  # a multiplication and an addition for each weight


@dataclass(frozen=True)
class FeedForwardSkip:
    """Which feed-forwards a token leaves out.

    ``first`` and ``last`` are the ends of the middle, both included: layers outside never skip.
    ``threshold`` is the cosine above which a token skips from the next layer on (above 1: never),
    ``budget`` the most feed-forwards a token leaves out. The rule "random" is the baseline: each
    middle layer of each token is left out with probability ``share``, drawn by ``seed``, the token's
    row in its read, and the layer.
    """

    first: int
    last: int
    threshold: float = math.inf
    budget: int = 1_000_000
    rule: Rule = "saturation"
    share: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.last:
            raise PunaError(
                "the middle layers are out of order",
                where="feed-forward skip",
                found=f"first {self.first}, last {self.last}",
                expected="0 <= first <= last",
            )
        if self.budget < 0 or not 0 <= self.share <= 1 or math.isnan(self.threshold):
            raise PunaError(
                "a setting is out of range",
                where="feed-forward skip",
                found=f"budget {self.budget}, share {self.share}, threshold {self.threshold}",
                expected="a budget of at least 0, a share between 0 and 1, a number as threshold",
            )

    def check(self, layers: int) -> None:
        """Refuse a middle that reaches beyond a decoder of so many layers."""
        if self.last >= layers:
            raise PunaError(
                "the middle ends beyond the decoder",
                where="feed-forward skip",
                found=f"last {self.last}",
                expected=f"at most {layers - 1}, the last of {layers} layers",
            )

    def begin(self, rows: int) -> SkippingPass:
        """Start the pass of ``rows`` tokens through the layers."""
        return SkippingPass(self, rows)


class SkippingPass:
    """Tokens on their way through the layers, which all have the same settings; each goes its own way."""

    def __init__(self, settings: FeedForwardSkip, rows: int) -> None:
        self._settings = settings
        self._skipping = torch.zeros(rows, dtype=torch.bool)
        self._left = torch.full((rows,), settings.budget)
        self.by_row = torch.zeros(rows, dtype=torch.int64)
        """Feed-forwards left out so far, [rows]."""

    @property
    def skipped(self) -> int:
        """Feed-forwards left out so far, by all rows together."""
        return int(self.by_row.sum())

    def running(self, layer: int) -> Tensor | None:
        """Which rows run the feed-forward of ``layer``, [rows] bool; None: all of them."""
        if not self._settings.first <= layer <= self._settings.last:
            return None
        if self._settings.rule == "random":
            self._skipping = self._drawn(layer)
        skip = self._skipping & (self._left > 0)
        if not bool(skip.any()):
            return None
        self._left -= skip.long()
        self.by_row += skip.long()
        return ~skip

    def saw(self, layer: int, rows: Tensor | None, before: Tensor, after: Tensor) -> None:
        """Let the rows whose stream hardly turned skip from the next layer on.

        ``before`` and ``after`` [running, hidden] are the stream around the feed-forward of the
        ``rows`` that ran it.
        """
        settings = self._settings
        if settings.rule == "random" or not settings.first <= layer <= settings.last or not len(before):
            return
        saturated = (stream_cosine(before, after) > settings.threshold).cpu()
        if rows is None:
            self._skipping |= saturated
        else:
            self._skipping[rows.cpu()] |= saturated

    def _drawn(self, layer: int) -> Tensor:
        """Which rows the rule "random" lets leave out this layer, [rows] bool."""
        seed, share = self._settings.seed, self._settings.share
        draws = [derive(seed, "feed-forward skip", row, layer) / 2**63 for row in range(len(self._left))]
        return torch.tensor(draws, dtype=torch.float64) < share


def stream_cosine(before: Tensor, after: Tensor) -> Tensor:
    """Cosine between the residual stream before and after an update, [rows, hidden] each; float32 [rows]."""
    return functional.cosine_similarity(before.float(), after.float(), dim=-1)


def feed_forward_operations(hidden_size: int, width: int) -> int:
    """Floating-point operations of one SwiGLU feed-forward for one token: its three matrices."""
    return _OPERATIONS * 3 * hidden_size * width


@dataclass(frozen=True)
class SkipPlan:
    """What calibration found: ``skip`` is None where nothing is saturated enough to skip.

    ``expected_share`` is the share of all feed-forwards that the calibration tokens would have left
    out; ``cosines`` is the mean by layer.
    """

    skip: FeedForwardSkip | None
    expected_share: float
    cosines: tuple[float, ...]
    reason: str


def plan_skip(
    cosines: Tensor,
    *,
    share: float = 0.25,
    cold: tuple[int, int] = (4, 4),
    percentile: float = 75.0,
    saturated: float = 0.9,
) -> SkipPlan:
    """Choose middle, threshold and budget from ``cosines`` [layers, tokens] of a pass without skipping.

    ``cold`` layers at the beginning and at the end never skip, nor do those next to them whose mean cosine is
    below ``saturated``. The threshold is the ``percentile`` of the cosines in what is left, the
    budget the smallest with which the calibration tokens leave out ``share`` of all feed-forwards.
    If they cannot even without a budget, the threshold goes down to where they can; if no threshold
    does, or no layer is left, there is nothing to skip.
    """
    layers = len(cosines)
    means = tuple(float(mean) for mean in cosines.double().mean(1))
    middle = [layer for layer in range(cold[0], layers - cold[1]) if means[layer] >= saturated]
    if len(middle) < 2:
        return SkipPlan(None, 0.0, means, f"no two layers in the middle reach a mean cosine of {saturated:g}")
    first, last = middle[0], middle[-1]
    inside = cosines[first : last + 1].double()
    wanted = share * layers  # feed-forwards left out per token
    for level in sorted({percentile, *range(0, int(percentile) + 1, 5)}, reverse=True):
        threshold = float(torch.quantile(inside.flatten(), level / 100))
        possible = _left_out(inside, threshold)
        if float(possible.mean()) >= wanted:
            break
    else:
        return SkipPlan(
            None, 0.0, means, f"layers {first} to {last} cannot leave out a share of {share:g} of all"
        )
    budget = next(
        count for count in range(layers + 1) if float(possible.clamp(max=count).mean()) >= wanted - 1e-9
    )
    expected = float(possible.clamp(max=budget).mean()) / layers
    skip = FeedForwardSkip(first, last, threshold, budget)
    return SkipPlan(skip, expected, means, f"layers {first} to {last}, threshold at percentile {level:g}")


def _left_out(inside: Tensor, threshold: float) -> Tensor:
    """How many layers each token would leave out without a budget: those after the first that passes.

    ``inside`` [layers, tokens] are the middle's cosines; float64 [tokens]. They come from a pass without
    skipping, so this is what is expected, not what happens.
    """
    passes = inside > threshold
    first = torch.where(passes.any(0), passes.long().argmax(0), len(inside) - 1)
    return (len(inside) - 1 - first).double()
