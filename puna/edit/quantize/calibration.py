"""What is seen of the inputs of a block's matrices while calibration text passes: second moments and
magnitudes.

One pass over a block with a hook at each of its sites; sums in float32 over parts of a pass, added up in
float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from puna.edit.gram import add_gram, mirror
from puna.edit.quantize.transforms import Inputs
from puna.model.blockwise import Blockwise
from puna.model.sites import Site


@torch.no_grad()
def collect(passing: Blockwise, sites: Sequence[Site]) -> list[Inputs]:
    """Statistics of the inputs of ``sites``, all of the block that comes next in the order of its forward
    pass, over all rows.
    """
    if not sites:
        return []
    found = [_nothing(site.reader.in_features) for site in sites]
    handles = [
        site.reader.register_forward_pre_hook(_adder(inputs))
        for site, inputs in zip(sites, found, strict=True)
    ]
    try:
        passing.watch(sites[-1].reader)
    finally:
        for handle in handles:
            handle.remove()
    for inputs in found:
        mirror(inputs.sums)
        inputs.mean /= max(inputs.count, 1)
    return found


def _nothing(width: int) -> Inputs:
    return Inputs(torch.zeros(width, width), torch.zeros(width), torch.zeros(width), 0)


def _adder(inputs: Inputs) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def add(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        rows = arguments[0].flatten(0, -2).float()
        add_gram(inputs.sums, rows)
        magnitudes = rows.abs()
        inputs.mean += magnitudes.sum(dim=0)
        torch.maximum(inputs.largest, magnitudes.amax(dim=0), out=inputs.largest)
        inputs.count += len(rows)

    return add


def round_tokens(hidden: Tensor, bits: int) -> Tensor:
    """Each token's numbers [..., width] on a symmetric grid of its own largest magnitude."""
    top = 2 ** (bits - 1) - 1
    wide = hidden.float()
    step = wide.abs().amax(dim=-1, keepdim=True) / top
    scaled: Tensor = wide / torch.where(step > 0, step, 1.0)
    rounded: Tensor = scaled.round_().clamp_(-top - 1, top) * step
    return rounded.to(hidden.dtype)


@contextlib.contextmanager
def rounded_activations(model: nn.Module, bits: int | None) -> Iterator[None]:
    """Within the block every projection of ``model`` (or of one of its blocks) gets rounded inputs."""
    if bits is None:
        yield
        return

    def round_(_module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (round_tokens(arguments[0], bits), *arguments[1:])

    projections = [module for name, module in model.named_modules() if name.endswith("_proj")]
    handles = [module.register_forward_pre_hook(round_) for module in projections]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
