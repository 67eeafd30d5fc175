"""Models that the decoding tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def speaking(tiny_llama: Callable[..., Any], tokenizer: Any, seed: int = 0, **changes: Any) -> Any:
    """A tiny Llama with a tokenizer and larger weights, so that its text depends on the prompt."""
    model = tiny_llama(seed, **{"tie_word_embeddings": False, **changes})
    for parameter in model.parameters():
        parameter.data.mul_(4)
    model.tokenizer = tokenizer
    return model
