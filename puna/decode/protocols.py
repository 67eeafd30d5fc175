"""The parts that decoding methods are composed of; see ``docs/decode.md``.

Parts that read are generators (:data:`puna.decode.lane.Steps`); all others are plain functions of
what was read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from puna.model.stepper import FeedForwardSkip

if TYPE_CHECKING:
    from torch import Tensor

    from puna.decode.lane import Lane, Result, Steps
    from puna.decode.request import Running
    from puna.decode.routers import Size
    from puna.decode.sampling import Law

Skipper = FeedForwardSkip
"""Leaves out feed-forwards as a read goes through the layers; given to :meth:`Lane.read`."""


@dataclass
class Draft:
    """Proposed tokens, the law each was drawn from, and the drafter's hidden state behind each, [hidden]."""

    tokens: list[int] = field(default_factory=list)
    laws: list[Law] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Verdict:
    """How many tokens of a draft are kept, and the token that follows them."""

    kept: int
    next_token: int


class Proposer(Protocol):
    """Proposes tokens that may follow the text."""

    def propose(self, request: Running, limit: int) -> Steps[Draft]:
        """Propose at most ``limit`` tokens behind ``request.ids``."""
        ...


class Verifier(Protocol):
    """Decides how much of a draft stands.

    ``lossless``: the produced tokens follow the target's own law, whatever the draft. Every lossless
    verifier is registered in ``tests/invariants`` and faces a distribution test there.
    """

    @property
    def lossless(self) -> bool:
        """Whether the target's own law is kept."""
        ...

    def verify(self, request: Running, draft: Draft, result: Result) -> Verdict:
        """Judge; ``result`` has the target's outputs at the token before the draft and at each of it."""
        ...


class Stopper(Protocol):
    """Decides when a proposer stops before its limit."""

    def stop(self, draft: Draft) -> bool:
        """Whether the draft, which has at least one token, is long enough."""
        ...


class Router(Protocol):
    """Decides which model writes next."""

    def choose(self, entropy: float, current: Size) -> Size:
        """Who writes next, after a token that ``current`` drew from a distribution of so many bits."""
        ...


class Scorer(Protocol):
    """Judges a text that a lane has read."""

    def score(self, lane: Lane, ids: Sequence[int]) -> Steps[float]:
        """Score ``ids``; what the lane holds afterwards is what it held before."""
        ...
