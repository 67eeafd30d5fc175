"""SparseGPT: weights set to zero by what their loss does to a matrix's outputs; the others make up for it.

Frantar and Alistarh 2023 (2301.00774), as LoRAM (S23, 2502.13533) prunes by it: with U the upper Cholesky
factor of the inverse Hessian X X^T, weight w of input j costs w^2 / U_jj^2. In blocks of 128 inputs the
cheapest go: so large a share of the whole block, or of each row's next m inputs all but n (n:m). Input by
input, what was set to zero over U_jj, times U_jk, is taken from each later input k.

Block of the decoder by block, each calibrated on what pruned ones before it pass on, as the quantisers do.
Shapes stay, and zeros are stored like any other number: nothing is smaller or faster for it here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from puna.core.errors import PunaError
from puna.core.progress import Track
from puna.edit.gram import relative_error
from puna.edit.quantize.calibration import collect
from puna.edit.quantize.rounding import Moments
from puna.model.blockwise import Blockwise
from puna.model.llama import Llama
from puna.model.sites import sites

_BLOCK = 128
UNSTRUCTURED = "unstructured"


@dataclass(frozen=True)
class Pattern:
    """Which weights go: a ``share`` of a block, or of each ``among`` inputs of a row all but ``kept``."""

    share: float = 0.0
    kept: int = 0
    among: int = 0

    @classmethod
    def of(cls, pattern: str, share: float | None) -> Pattern:
        """From "unstructured" and a share, or from "4:8" and the like."""
        if pattern == UNSTRUCTURED:
            if share is None or not 0 <= share < 1:
                raise PunaError(
                    "unstructured pruning takes a share", where="share", found=share, expected="0 up to 1"
                )
            return cls(share=share)
        read = re.fullmatch(r"(\d+):(\d+)", pattern)
        if read is None or not 0 < int(read[1]) <= int(read[2]) <= _BLOCK or _BLOCK % int(read[2]):
            raise PunaError(
                "not a pattern of pruning",
                where="pattern",
                found=pattern,
                expected=f"{UNSTRUCTURED}, or n:m that keeps n of m, m a divisor of {_BLOCK}, such as 4:8",
            )
        if share is not None:
            raise PunaError(
                "the pattern says what share goes", where="share", found=f"{share} with {pattern}"
            )
        return cls(kept=int(read[1]), among=int(read[2]))

    @property
    def removed(self) -> float:
        """The share of the weights that goes."""
        return 1 - self.kept / self.among if self.among else self.share


@dataclass
class Sparsified:
    """What was done: weights looked at, those that are zero now, and by matrix the relative output error.

    An error is the squared error of the outputs over the squared outputs, on the text as the matrix met it.
    """

    weights: int = 0
    zeros: int = 0
    errors: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def sparsify(
    model: Llama,
    pattern: Pattern,
    rows: Tensor,
    *,
    rows_at_once: int = 4,
    damping: float = 0.01,
    dtype: torch.dtype = torch.float32,
) -> Sparsified:
    """Prune all projections of ``model``, float32 and plain, in place; ``rows`` [rows, time] are token ids.

    A pattern that removes nothing changes no bit.
    """
    if model.adapter is not None or model.dtype != torch.float32:
        raise PunaError(
            "a plain model in float32 is pruned",
            where=model.source,
            found=model.dtype,
            fix="merge its adapter",
        )
    done = Sparsified()
    if not pattern.removed:
        return done
    passing = Blockwise(model, rows, rows_at_once=rows_at_once, dtype=dtype)
    layers = range(len(model.spec.blocks))
    with Track("pruning", len(layers), "blocks") as track:
        for layer in layers:
            places = list(sites(model, layer))
            for site, inputs in zip(places, collect(passing, places), strict=True):
                moments = Moments(inputs.sums, damping)
                for name, linear in zip(site.names, site.linears, strict=True):
                    exact = linear.weight.detach().clone()
                    linear.weight.copy_(prune_matrix(exact, moments, pattern))
                    done.errors[name] = relative_error(inputs.sums, exact, linear.weight)
                    done.weights += exact.numel()
                    done.zeros += int((linear.weight == 0).sum())
            passing.advance()
            track.advance()
    return done


def prune_matrix(weight: Tensor, moments: Moments, pattern: Pattern) -> Tensor:
    """A pruned copy of ``weight`` [outputs, inputs], float32; weights on dead inputs go first."""
    found = weight.T.contiguous()  # [inputs, outputs]
    factor = moments.factor  # [inputs, inputs], upper
    costs_of = factor.diagonal().square()
    for start in range(0, len(found), _BLOCK):
        stop = min(start + _BLOCK, len(found))
        part = found[start:stop]
        mask = None
        if not pattern.among:
            mask = _cheapest(_costs(part, costs_of[start:stop], moments.dead[start:stop]), pattern.share)
        errors = torch.zeros_like(part)
        for place in range(stop - start):
            at = start + place
            if pattern.among and place % pattern.among == 0:
                group = slice(place, min(place + pattern.among, len(part)))
                inputs = slice(start + group.start, start + group.stop)
                mask = torch.zeros_like(part, dtype=torch.bool) if mask is None else mask
                mask[group] = _rest_of(_costs(part[group], costs_of[inputs], moments.dead[inputs]), pattern)
            assert mask is not None
            lost = torch.where(mask[place], part[place], 0.0)
            errors[place] = lost / factor[at, at]
            part[place] -= lost
            part[place + 1 :].addr_(factor[at, at + 1 : stop], errors[place], alpha=-1)
            part[place].masked_fill_(mask[place], 0.0)
        found[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return found.T.contiguous()


def _costs(part: Tensor, squares: Tensor, dead: Tensor) -> Tensor:
    """What each weight's loss costs [inputs, outputs]; nothing where the input was never there."""
    costs = part.square() / squares[:, None]
    return costs.masked_fill_(dead[:, None], -1.0)


def _cheapest(costs: Tensor, share: float) -> Tensor:
    """True for the cheapest so many of a block, exactly; of equal ones the first."""
    mask = torch.zeros(costs.numel(), dtype=torch.bool)
    mask[costs.flatten().argsort(stable=True)[: round(share * costs.numel())]] = True
    return mask.view(costs.shape)


def _rest_of(costs: Tensor, pattern: Pattern) -> Tensor:
    """True for all but the dearest ``kept`` of a group of inputs, of each output; a short group alike."""
    gone = round(len(costs) * pattern.removed)
    order = costs.argsort(dim=0, stable=True)
    return torch.zeros_like(costs, dtype=torch.bool).scatter_(0, order[:gone], True)


def follows(weights: Mapping[str, Tensor], pattern: Pattern) -> int:
    """How many groups of m inputs of a row keep more than n weights, over matrices [outputs, inputs]."""
    beyond = 0
    for weight in weights.values():
        whole = weight.shape[1] // pattern.among * pattern.among
        groups = (weight[:, :whole] != 0).view(len(weight), -1, pattern.among).sum(-1)
        beyond += int((groups > pattern.kept).sum())
    return beyond
