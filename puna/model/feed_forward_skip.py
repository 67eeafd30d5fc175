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
from collections.abc import Callable, Sequence
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
    middle layer of each token is left out with probability ``share``, by ``seed`` and position.
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


class SkippingPass:
    """The skipping of one forward pass: one row per token, each with its own settings or none.

    ``spans`` are (skip, start, count): the rows' settings and how many rows have them, in the order of
    the rows; ``start`` is the first row's position in its text. What one row leaves out depends on
    nothing but that row.
    """

    def __init__(self, spans: Sequence[tuple[FeedForwardSkip | None, int, int]], layers: int) -> None:
        self._spans = spans
        rows = sum(count for _, _, count in spans)
        skips = [skip for skip, _, _ in spans if skip is not None]
        for each in skips:
            each.check(layers)
        self._first = min((skip.first for skip in skips), default=layers)
        self._last = max((skip.last for skip in skips), default=-1)
        self._bounds = torch.zeros(rows, 2, dtype=torch.int64)  # first and last layer of each row's middle
        self._bounds[:, 0] = layers  # no middle
        self._threshold = torch.full((rows,), math.inf)
        self._left = torch.zeros(rows, dtype=torch.int64)
        self._skipping = torch.zeros(rows, dtype=torch.bool)
        self.skipped = torch.zeros(rows, dtype=torch.int64)
        """Feed-forwards left out so far, [rows]."""
        self._random = any(skip.rule == "random" for skip in skips)
        start = 0
        for skip, _, count in spans:
            if skip is not None:
                here = slice(start, start + count)
                self._bounds[here] = torch.tensor([skip.first, skip.last])
                self._left[here] = skip.budget
                self._threshold[here] = skip.threshold if skip.rule == "saturation" else math.inf
            start += count

    def apply(self, layer: int, hidden: Tensor, feed_forward: Callable[[Tensor], Tensor]) -> Tensor:
        """The stream after this layer's feed-forward, [rows, hidden].

        ``feed_forward`` adds the update to the rows that it is given. If no row skips it gets
        ``hidden`` itself, so the result has the bits of a pass without skipping.
        """
        if not self._first <= layer <= self._last:
            return feed_forward(hidden)
        inside = (self._bounds[:, 0] <= layer) & (layer <= self._bounds[:, 1])
        if self._random:
            self._draw(layer)
        skip = inside & self._skipping & (self._left > 0)
        self._left -= skip.long()
        self.skipped += skip.long()
        if not bool(skip.any()):
            after = feed_forward(hidden)
            self._test(inside, hidden, after, slice(None))
            return after
        running = torch.nonzero(~skip).flatten()
        if not len(running):
            return hidden
        on_device = running.to(hidden.device)
        before = hidden[on_device]
        updated = feed_forward(before)
        self._test(inside[running], before, updated, running)
        return hidden.index_copy(0, on_device, updated)

    def _test(self, inside: Tensor, before: Tensor, after: Tensor, rows: Tensor | slice) -> None:
        """Let rows of the middle whose stream hardly turned skip from the next layer on."""
        cosine = stream_cosine(before, after).cpu()
        self._skipping[rows] |= inside & (cosine > self._threshold[rows])

    def _draw(self, layer: int) -> None:
        """Decide anew which rows of the rule "random" leave out this layer."""
        start = 0
        for skip, position, count in self._spans:
            if skip is not None and skip.rule == "random":
                for row in range(count):
                    draw = derive(skip.seed, "feed-forward skip", position + row, layer) / 2**63
                    self._skipping[start + row] = draw < skip.share
            start += count


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
    cold_layers: int = 4,
    percentile: float = 75.0,
    saturated: float = 0.9,
) -> SkipPlan:
    """Choose middle, threshold and budget from ``cosines`` [layers, tokens] of a pass without skipping.

    The first and last ``cold_layers`` are cold, and so are the layers next to them whose mean cosine is
    below ``saturated``. The threshold is the ``percentile`` of the cosines in what is left, the
    budget the smallest with which the calibration tokens leave out ``share`` of all feed-forwards.
    If they cannot even without a budget, the threshold goes down to where they can; if no threshold
    does, or no layer is left, there is nothing to skip.
    """
    layers = len(cosines)
    means = tuple(float(mean) for mean in cosines.double().mean(1))
    middle = [layer for layer in range(cold_layers, layers - cold_layers) if means[layer] >= saturated]
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
