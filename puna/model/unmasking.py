"""Which layers see later tokens: the causal mask taken away in groups of layers.

System S75 (Dukić and Šnajder 2024, arXiv:2401.14556): the layers are cut into groups of equal size, from
the embedding up, and a pattern of 0 and 1 says of each whether its mask is removed. S14's LS-unLLaMA
removes it everywhere. What stays is that no token sees padding or another document; that is in every layout
of the decoder (:mod:`puna.model.attention`), so the mask of a layer is nothing but
:attr:`BlockSpec.causal`.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import TYPE_CHECKING

from puna.core.errors import PunaError

if TYPE_CHECKING:
    from puna.model.llama import Llama
    from puna.model.spec import LlamaSpec


def check_pattern(pattern: str) -> str:
    """``pattern`` if it is one of 0 and 1, else a ``ValueError``."""
    if not re.fullmatch("[01]+", pattern):
        raise ValueError(f"a pattern is 0 (causal) and 1 (unmasked) by group, low layers first: {pattern!r}")
    return pattern


def all_patterns(groups: int) -> list[str]:
    """Every pattern of so many groups, from all causal to all unmasked."""
    return ["".join(digits) for digits in itertools.product("01", repeat=groups)]


def group_sizes(layers: int, groups: int) -> list[int]:
    """How many layers each group has: as even as can be, larger ones first."""
    if groups > layers:
        raise PunaError(
            "there are more groups than layers",
            where="unmask",
            found=f"{groups} groups",
            expected=f"at most {layers}",
        )
    return [layers // groups + (number < layers % groups) for number in range(groups)]


def unmasked(spec: LlamaSpec, pattern: str) -> LlamaSpec:
    """``spec`` with the causal mask where ``pattern`` has a 0, and without it where it has a 1."""
    sizes = group_sizes(len(spec.blocks), len(check_pattern(pattern)))
    causal = [digit == "0" for digit, size in zip(pattern, sizes, strict=True) for _ in range(size)]
    blocks = zip(spec.blocks, causal, strict=True)
    return spec.replace(blocks=tuple(dataclasses.replace(block, causal=each) for block, each in blocks))


def unmask(model: Llama, pattern: str) -> None:
    """Set the masks of ``model`` by ``pattern``, in place."""
    model.set_blocks(unmasked(model.spec, pattern).blocks)
