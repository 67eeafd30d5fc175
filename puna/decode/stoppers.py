"""When a drafter stops before its limit: a bet on whether the target would reject something already.

A token is scored by the drafter's reading of it, which comes one step after the token was drawn: the
check lags, and the first one finds nothing scored yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from puna.decode.heads import Head
    from puna.decode.protocols import Draft


class HeadStopper:
    """Stops once the chance that something was rejected exceeds ``threshold`` (SpecDec++, 2405.19715).

    The trained head's probability that a token is accepted, given that all before it were, multiplies
    up over the scored tokens: stop if 1 - product > threshold. Drafts have at least ``least`` tokens.
    Belongs to one request: what it has scored of a draft it keeps.
    """

    def __init__(self, head: Head, threshold: float = 0.3, least: int = 2) -> None:
        self.head = head
        self.threshold = threshold
        self.least = least
        self._draft: Draft | None = None
        self._scored = 0
        self._accepted = 1.0

    def stop(self, draft: Draft) -> bool:
        """Whether the draft is long enough."""
        if draft is not self._draft:
            self._draft, self._scored, self._accepted = draft, 0, 1.0
        for hidden in draft.hidden[self._scored :]:
            self._accepted *= self.head.probability(hidden)
        self._scored = len(draft.hidden)
        return len(draft.tokens) >= self.least and 1 - self._accepted > self.threshold


@dataclass(frozen=True)
class ConfidenceStopper:
    """Stops at a token that the drafter itself gave less than ``least_probability``.

    The untrained cousin: assistant_confidence_threshold of transformers (Dynamic Speculation Lookahead,
    2405.04304).
    """

    least_probability: float = 0.4

    def stop(self, draft: Draft) -> bool:
        """Whether the last token was drawn without confidence."""
        return float(draft.laws[-1].probabilities[draft.tokens[-1]]) < self.least_probability
