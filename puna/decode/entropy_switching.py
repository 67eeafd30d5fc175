"""Switching between a small and a large model by the entropy of what the active one would write.

System S34, Entropy Adaptive Decoding (Simonds 2025, arXiv:2502.06833). One of two models with one tokenizer
is active and writes; nothing is verified, so the text follows neither model's law. The entropy of
the active model's raw logits decides who goes on (:class:`EntropyRouter`). The model that comes in
first reads, in one pass, the tokens that it has not read: the paper's cost, the share of large tokens
times the large model and the rest times the small one, leaves that out. Here every row of the trace
counts it; :func:`spent` gives both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import pydantic

from puna.core.errors import PunaError
from puna.core.seeds import torch_generator
from puna.decode.routers import EntropyRouter, RandomRouter, Size
from puna.decode.sampling import entropy_bits
from puna.decode.strategy import StrategySettings, strategy
from puna.decode.trace import TraceRow

if TYPE_CHECKING:
    from puna.decode.lane import Steps
    from puna.decode.protocols import Router
    from puna.decode.request import Running


@strategy("entropy-switching")
class EntropySwitchingSettings(StrategySettings):
    """Settings of entropy switching. The engine's own model is the large one."""

    companions: ClassVar[tuple[str, ...]] = ("small",)
    small: str = "small"
    """Name of the small model among the engine's models."""
    threshold: float = 1.0
    """Bits above which the large model writes; negative keeps it writing, a huge number never calls it."""
    threshold_large: float | None = None
    """The same while the large model writes, since two models are calibrated apart; null takes the same."""
    window: int = pydantic.Field(5, ge=1)
    """Tokens over which the entropy is averaged."""
    minimum_stay: int = pydantic.Field(5, ge=1)
    """Tokens that a model writes at least before it is switched."""
    start: Size = "small"
    """Who writes first."""
    rule: Literal["entropy", "random"] = "entropy"
    """random is the baseline: after every stay a draw, whatever the entropy."""
    share: float = pydantic.Field(0.5, ge=0, le=1)
    """random: probability that the large model is drawn."""

    def build(self) -> EntropySwitching:
        """The strategy."""
        return EntropySwitching(self)


class EntropySwitching:
    """A small and a large model, one active at a time."""

    name: ClassVar[str] = "entropy-switching"
    lossless: ClassVar[bool] = False

    def __init__(self, settings: EntropySwitchingSettings) -> None:
        self.settings = settings

    def run(self, request: Running) -> Steps[None]:
        """Write with the active model; let the router choose after each token."""
        _check_tokenizers(request, self.settings.small)
        lanes = {"large": request.lane, "small": request.open_lane(self.settings.small)}
        router, current = self._router(request), self.settings.start
        result = yield from lanes[current].catch_up(request.prompt)
        while True:
            logits = result.logits[-1]
            entropy = entropy_bits(logits)
            token = request.law(logits).draw(request.random)
            if request.emit(token, TraceRow(token, current, entropy), logits):
                return
            following = router.choose(entropy, current)
            if following == current:
                result = yield from lanes[current].read((token,))
            else:
                current = following
                result = yield from lanes[current].catch_up([*request.prompt, *request.ids])

    def _router(self, request: Running) -> Router:
        settings = self.settings
        if settings.rule == "random":
            # Draws of its own, so that both rules draw the same tokens while the same model writes.
            generator = torch_generator(request.random.initial_seed(), "random switching")
            return RandomRouter(settings.share, generator, minimum_stay=settings.minimum_stay)
        return EntropyRouter(
            settings.threshold,
            threshold_large=settings.threshold_large,
            window=settings.window,
            minimum_stay=settings.minimum_stay,
        )


def _check_tokenizers(request: Running, small: str) -> None:
    theirs = request.model(small).tokenizer
    if theirs is None or theirs.fingerprint != request.tokenizer.fingerprint:
        raise PunaError(
            "the two models must share one tokenizer",
            where=f"model {small!r}",
            found="no tokenizer" if theirs is None else f"tokenizer {theirs.fingerprint}",
            expected=f"tokenizer {request.tokenizer.fingerprint}, the engine's own model's",
            fix="for models of different vocabularies there is the strategy 'nudging'",
        )


def spent(trace: Sequence[TraceRow], weight: float) -> tuple[float, float]:
    """Cost of a token in passes of the large model, with catching up and without.

    ``weight`` is the small model's number of parameters over the large one's. Without, a token costs what its
    writer does: the paper's account.
    """
    counted = sum(row.cost or 0.0 for row in trace)
    alone = sum(1.0 if row.source == "large" else weight for row in trace)
    return counted / len(trace), alone / len(trace)
