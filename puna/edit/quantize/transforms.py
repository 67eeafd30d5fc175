"""What is done to weights before they are rounded, so that rounding costs less.

* AWQ (2306.00978; S18): input channels are scaled by s = mean|x|^a, a searched for, and the scale is taken
  out of what produces them: the norm before q, k, v or gate, up; the values before the output projection,
  where every query head has values of its own; up before down. Then the range of each group is searched for,
  but not of queries and keys. Simplified: the error that is minimised is the squared error of the matrices'
  own outputs, at most 512 of them, over all of the calibration text, from second moments, not that of the
  whole attention.
* SmoothQuant (2211.10438; S18): s_j = max|x_j|^p / max|w_j|^(1-p), into the two norms only.
* Rotation (QuIP, 2307.13304; S18): W between random orthogonal Kronecker products, after inputs were rescaled
  so that weights and second moments have the same diagonal. What is kept is turned back; at run time a packed
  form would turn activations instead.

Folds change no output: see ``tests/edit/test_quantize_transforms.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from puna.edit.quantize.grids import fit_uniform
from puna.edit.quantize.planners import PlainPlanner, group_starts
from puna.edit.quantize.rounding import Moments, nearest
from puna.edit.quantize.settings import Awq, Smooth, Uniform
from puna.model.sites import Site, fold_inputs

_CLIPS = 10  # ranges tried, from whole down to half
_ROWS = 512  # of a site's outputs AWQ's search goes by so many at most, evenly spaced


@dataclass
class Inputs:
    """What is known of the inputs of a site: X X^T [in, in], mean |x| [in], largest |x| [in], rows seen."""

    sums: Tensor
    mean: Tensor
    largest: Tensor
    count: int

    def divide(self, scale: Tensor) -> None:
        """Say that the inputs are divided by ``scale`` [in] from now on."""
        self.sums /= scale[:, None] * scale
        self.mean /= scale
        self.largest /= scale


def smooth(site: Site, inputs: Inputs, settings: Smooth) -> None:
    """Move a part of the activations' range into the weights of a site behind a norm."""
    if site.folds_into != "norm":
        return
    weights = torch.stack([linear.weight.detach().abs().amax(dim=0) for linear in site.linears]).amax(dim=0)
    scale = inputs.largest.clamp(min=1e-5).pow(settings.power)
    scale = (scale / weights.clamp(min=1e-5).pow(1 - settings.power)).clamp(min=1e-5)
    _fold(site, inputs, scale)


def awq(site: Site, inputs: Inputs, settings: Awq, grid: Uniform) -> float:
    """Search the power, fold the scales; returns the power (0 where nothing can be folded)."""
    if site.folds_into is None:
        return 0.0
    every = torch.cat([linear.weight.detach() for linear in site.linears])
    weights = every[:: -(-len(every) // _ROWS)].T.contiguous()  # [in, rows]
    moments = Moments(inputs.sums)
    best, chosen, power = torch.inf, torch.ones(len(weights)), 0.0
    for step in range(settings.points + 1):
        scale = inputs.mean.clamp(min=1e-4).pow(step / settings.points)
        scale = scale / (scale.max() * scale.min()).sqrt()
        scaled = weights * scale[:, None]
        rounded = nearest(scaled, PlainPlanner(grid, scaled))
        error = float(moments.error((rounded - scaled) / scale[:, None]).sum())
        if error < best:
            best, chosen, power = error, scale, step / settings.points
    _fold(site, inputs, chosen)
    return power


def _fold(site: Site, inputs: Inputs, scale: Tensor) -> None:
    fold_inputs(site, scale)
    inputs.divide(scale)


@torch.no_grad()
def clip(linear: nn.Linear, inputs: Inputs, grid: Uniform) -> None:
    """Cut the weights of each output and group to the range whose outputs are nearest, by their group
    alone.
    """
    weights = linear.weight.detach().T.contiguous()
    for start in group_starts(len(weights), grid.group):
        stop = min(start + (grid.group or len(weights)), len(weights))
        values, moments = weights[start:stop], inputs.sums[start:stop, start:stop]
        best, chosen = torch.full_like(values[0], torch.inf), torch.ones_like(values[0])
        for step in range(_CLIPS):
            shrink = 1 - step / (2 * _CLIPS)
            largest = values.abs().amax(dim=0) * shrink
            cut = torch.minimum(torch.maximum(values, -largest), largest)
            left = fit_uniform(cut, grid).nearest(cut) - values
            error = (left * (moments @ left)).sum(dim=0)
            better = error < best
            best, chosen = torch.where(better, error, best), torch.where(better, shrink, chosen)
        largest = values.abs().amax(dim=0) * chosen
        weights[start:stop] = torch.minimum(torch.maximum(values, -largest), largest)
    linear.weight.copy_(weights.T)


def rotate(
    weights: Tensor, sums: Tensor, generator: torch.Generator, *, rescale: bool
) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Weights [in, rows] and second moments [in, in] in a random basis, and the way back for weights."""
    columns, rows = weights.shape
    scale = torch.ones(columns)
    if rescale:
        of_weights, of_inputs = weights.square().sum(dim=1), sums.diagonal()
        alive = (of_weights > 0) & (of_inputs > 0)
        scale[alive] = (of_inputs[alive] / of_weights[alive]).pow(0.25)
        scale /= scale[alive].log().mean().exp() if alive.any() else 1.0
    of_columns, of_rows = _turn(columns, generator), _turn(rows, generator)
    turned = of_rows(of_columns(weights * scale[:, None], False).T, False).T
    moments = of_columns(of_columns(sums / (scale[:, None] * scale), False).T, False)

    def back(found: Tensor) -> Tensor:
        return of_columns(of_rows(found.T, True).T, True) / scale[:, None]

    return turned.contiguous(), (moments + moments.T) / 2, back


def _turn(size: int, generator: torch.Generator) -> Callable[[Tensor, bool], Tensor]:
    """A random rotation of vectors [size, ...], its inverse with True: a Kronecker product of two."""
    first = next(number for number in range(int(size**0.5), 0, -1) if size % number == 0)
    left, right = (_orthogonal(number, generator) for number in (first, size // first))

    def turn(values: Tensor, inverse: bool) -> Tensor:
        a, b = (left.T, right.T) if inverse else (left, right)
        shaped = values.reshape(first, size // first, -1)
        return torch.einsum("ij,jkm,lk->ilm", a, shaped, b).reshape(values.shape)

    return turn


def _orthogonal(size: int, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(size, size, generator=generator, dtype=torch.float64)
    turned, upper = torch.linalg.qr(drawn)
    found: Tensor = turned * upper.diagonal().sign()
    return found.float()
