"""How the next token is chosen: greedily, or drawn after temperature, top-k and top-p."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from puna.core.errors import PunaError
from puna.core.seeds import torch_generator


@dataclass(frozen=True)
class Sampling:
    """Settings of one generation; the names are those of OpenAI's and vLLM's interfaces.

    ``temperature`` 0 is greedy. ``top_k`` 0 and ``top_p`` 1 switch the filters off. ``stop`` are
    strings (or one string) at which the text is cut; ``ignore_eos`` runs past the tokenizer's stop tokens to
    ``max_tokens``. With ``logprobs`` each produced token's natural-log probability under the
    unfiltered distribution at temperature 1 is kept.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: Sequence[str] = ()
    logprobs: bool = False
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _require(
            0 <= self.temperature < math.inf,
            "temperature",
            self.temperature,
            "0 (greedy) or a positive number",
        )
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "more than 0 and at most 1 (1 keeps every token)")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (every token) or a positive number of tokens")
        _require(all(self.stop), "stop", self.stop, "strings of at least one character")

    def generator(self, index: int) -> torch.Generator:
        """The generator of the request at ``index``: its draws depend on (seed, index) alone."""
        return torch_generator(self.seed, "sampling", index)


def _require(holds: bool, name: str, found: object, expected: str) -> None:
    if not holds:
        raise PunaError(f"sampling setting {name!r} is out of range", found=repr(found), expected=expected)


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Choose one token id from ``logits`` ``[vocab]`` (float32).

    Drawing inverts the cumulative distribution over tokens from the likeliest down, with one
    uniform number in float64 per token: one draw per step, whatever the vocabulary.
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    ordered, ids = distribution(logits, sampling)
    uniform = torch.rand((), dtype=torch.float64, generator=generator)
    cumulative = ordered.cumsum(0)
    place = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
    return int(ids[min(place, len(ids) - 1)])


def distribution(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Probabilities (float64, falling, sum 1) and ids of the tokens that may be drawn.

    Top-k keeps the k likeliest; top-p then keeps the shortest run of likeliest tokens whose
    probability reaches ``top_p``. Ties keep the lower id.
    """
    scaled = logits.cpu().double() / sampling.temperature
    ordered, ids = scaled.sort(descending=True, stable=True)
    if sampling.top_k:
        ordered, ids = ordered[: sampling.top_k], ids[: sampling.top_k]
    probabilities = ordered.softmax(0)
    if sampling.top_p < 1:
        before = probabilities.cumsum(0) - probabilities
        kept = int((before < sampling.top_p).sum())
        probabilities, ids = probabilities[:kept] / probabilities[:kept].sum(), ids[:kept]
    return probabilities, ids
