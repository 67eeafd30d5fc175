"""A drafter's head cut to the frequent tokens: most of what a small model reads in a step is its head.

After FR-Spec (2502.14856). Byte-pair tokenizers number tokens in the order in which they were merged, so
that the first ids are the most frequent tokens of the text the tokenizer was made from; special tokens
stay whatever their ids. A drafter cannot propose what its head has no row for, and a verifier that
keeps the target's law keeps it all the same.

Simplified: the order is the tokenizer's own, not counted on the target's text.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

if TYPE_CHECKING:
    from puna.model.llama import Llama

_MADE: WeakKeyDictionary[Llama, dict[int, ShortHead]] = WeakKeyDictionary()


class ShortHead:
    """The rows of a model's head for the tokens ``ids`` alone; all others have no probability."""

    def __init__(self, model: Llama, count: int) -> None:
        vocab = model.spec.vocab_size
        tokenizer: Any = model.tokenizer
        special = set() if tokenizer is None else {token for token in tokenizer.special_ids if token < vocab}
        self.ids = torch.tensor(sorted(special | set(range(min(count, vocab)))), device=model.device)
        self.vocab = vocab
        self._rows = model.head_weight.detach()[self.ids]  # [ids, hidden]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits [rows, vocab] of hidden states [rows, hidden]; -inf where there is no row."""
        found = torch.full((len(hidden), self.vocab), -math.inf, device=self._rows.device)
        found[:, self.ids] = (hidden.to(self._rows) @ self._rows.T).float()
        return found


def short_head(model: Llama, count: int) -> ShortHead:
    """The head of ``model`` for its first ``count`` tokens and the special ones; made once for a model."""
    made = _MADE.setdefault(model, {})
    if count not in made:
        made[count] = ShortHead(model, count)
    return made[count]


def pass_weights(model: Llama, count: int | None = None) -> int:
    """Weights that one pass reads: all of them, but of the input embedding, if it is not the head, one row.

    With a short head of ``count`` tokens its rows in place of the head's.
    """
    spec = model.spec
    matrix = spec.vocab_size * spec.hidden_size
    whole = spec.parameter_count() - (0 if spec.tied else matrix)
    return whole if count is None else whole - matrix + len(short_head(model, count).ids) * spec.hidden_size
