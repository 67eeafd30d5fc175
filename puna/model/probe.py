"""A probe of a model's function: the logits of a few fixed tokens, to show that a change changed nothing."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from puna.core.seeds import torch_generator
from puna.model.llama import Llama

PROBE_TOKENS = 48


def probe_ids(model: Llama) -> Tensor:
    """Seeded random token ids [1, 48]; they depend on the size of the vocabulary alone."""
    generator = torch_generator(0, "probe", model.spec.vocab_size)
    return torch.randint(model.spec.vocab_size, (1, PROBE_TOKENS), generator=generator).to(model.device)


@torch.no_grad()
def probe(model: Llama) -> Tensor:
    """Logits [1, 48, vocab] of :func:`probe_ids`; dropout is off while they are computed.

    Two models whose probes are equal to the bit compute the same function on these tokens.
    """
    ids = probe_ids(model)
    training = model.training
    model.eval()
    try:
        return cast(Tensor, model(ids))
    finally:
        model.train(training)


def difference(before: Tensor, after: Tensor) -> float:
    """Largest absolute difference of two probes; 0.0 means equal to the bit."""
    return float((before - after).abs().max())
