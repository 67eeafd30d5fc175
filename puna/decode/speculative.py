"""The speculative loop: a draft is proposed, the target reads it in one pass, a verifier judges it.

What the target would have read token by token it reads at once; every round emits the tokens that
stand and one more. The loop knows neither how drafts come about nor how they are judged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import pydantic

from puna.decode.drafters import ModelDrafter, require_same_words
from puna.decode.request import TARGET
from puna.decode.short_head import short_head
from puna.decode.stoppers import ConfidenceStopper
from puna.decode.strategy import StrategySettings, strategy
from puna.decode.trace import TraceRow
from puna.decode.verifiers import ExactVerifier

if TYPE_CHECKING:
    from puna.decode.lane import Steps
    from puna.decode.protocols import Proposer, Stopper, Verifier
    from puna.decode.request import Running


@dataclass(frozen=True)
class Round:
    """What one round of a text did: tokens ``drafted``, of these ``kept``, and ``emitted`` in all."""

    drafted: int
    kept: int
    emitted: int


class Speculative:
    """A strategy of drafts and verdicts.

    ``propose_for(request)`` makes the proposer of a request. Drafts have at most ``draft_tokens``
    tokens. ``on_round`` is told of every round.
    """

    def __init__(
        self,
        name: str,
        propose_for: Callable[[Running], Proposer],
        verifier: Verifier,
        draft_tokens: int,
        on_round: Callable[[Running, Round], None] | None = None,
    ) -> None:
        self.name = name
        self.lossless = verifier.lossless
        self.verifier = verifier
        self.draft_tokens = draft_tokens
        self.on_round = on_round
        self._propose_for = propose_for

    def run(self, request: Running) -> Steps[None]:
        """Rounds until the text has ended."""
        proposer = self._propose_for(request)
        while True:
            # The last token is the target's own, so that there is nothing to draft for it.
            draft = yield from proposer.propose(request, min(self.draft_tokens, request.remaining - 1))
            text = [*request.prompt, *request.ids, *draft.tokens]
            result = yield from request.lane.catch_up(text, outputs=len(draft.tokens) + 1)
            verdict = self.verifier.verify(request, draft, result)
            before = len(request.ids)
            ended = False
            for place, token in enumerate(draft.tokens[: verdict.kept]):
                ended = request.emit(token, TraceRow(token, "draft", accepted=True), result.logits[place])
                if ended:
                    break
            if not ended:
                whole = verdict.kept == len(draft.tokens)
                row = TraceRow(verdict.next_token, TARGET, accepted=None if whole else False)
                ended = request.emit(verdict.next_token, row, result.logits[verdict.kept])
            if self.on_round is not None:
                self.on_round(request, Round(len(draft.tokens), verdict.kept, len(request.ids) - before))
            if ended:
                return


class DraftSettings(StrategySettings):
    """What every strategy with a drafting model has."""

    companions: ClassVar[tuple[str, ...]] = ("draft",)
    draft: str = "draft"
    """Name of the model that drafts, of those the engine was given; "target" drafts for itself."""
    draft_vocabulary: int | None = pydantic.Field(None, ge=1)
    """Draft only tokens with ids below this, the tokenizer's most frequent, and special ones: a much cheaper
    head. null drafts any token."""

    def drafter(
        self,
        stopper_for: Callable[[], Stopper | None] = lambda: None,
        prompt_for: Callable[[Running], Sequence[int] | None] = lambda request: None,
    ) -> Callable[[Running], Proposer]:
        """Makes the drafter of a request, with a stopper and a prompt of its own."""

        def make(request: Running) -> ModelDrafter:
            model = request.model(self.draft)
            require_same_words(request.model(TARGET), model, self.draft)
            return ModelDrafter(
                request.open_lane(self.draft),
                prompt=prompt_for(request),
                stopper=stopper_for(),
                head=None if self.draft_vocabulary is None else short_head(model, self.draft_vocabulary),
            )

        return make


@strategy("speculative")
class SpeculativeSettings(DraftSettings):
    """Speculative sampling with a draft model: the target's own law, in fewer passes of the target."""

    draft_tokens: int = pydantic.Field(4, ge=1)
    """Tokens of a draft at most."""
    confidence: float | None = pydantic.Field(None, gt=0, le=1)
    """End a draft at a token that the drafter gave less than this probability; null drafts to the limit."""

    def build(self) -> Speculative:
        """The strategy with these settings."""
        confidence = self.confidence
        stopper = None if confidence is None else ConfidenceStopper(confidence)
        return Speculative("speculative", self.drafter(lambda: stopper), ExactVerifier(), self.draft_tokens)
