"""How many tokens of each text a step reads: decode-maximal batches with chunked prefill.

S76 SARATHI (arXiv:2308.16369). A step takes every text that decodes, and fills up with at most
one chunk's worth of prompt tokens, so that a long prompt delays nobody by more than one such step, and
the weights that decoding needs are read once for both. The chunk is cut so that the rows of the step
are a multiple of a tile of matrix products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from puna.core.errors import PunaError

SHORT = 16
"""Up to so many tokens a text counts as decoding (one token, or a draft to verify), not as a prompt."""
TILE = 16


@dataclass(frozen=True)
class BatchSettings:
    """``max_batch_tokens`` of a step in all; beside decoding texts at most ``chunk_tokens`` of prompts."""

    max_batch_tokens: int = 512
    chunk_tokens: int = 128  # on CPUs a row of a prompt hardly gets cheaper beyond 64 (docs/notebook.md)

    def __post_init__(self) -> None:
        for name in ("max_batch_tokens", "chunk_tokens"):
            if getattr(self, name) < 1:
                raise PunaError(f"{name} is out of range", found=getattr(self, name), expected="at least 1")


def plan_batch(pending: Sequence[int], settings: BatchSettings) -> list[int]:
    """Tokens to read now of each text, from the tokens that each has ``pending``, the oldest first.

    Texts that decode come first and whole; then prompts in order, the last of them cut. What finds
    no room gets 0 and is first in line after its elders the next time.
    """
    counts = [0] * len(pending)
    left = settings.max_batch_tokens
    for place, tokens in enumerate(pending):
        if tokens <= SHORT and tokens <= left:
            counts[place] = tokens
            left -= tokens
    decoding = settings.max_batch_tokens - left
    if decoding:
        left = min(left, settings.chunk_tokens)
        surplus = (decoding + left) % TILE
        if left > surplus:
            left -= surplus
    for place, tokens in enumerate(pending):
        if tokens > SHORT and left:
            counts[place] = min(tokens, left)
            left -= counts[place]
    if pending and not any(counts):  # max_batch_tokens below a draft's length
        counts[0] = min(pending[0], settings.max_batch_tokens)
    return counts
