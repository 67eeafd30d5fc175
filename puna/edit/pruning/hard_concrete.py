"""Hard concrete variables: factors between 0 and 1 that are exactly 0 or 1 most of the time, and yet have
gradients.

A binary concrete variable s = sigmoid((log u - log(1 - u) + log alpha) / beta), u uniform on (0, 1), is
stretched to (gamma, zeta) and clipped to [0, 1]. The chance that it is not 0 has a closed form,
sigmoid(log alpha - beta log(-gamma / zeta)), so that the expected number of nonzero factors (an L0 norm)
can be part of a loss. Louizos, Welling and Kingma 2018 (1712.01312); constants as in Compresso (S62,
2310.05015).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
"""Temperature, and the ends to which the variable is stretched before it is clipped."""
LARGEST = math.log(100)
"""Bound of |log alpha|, as in the released code of L0 regularisation; beyond it gradients vanish."""
SHARPNESS = 0.8
"""What log alpha / beta is multiplied by where draws have ended."""


def sample(log_alpha: Tensor, generator: torch.Generator) -> Tensor:
    """A draw for each entry of ``log_alpha``, differentiable in it; on the generator's device."""
    tiny = torch.finfo(torch.float32).tiny
    uniform = torch.rand(log_alpha.shape, generator=generator, device=generator.device).to(log_alpha.device)
    uniform = uniform.clamp(tiny, 1 - 2**-24)
    noise = uniform.log() - (-uniform).log1p()
    stretched = torch.sigmoid((noise + log_alpha) / BETA) * (ZETA - GAMMA) + GAMMA
    return stretched.clamp(0.0, 1.0)


def open_chance(log_alpha: Tensor) -> Tensor:
    """The chance that a draw is not 0, entry by entry; differentiable."""
    return torch.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


def log_alpha_of(value: float) -> float:
    """log alpha at which sigmoid(log alpha), the chance before stretching, is ``value``."""
    return math.log(value) - math.log1p(-value)


@torch.no_grad()
def settled(log_alpha: Tensor, *, least: int = 0) -> Tensor:
    """The factors without chance: as many zeros as are expected, [entries] float32.

    The smallest round(n - sum of chances) become 0, though ``least`` stay; of equal ones the first. The
    others are not rounded to 1: they keep sigmoid(0.8 log alpha / beta).
    """
    flat = log_alpha.detach().float()
    soft = torch.sigmoid(flat / BETA * SHARPNESS)
    zeros = round(len(flat) - float(open_chance(flat.double()).sum()))
    soft[flat.argsort(stable=True)[: max(0, min(zeros, len(flat) - least))]] = 0.0
    return soft
