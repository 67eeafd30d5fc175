"""How a matrix in NF4 is laid out in bytes, from its shape alone; needs no torch, so plans can ask too."""

from __future__ import annotations

import math
from collections.abc import Sequence

BLOCK = 64
"""Weights that share a scale."""
SCALE_BLOCK = 256
"""Scales that share a scale of their own."""


def bits(shape: Sequence[int]) -> tuple[int, int]:
    """Bits of payload and of overhead of a tensor of ``shape``: exactly those of a ``puna.model.nf4.Packed``.

    The payload is 4 bits for each weight, filled up to a byte. The overhead is 8 bits for each block of 64
    weights, 32 for each 256 blocks, and 32 for the mean of the scales. Of a large matrix this is
    8 / 64 + 32 / (64 * 256) = 0.127 bits for a weight (QLoRA, 2305.14314, section 3).
    """
    weights = math.prod(shape)
    scales = -(-weights // BLOCK)
    return 8 * -(-weights // 2), 8 * scales + 32 * -(-scales // SCALE_BLOCK) + 32
