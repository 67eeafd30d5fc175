"""Named random generators: every draw comes from (run seed, stage, purpose), never from global state."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy
    import torch


def derive(seed: int, *purpose: object) -> int:
    """A 63-bit seed that depends on ``seed`` and on every part of ``purpose``."""
    text = "/".join([str(seed), *map(str, purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def numpy_generator(seed: int, *purpose: object) -> numpy.random.Generator:
    """A numpy generator for one purpose."""
    import numpy

    return numpy.random.default_rng(derive(seed, *purpose))


def torch_generator(seed: int, *purpose: object, device: str = "cpu") -> torch.Generator:
    """A torch generator for one purpose on ``device``."""
    import torch

    generator = torch.Generator(device=device)
    generator.manual_seed(derive(seed, *purpose))
    return generator
