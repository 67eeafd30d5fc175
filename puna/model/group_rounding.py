"""Weights on the grids that int8 and int4 have: what quantisation leaves, without its speed or size.

Groups of 32 inputs, each with the smallest weight and a step in half precision: level * step +
smallest, with 255 or 15 levels. The native kernels pack the same grid; here the weights it leaves stand in
float32, so that quality can be judged on any device. With int4 the head keeps 8 bits, as there.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from puna.core.errors import PunaError

if TYPE_CHECKING:
    from puna.model.llama import Llama

GROUP = 32
LEVELS = {"int8": 255, "int4": 15}
_LARGEST_HALF = 65504.0


def on_grid(weight: Tensor, levels: int) -> Tensor:
    """The matrix [outputs, inputs] as quantisation leaves it, in float32."""
    outputs, inputs = weight.shape
    wide = weight.detach().float()
    # The last group may be shorter; repeating its last weight changes neither its ends nor the rest.
    padded = torch.cat((wide, wide[:, -1:].expand(-1, -inputs % GROUP)), dim=1).view(outputs, -1, GROUP)
    low, high = padded.aminmax(dim=2, keepdim=True)
    step = ((high - low) / levels).clamp(max=_LARGEST_HALF).half().float()
    low = low.clamp(-_LARGEST_HALF, _LARGEST_HALF).half().float()
    exact = torch.where(step > 0, (padded - low) / step.where(step > 0, 1.0), 0.0)
    rounded = exact.clamp(0, levels).round() * step + low
    return rounded.view(outputs, -1)[:, :inputs]


def _keeps(model: Llama, name: str, quantize: Literal["int8", "int4"]) -> bool:
    """Whether the kernels keep this matrix on the grid that it lies on already."""
    from puna.model.native.weights import grid_steps

    grid = model.grids.get(name)
    return grid is not None and grid_steps(model, name, model.get_parameter(name), quantize) is not None


@torch.no_grad()
def rounded_copy(model: Llama, quantize: Literal["int8", "int4"]) -> Llama:
    """A float32 copy of ``model`` whose layers and head have the weights that quantisation leaves.

    A tied embedding is the head. Raises :class:`PunaError` for a model that carries an adapter or
    whose projections are not plain.
    """
    odd = [
        name
        for name, module in model.named_modules()
        if name.endswith(("_proj", "linear_attn", "linear_mlp")) and type(module) is not nn.Linear
    ]
    if odd:
        raise PunaError(
            "only plain linear layers are quantised",
            where=model.source,
            found=f"{type(model.get_submodule(odd[0])).__name__} at {odd[0]}",
            fix="merge the adapter first (merge_lora)",
        )
    twin = copy.deepcopy(model).float()
    for name, grid in model.grids.items():
        if _keeps(model, name, quantize):  # weights in bfloat16 are those of the grid only after rounding
            weight = model.get_parameter(name)
            levels = grid.levels(weight)
            assert levels is not None
            twin.get_parameter(name).copy_(grid.decode(levels))
    head = twin.head_weight
    for name, parameter in twin.named_parameters():
        if parameter is head:
            parameter.copy_(on_grid(parameter, LEVELS["int8"]))
        elif ".merger." in name:  # a gate's few weights
            continue
        elif parameter.dim() == 2 and ".layers." in name and not _keeps(model, name, quantize):
            parameter.copy_(on_grid(parameter, LEVELS[quantize]))
    return twin
