"""What a model says of a prompt itself: the probability of each of its tokens, or one vector for all of it.

Both are methods like any other, so prompts are read in the steps in which other texts decode. Not in the
registry: they answer other questions than how to go on, and leave what they found on themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from puna.decode.lane import Steps
    from puna.decode.request import Running
    from puna.decode.strategy import Strategy
    from puna.decode.ticket import Alternatives

_PIECE = 64
"""Tokens whose logits are looked at together: [64, vocab] float32 is 13 MB for a vocabulary of 49,152."""

Pooling = Literal["mean", "last"]


class ScoredPrompt:
    """Scores the prompt, then goes on as ``then`` does. For one prompt; of n texts the first one scores.

    ``logprobs`` are natural logarithms of the model's own distribution, one per token, nothing for the
    first, which no token stands before; ``top`` the ``alternatives`` likeliest tokens at each place.
    """

    def __init__(self, then: Strategy, alternatives: int) -> None:
        self.name = then.name
        self.lossless = then.lossless
        self.logprobs: list[float | None] = [None]
        self.top: list[Alternatives | None] = [None]
        self._then = then
        self._alternatives = alternatives
        self._begun = False

    def run(self, request: Running) -> Steps[None]:
        """Read the prompt for its logits, then produce the text."""
        if not self._begun:
            self._begun = True
            lane, prompt = request.lane, request.prompt
            lane.crop(0)  # what earlier texts share has no logits any more
            for start in range(0, len(prompt) - 1, _PIECE):
                piece = prompt[start : min(start + _PIECE, len(prompt) - 1)]
                result = yield from lane.read(piece, outputs=len(piece))
                self._note(result.logits, prompt[start + 1 : start + 1 + len(piece)])
        yield from self._then.run(request)

    def _note(self, logits: Tensor, following: list[int]) -> None:
        import torch

        logs = logits.float().log_softmax(-1)  # [piece, vocab]
        self.logprobs += logs.gather(1, torch.tensor(following, device=logs.device)[:, None])[:, 0].tolist()
        values, ids = logs.topk(min(self._alternatives, logs.shape[1]))
        self.top += [
            list(zip(row, found, strict=True))
            for row, found in zip(ids.tolist(), values.tolist(), strict=True)
        ]


class PromptVector:
    """Reads the prompt and produces nothing: ``vector`` is its final hidden states pooled, of length 1.

    ``mean`` of all tokens or the ``last`` token's. A decoder that was not trained for it gives vectors
    of modest quality; what is alike in words comes out alike.
    """

    name: ClassVar[str] = "prompt-vector"
    lossless: ClassVar[bool] = True

    def __init__(self, pooling: Pooling = "mean") -> None:
        self.vector: list[float] = []
        self._pooling = pooling

    def run(self, request: Running) -> Steps[None]:
        """Read the prompt."""
        lane, prompt = request.lane, request.prompt
        if self._pooling == "last":
            result = yield from lane.catch_up(prompt)
            total = result.hidden[-1].double()
        else:
            lane.crop(0)
            sums = []
            for start in range(0, len(prompt), _PIECE):
                piece = prompt[start : start + _PIECE]
                result = yield from lane.read(piece, outputs=len(piece))
                sums.append(result.hidden.double().sum(0))
            total = sum(sums[1:], sums[0])
        self.vector = (total / total.norm().clamp_min(1e-12)).cpu().tolist()
