"""Plain decoding: one token after another, greedily or drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from puna.decode.strategy import StrategySettings, strategy
from puna.decode.trace import TraceRow

if TYPE_CHECKING:
    from puna.decode.lane import Steps
    from puna.decode.request import Running

_TARGET = "target"


class Plain:
    """One model writes every token itself: the target, or another by its name, which is not its law."""

    name: ClassVar[str] = "plain"

    def __init__(self, model: str = _TARGET) -> None:
        self.model = model
        self.lossless = model == _TARGET

    def run(self, request: Running) -> Steps[None]:
        """Read the prompt, then each token that was chosen."""
        lane = request.lane if self.model == _TARGET else request.open_lane(self.model)
        result = yield from lane.catch_up(request.prompt)
        while True:
            logits = result.logits[-1]
            token = request.law(logits).draw(request.random)
            if request.emit(token, TraceRow(token, self.model), logits):
                return
            result = yield from lane.read((token,))


@strategy("plain")
class PlainSettings(StrategySettings):
    """Settings of plain decoding."""

    companions: ClassVar[tuple[str, ...]] = ("model",)
    model: str = _TARGET
    """Name of the model that writes, of those the engine was given; any but "target" is lossy."""

    def build(self) -> Plain:
        """The strategy."""
        return Plain(self.model)
