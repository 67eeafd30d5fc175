"""What the pure objectives ask of their arguments: settings in range, one shape, float32 or wider."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from puna.core.errors import PunaError


def require_setting(holds: bool, objective: str, name: str, found: object, expected: str) -> None:
    """Refuse the setting ``name`` of ``objective`` unless ``holds``."""
    if not holds:
        raise PunaError(
            f"setting {name!r} of {objective} is out of range", found=repr(found), expected=expected
        )


def require_positive(objective: str, name: str, value: float) -> None:
    """Refuse a setting that is not a positive finite number."""
    require_setting(0 < value < math.inf, objective, name, value, "a positive number")


def precise(tensor: Tensor) -> Tensor:
    """``tensor`` in float32, or as it is if it is wider: losses are never taken in 16 bits."""
    return tensor.to(precise_dtype(tensor))


def precise_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that :func:`precise` gives ``tensor``."""
    return torch.promote_types(tensor.dtype, torch.float32)


def require_shape(what: str, found: Tensor, expected: torch.Size | tuple[int, ...]) -> None:
    """Refuse a tensor of another shape: broadcasting would silently pair the wrong numbers."""
    if tuple(found.shape) != tuple(expected):
        raise PunaError(
            f"{what} has another shape than what it belongs to",
            found=list(found.shape),
            expected=list(expected),
        )
