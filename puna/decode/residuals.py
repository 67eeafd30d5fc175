"""What the two residuals of a shifted verifier emit, on random laws: exactly, by enumeration (S28)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from puna.core.seeds import torch_generator
from puna.decode.sampling import Law
from puna.decode.verifiers import Residual, ShiftedVerifier, emitted


@dataclass(frozen=True)
class Distances:
    """Over pairs of laws: largest error of a probability against p', mean total variation to p' and p."""

    largest: float
    to_shifted: float
    to_target: float


def distances(eta: float, residual: Residual, *, laws: int, vocabulary: int, seed: int) -> Distances:
    """Draw so many pairs of laws (softmax of standard normal logits) and compare what is emitted."""
    generator = torch_generator(seed, "residuals")
    verifier = ShiftedVerifier(eta=eta, residual_mode=residual)
    largest, shifted_apart, target_apart = 0.0, 0.0, 0.0
    for _ in range(laws):
        logits = torch.randn(2, vocabulary, generator=generator, dtype=torch.float64)
        target, draft = (Law(vocabulary, row.softmax(0), None) for row in logits)
        found, shifted = emitted(verifier, target, draft), verifier.shifted(target, draft)
        largest = max(largest, float((found - shifted).abs().max()))
        shifted_apart += float((found - shifted).abs().sum()) / 2
        target_apart += float((found - target.probabilities).abs().sum()) / 2
    return Distances(largest, shifted_apart / laws, target_apart / laws)
