"""Plain decoding: one token after another, greedily or drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from puna.decode.strategy import StrategySettings, strategy
from puna.decode.trace import TraceRow

if TYPE_CHECKING:
    from puna.decode.lane import Steps
    from puna.decode.request import Running


class Plain:
    """The target writes every token itself."""

    name: ClassVar[str] = "plain"
    lossless: ClassVar[bool] = True

    def run(self, request: Running) -> Steps[None]:
        """Read the prompt, then each token that was chosen."""
        lane = request.lane
        result = yield from lane.catch_up(request.prompt)
        while True:
            logits = result.logits[-1]
            token = request.law(logits).draw(request.random)
            if request.emit(token, TraceRow(token), logits):
                return
            result = yield from lane.read((token,))


@strategy("plain")
class PlainSettings(StrategySettings):
    """Settings of plain decoding: there are none."""

    def build(self) -> Plain:
        """The strategy."""
        return Plain()
