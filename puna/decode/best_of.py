"""Several answers to a prompt, of which the model itself picks one: adaptively, annealed, pruned.

System S25 (Manvi and others 2024, arXiv:2410.02725), with the scores of ``self_evaluation.py``. Without
a threshold all samples are drawn side by side and the best score wins; ``prune_at`` scores them in
the middle too, and only the best part goes on. With a threshold they are drawn one after the other
until one passes it. Annealed, the first is greedy and the temperature of the others approaches the
request's: half of it, three quarters, and so on.

Simplified: the model that answers scores too, and it is to be trained for it. Without that the
scores mean little.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import pydantic
import torch

from puna.core.errors import PunaError
from puna.core.seeds import torch_generator
from puna.decode.lane import together
from puna.decode.pieces import TextPieces
from puna.decode.request import TARGET
from puna.decode.self_evaluation import QUESTION, SelfEvaluation
from puna.decode.strategy import StrategySettings, strategy
from puna.decode.trace import TraceRow

if TYPE_CHECKING:
    from torch import Tensor

    from puna.decode.lane import Lane, Result, Steps
    from puna.decode.protocols import Scorer
    from puna.decode.request import Running


@strategy("best-of")
class BestOfSettings(StrategySettings):
    """Settings of choosing among several samples."""

    samples: int = pydantic.Field(8, ge=1)
    """Samples at most."""
    threshold: float | None = None
    """Draw one after the other until one scores as much; null draws all side by side."""
    anneal: bool = True
    """Begin greedily and raise the temperature with each sample, up to the request's."""
    prune_at: int | None = pydantic.Field(None, ge=1)
    """Tokens after which all samples are scored and the worst given up; null gives none up."""
    prune_keep: float = pydantic.Field(0.5, gt=0, le=1)
    """Share of the samples that goes on then."""
    question: str = QUESTION
    """What the model is asked about its answer; a trained one wants the question it was trained with."""

    @pydantic.model_validator(mode="after")
    def _one_way(self) -> BestOfSettings:
        if self.threshold is not None and self.prune_at is not None:
            raise ValueError("threshold and prune_at are both given: samples are drawn one by one, or pruned")
        if self.prune_at is None and self.prune_keep != 0.5:
            raise ValueError("prune_keep means nothing without prune_at")
        return self

    def build(self) -> BestOf:
        """The strategy."""
        return BestOf(self)


def annealed(temperature: float, place: int) -> float:
    """The temperature of sample ``place``, from 0: greedy, then ever nearer to ``temperature``."""
    return temperature * (1 - 0.5**place)


class _Branch:
    """One sample on its way: a lane that has read all of it but ``pending``, and what was drawn."""

    def __init__(self, request: Running, lane: Lane, temperature: float, generator: torch.Generator) -> None:
        self.lane, self.temperature = lane, temperature
        self.ids: list[int] = []
        self.logits: list[Tensor] = []  # kept only where log probabilities were asked for
        self.ended = False
        self.score = math.nan
        self._request, self._generator = request, generator
        self._pending = [request.prompt[-1]]
        self._result: Result | None = None
        self._pieces = TextPieces(request.tokenizer.decode, request.sampling.stop)

    def read(self) -> Steps[None]:
        """Read what was drawn last; its outputs wait for the next draw."""
        if self._pending:
            self._result = yield from self.lane.read(self._pending)
            self._pending = []

    def draw(self, tokens: int) -> Steps[None]:
        """Draw until the sample has so many tokens, or ends."""
        while not self.ended and len(self.ids) < tokens:
            yield from self.read()
            assert self._result is not None
            logits = self._result.logits[-1]
            law = self._request.law(logits, self.ids, temperature=self.temperature)
            token = law.draw(self._generator)
            self.ids.append(token)
            if self._request.sampling.logprobs:
                self.logits.append(logits)
            self._pending = [token]
            self.ended = self._ends(token)

    def _ends(self, token: int) -> bool:
        if token in self._request.stop_ids:
            self._pending = []  # the question's beginning ends the turn
            return True
        self._pieces.push(token)
        return self._pieces.stopped or len(self.ids) >= self._request.remaining

    def judge(self, scorer: Scorer) -> Steps[None]:
        """Score what there is of the sample."""
        yield from self.read()
        self.score = yield from scorer.score(self.lane, self.lane.ids)


class BestOf:
    """Samples of the target, scored by itself.

    ``drawn`` notes how many each request took, in the order in which they ended; ``judged_midway``
    counts scores of samples that had not.
    """

    name: ClassVar[str] = "best-of"
    lossless: ClassVar[bool] = False

    def __init__(self, settings: BestOfSettings) -> None:
        self.settings = settings
        self.drawn: list[int] = []
        self.judged_midway = 0

    def run(self, request: Running) -> Steps[None]:
        """Draw and score, then produce the sample that was chosen."""
        scorer = SelfEvaluation.of(request.model(TARGET), self.settings.question)
        spec = request.lane.stepper.spec
        if len(request.prompt) + request.remaining + len(scorer.suffix) > spec.max_positions + 1:
            raise PunaError(
                "the context has no room for the question about the answer",
                found=f"a prompt of {len(request.prompt)} tokens, an answer of up to {request.remaining}",
                expected=f"{len(scorer.suffix)} tokens left of {spec.max_positions}",
                fix="lower max_tokens",
            )
        yield from request.lane.catch_up(request.prompt[:-1], outputs=0)
        branches = self._branches(request)
        if self.settings.threshold is None:
            yield from self._side_by_side(branches, request, scorer)
        else:
            yield from self._one_by_one(branches, request, scorer, self.settings.threshold)
        self.drawn.append(sum(1 for branch in branches if branch.ids))
        best = max(
            (branch for branch in branches if not math.isnan(branch.score)), key=lambda branch: branch.score
        )
        for place, token in enumerate(best.ids):
            logits = best.logits[place] if best.logits else None
            if request.emit(token, TraceRow(token), logits):
                return

    def _branches(self, request: Running) -> list[_Branch]:
        count, temperature = self.settings.samples, request.sampling.temperature
        seed = request.random.initial_seed()
        return [
            _Branch(
                request,
                request.lane.fork(),
                annealed(temperature, place) if self.settings.anneal else temperature,
                torch_generator(seed, "best of", place),
            )
            for place in range(count)
        ]

    def _side_by_side(self, branches: Sequence[_Branch], request: Running, scorer: Scorer) -> Steps[None]:
        kept = list(branches)
        if self.settings.prune_at is not None:
            yield from together(*[branch.draw(self.settings.prune_at) for branch in branches])
            self.judged_midway += sum(not branch.ended for branch in branches)
            yield from together(*[branch.judge(scorer) for branch in branches])
            kept.sort(key=lambda branch: -branch.score)
            count = math.ceil(self.settings.prune_keep * len(kept))
            for branch in kept[count:]:
                branch.lane.free()
                branch.score = math.nan
            del kept[count:]
            kept = [branch for branch in kept if not branch.ended]  # the others have their score
        yield from together(*[branch.draw(request.remaining) for branch in kept])
        yield from together(*[branch.judge(scorer) for branch in kept])

    def _one_by_one(
        self, branches: Sequence[_Branch], request: Running, scorer: Scorer, threshold: float
    ) -> Steps[None]:
        for branch in branches:
            yield from branch.draw(request.remaining)
            yield from branch.judge(scorer)
            if branch.score >= threshold:
                return
