"""Who writes the next token: routers between a small and a large model that share a tokenizer.

The entropy router is that of system S34, Entropy Adaptive Decoding (Simonds 2025, arXiv:2502.06833): the
mean entropy of the active model's last few distributions, in bits, taken from raw logits before any
temperature or filter; above a threshold the large model writes, else the small one. After a switch the
window starts empty and the incoming model stays for some tokens, which keeps the two from flapping. The
random router is its baseline: it switches at the same earliest moments, without looking.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Literal

import torch

from puna.core.errors import PunaError

Size = Literal["small", "large"]


class _Staying:
    """The part that routers share: for how many tokens the current model has been writing."""

    def __init__(self, minimum_stay: int) -> None:
        if minimum_stay < 1:
            raise PunaError(
                "minimum_stay is out of range", where="router", found=minimum_stay, expected="at least 1"
            )
        self._minimum = minimum_stay
        self._stayed = 0

    def _may_switch(self) -> bool:
        """Count one more token; whether the current model has stayed long enough."""
        self._stayed += 1
        return self._stayed >= self._minimum


class EntropyRouter(_Staying):
    """The large model where the mean entropy of the last ``window`` tokens is above ``threshold`` bits.

    ``threshold_large`` is the threshold while the large model is active, since two models are seldom
    calibrated alike; None takes the same. An infinite threshold never leaves the small model, a negative
    one never the large.
    """

    def __init__(
        self,
        threshold: float,
        *,
        threshold_large: float | None = None,
        window: int = 5,
        minimum_stay: int = 5,
    ) -> None:
        super().__init__(minimum_stay)
        if window < 1 or math.isnan(threshold):
            raise PunaError(
                "a setting is out of range",
                where="entropy router",
                found=f"window {window}, threshold {threshold}",
                expected="a window of at least 1 token, a threshold in bits",
            )
        self._thresholds: dict[Size, float] = {
            "small": threshold,
            "large": threshold if threshold_large is None else threshold_large,
        }
        self._recent: deque[float] = deque(maxlen=window)

    def choose(self, entropy: float, current: Size) -> Size:
        """Who writes next, after a token that ``current`` drew from a distribution of so many bits."""
        self._recent.append(entropy)
        mean = math.fsum(self._recent) / len(self._recent)
        wanted: Size = "large" if mean > self._thresholds[current] else "small"
        if not self._may_switch() or wanted == current:
            return current
        self._stayed = 0
        self._recent.clear()
        return wanted


class RandomRouter(_Staying):
    """The baseline: after every ``minimum_stay`` tokens the large model is drawn, with probability ``share``.

    A draw of the model that is active already makes it stay as long again.
    """

    def __init__(self, share: float, generator: torch.Generator, *, minimum_stay: int = 5) -> None:
        super().__init__(minimum_stay)
        if not 0 <= share <= 1:
            raise PunaError("share is out of range", where="random router", found=share, expected="0 to 1")
        self._share, self._generator = share, generator

    def choose(self, entropy: float, current: Size) -> Size:
        """Who writes next; ``entropy`` is not looked at."""
        if not self._may_switch():
            return current
        self._stayed = 0
        drawn = float(torch.rand((), dtype=torch.float64, generator=self._generator))
        return "large" if drawn < self._share else "small"
