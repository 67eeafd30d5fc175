"""How far the weights of two models lie apart, and whether they are the same to the bit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from puna.core.errors import PunaError
from puna.text import pretrained


@dataclass(frozen=True)
class Difference:
    """Of two models: ``weights`` of each, how many ``differ`` in a bit, the ``largest`` difference."""

    weights: int
    differ: int
    largest: float


def difference(first: str | Path, second: str | Path) -> Difference:
    """Compare two models, whatever they lie in; both are opened in float32. Other shapes are an error."""
    ours = pretrained.load(first)
    theirs = dict(pretrained.load(second).named_parameters())
    count = differ = 0
    largest = 0.0
    for name, parameter in ours.named_parameters():
        other = theirs.pop(name, None)
        if other is None or other.shape != parameter.shape:
            found = "none" if other is None else tuple(other.shape)
            raise _unlike(f"{name}: {found}", f"{name}: {tuple(parameter.shape)}", second)
        one, two = parameter.detach(), other.detach()
        count += one.numel()
        differ += int((one.view(torch.int32) != two.view(torch.int32)).sum())
        largest = max(largest, float((one - two).abs().max()))
    if theirs:
        raise _unlike(", ".join(list(theirs)[:3]), "no such weights", second)
    return Difference(count, differ, largest)


def _unlike(found: str, expected: str, where: str | Path) -> PunaError:
    return PunaError(
        "models of different shape have no difference", where=where, found=found, expected=expected
    )
