"""Which tokens of a draft stand: speculative sampling, exact and lossy.

A rejection verifier keeps a drafted token x, drawn from the drafter's law q, with a chance a(x), and
where it does not, draws another one from a residual. What it emits then follows the law
q(x) a(x) + r(x) sum_y q(y) (1 - a(y)), which :func:`emitted` gives; of an exact verifier this is the
target's law p, whatever q is. If all of the draft stands, one more token is drawn from p.

* exact (Leviathan et al. 2211.17192, Chen et al. 2302.01318): a = min(1, p/q), r in proportion to
  max(p - q, 0). Greedy laws are certain of one token, so that the draft stands as far as it says what
  the target would have said.
* shifted (RAPID, 2502.20330): judges by p', the target's law moved towards the drafter's.
* union (Judge Decoding, 2501.19309): exact, or a head finds the token right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from puna.core.errors import PunaError
from puna.decode.protocols import Draft, Verdict
from puna.decode.sampling import Law, draw_from

if TYPE_CHECKING:
    from puna.decode.heads import Head
    from puna.decode.lane import Result
    from puna.decode.request import Running

Residual = Literal["exact", "released"]


class RejectionVerifier:
    """Keeps a drafted token with :meth:`chance`, and draws from :meth:`residual` where it does not."""

    lossless: bool

    def chance(self, target: Law, draft: Law, token: int) -> float:
        """The probability with which ``token``, drawn from ``draft``, is kept."""
        raise NotImplementedError

    def residual(self, target: Law, draft: Law) -> Tensor:
        """Weights (float64 [vocab], not negative) of the token that follows a rejection."""
        raise NotImplementedError

    def stands(self, request: Running, draft: Draft, result: Result, place: int) -> bool:
        """Whether something else than chance keeps the token at ``place``."""
        return False

    def verify(self, request: Running, draft: Draft, result: Result) -> Verdict:
        """Judge ``draft``; ``result`` has drafted + 1 outputs, the first of the token before the draft."""
        generator = request.random
        for place, (token, law) in enumerate(zip(draft.tokens, draft.laws, strict=True)):
            if self.stands(request, draft, result, place):
                continue
            target = request.law(result.logits[place], [*request.ids, *draft.tokens[:place]])
            # A number is drawn for every token that was drawn, also where it is certain to stand: where the
            # two laws are equal but for rounding, rounding must not decide which number comes next.
            drawn = _uniform(generator) if request.sampling.temperature else 0.0
            if drawn < self.chance(target, law, token):
                continue
            weights = self.residual(target, law)
            # Where the two laws are equal but for rounding, nothing may be left over.
            after = draw_from(weights, generator) if bool(weights.any()) else target.draw(generator)
            return Verdict(place, after)
        count = len(draft.tokens)
        target = request.law(result.logits[count], [*request.ids, *draft.tokens])
        return Verdict(count, target.draw(generator))


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), dtype=torch.float64, generator=generator))


def emitted(verifier: RejectionVerifier, target: Law, draft: Law) -> Tensor:
    """The exact law (float64 [vocab]) of the token that ``verifier`` emits for one drawn from ``draft``."""
    drawn = draft.probabilities
    chances = torch.tensor(
        [verifier.chance(target, draft, token) if drawn[token] else 0.0 for token in range(len(drawn))],
        dtype=torch.float64,
    )
    kept = drawn * chances
    rejected = 1 - kept.sum()
    weights = verifier.residual(target, draft)
    if not bool(weights.any()):
        weights = target.probabilities
    return kept + rejected * weights / weights.sum()


class ExactVerifier(RejectionVerifier):
    """Speculative sampling: the target's own law, whatever the draft."""

    lossless = True

    def chance(self, target: Law, draft: Law, token: int) -> float:
        """min(1, p/q)."""
        return _ratio(target.probabilities[token], draft.probabilities[token])

    def residual(self, target: Law, draft: Law) -> Tensor:
        """max(p - q, 0)."""
        return (target.probabilities - draft.probabilities).clamp_(min=0)


def _ratio(wanted: Tensor, drawn: Tensor) -> float:
    """min(1, wanted / drawn)."""
    return 1.0 if bool(wanted >= drawn) else float(wanted / drawn)


@dataclass(frozen=True)
class ShiftedVerifier(RejectionVerifier):
    """Judges by p', in proportion to p exp(eta (q - p)) where q is at least ``cutoff`` of its largest value.

    ``residual_mode`` "exact" draws from max(p' - q, 0) after a rejection, so that a drafted place
    follows p'; "released" from max(p - q, p - p', 0), as the published code does, which gives neither p
    nor p'. The token after a draft that stands whole comes from p. With ``eta`` 0 both are exact
    speculative sampling. At temperature 0 p' is p.
    """

    eta: float = 10.0
    cutoff: float = 0.1
    residual_mode: Residual = "exact"

    @property
    def lossless(self) -> bool:  # type: ignore[override]
        """Whether the target's own law is kept: without a shift."""
        return self.eta == 0

    def shifted(self, target: Law, draft: Law) -> Tensor:
        """p', float64 [vocab]."""
        wanted, drawn = target.probabilities, draft.probabilities
        if not self.eta:
            return wanted
        near = drawn >= self.cutoff * drawn.max()
        moved = wanted.log() + torch.where(near, self.eta * (drawn - wanted), 0.0)
        return moved.softmax(0)

    def chance(self, target: Law, draft: Law, token: int) -> float:
        """min(1, p'/q)."""
        return _ratio(self.shifted(target, draft)[token], draft.probabilities[token])

    def residual(self, target: Law, draft: Law) -> Tensor:
        """max(p' - q, 0), or max(p - q, p - p', 0)."""
        shifted, drawn = self.shifted(target, draft), draft.probabilities
        if self.residual_mode == "exact":
            return (shifted - drawn).clamp_(min=0)
        wanted = target.probabilities
        return torch.maximum(wanted - drawn, wanted - shifted).clamp_(min=0)


class UnionVerifier(ExactVerifier):
    """Keeps what exact verification keeps, and what a judge finds right.

    The judge looks at the target's final hidden state at the drafted token itself: having read a
    mistake, the target shows it. It is not asked about tokens that end the text. A ``threshold`` of 1
    or more never listens to it, 0 always does; at 1 or more the law is the target's own.
    """

    def __init__(self, judge: Head, threshold: float = 0.5) -> None:
        if not threshold >= 0:
            raise PunaError("the judge's threshold is out of range", found=threshold, expected="at least 0")
        self.judge = judge
        self.threshold = threshold
        self.lossless = threshold >= 1

    def stands(self, request: Running, draft: Draft, result: Result, place: int) -> bool:
        """Whether the judge finds the token right."""
        if self.lossless or draft.tokens[place] in request.stop_ids:
            return False
        return self.judge.probability(result.hidden[place + 1]) > self.threshold


class TopVerifier(ExactVerifier):
    """Keeps a drafted token that is among the target's ``count`` likeliest: the simple lossy rule."""

    lossless = False

    def __init__(self, count: int) -> None:
        self.count = count

    def stands(self, request: Running, draft: Draft, result: Result, place: int) -> bool:
        """Whether fewer than ``count`` tokens are likelier under the target's raw logits."""
        if draft.tokens[place] in request.stop_ids:
            return False
        logits = result.logits[place]
        return int((logits > logits[draft.tokens[place]]).sum()) < self.count
