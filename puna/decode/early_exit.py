"""Decoding that leaves the model at an inner layer wherever that layer is certain of the next token.

System S24, Sorted LLaMA (Kavehzadeh and others 2023, arXiv:2309.08968): its instance-aware exits; the climb
itself is :mod:`puna.model.early_exit`. It is worth something for a model whose inner layers were trained
to end in words (the setting ``exits`` of the stage ``train``). The paper's thresholds fall towards the
top: 0.95 at 12 and 16 of 40 layers, 0.9 at 20 and 24, 0.8 at 28 and 32, 0.7 at 36; ``threshold`` is one
for all exits unless ``thresholds`` are given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import pydantic

from puna.decode.strategy import StrategySettings, strategy
from puna.decode.trace import TraceRow
from puna.model.early_exit import EarlyExit, must_climb

if TYPE_CHECKING:
    from puna.decode.lane import Steps
    from puna.decode.request import Running
    from puna.model.spec import LlamaSpec


@strategy("early-exit")
class EarlyExitSettings(StrategySettings):
    """Settings of early exits."""

    exits: tuple[int, ...] = pydantic.Field(min_length=1)
    """Layers behind which a token may leave, counted from 1, rising."""
    threshold: float = pydantic.Field(0.9, ge=0)
    """Probability of the likeliest token that has to be exceeded; from 1 on none leaves."""
    thresholds: tuple[float, ...] | None = None
    """One for each exit, in place of ``threshold``."""

    def build(self) -> EarlyExiting:
        """The strategy."""
        thresholds = self.thresholds or (self.threshold,) * len(self.exits)
        return EarlyExiting(EarlyExit(self.exits, thresholds))


class EarlyExiting:
    """Plain decoding whose tokens are read with exits; prompts are read in full."""

    name: ClassVar[str] = "early-exit"
    lossless: ClassVar[bool] = False

    def __init__(self, exits: EarlyExit) -> None:
        self.exits = exits

    def run(self, request: Running) -> Steps[None]:
        """Read the prompt in full and each token with the exits; the trace says where each law comes from."""
        lane = request.lane
        spec = lane.stepper.spec
        self.exits.check(len(spec.blocks))
        result = yield from lane.catch_up(request.prompt)
        source, cost = "target", 1.0
        while True:
            logits = result.logits[-1]
            token = request.law(logits).draw(request.random)
            if request.emit(token, TraceRow(token, source, cost=cost), logits):
                return
            result = yield from lane.read((token,), exits=self.exits)
            asked = () if must_climb(len(lane.ids) - 1) else self.exits.layers
            whole = result.depth == len(spec.blocks)
            source = "target" if whole else f"layer {result.depth}"
            cost = weights_read(spec, result.depth, asked) / weights_read(spec, len(spec.blocks))


def weights_read(spec: LlamaSpec, depth: int, exits: tuple[int, ...] = ()) -> int:
    """Weights read for a token that leaves behind ``depth`` layers: theirs, and the head's at each exit.

    What has waited below and is read along uses the same weights in the same pass.
    """
    head = spec.vocab_size * spec.hidden_size
    layers = sum(
        block.parameter_count(spec.hidden_size, spec.attention_bias, spec.mlp_bias)
        for block in spec.blocks[:depth]
    )
    heads = sum(exit_layer <= depth for exit_layer in exits) + (depth == len(spec.blocks))
    return layers + heads * head
