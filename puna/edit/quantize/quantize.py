"""Quantise the matrices of a decoder, block by block, in place: each block sees what quantised ones left it.

For each block: the statistics of its inputs, made by the quantised blocks before it; transforms, folded into
its weights; rounding; and its outputs, made by what it has become. One block's statistics are in memory at a
time, and the hidden states of the calibration rows. What uses no activations needs no calibration rows and
reads none.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from puna.core.errors import PunaError
from puna.core.progress import Track
from puna.core.seeds import torch_generator
from puna.edit.gram import relative_error
from puna.edit.quantize.calibration import collect, rounded_activations
from puna.edit.quantize.nf4_planner import Nf4Planner
from puna.edit.quantize.planners import (
    BitsByGroupPlanner,
    PlainPlanner,
    SalientColumnsPlanner,
    SalientWeightsPlanner,
)
from puna.edit.quantize.rounding import Moments, gptq, gptq_by_activation, ldlq, nearest
from puna.edit.quantize.settings import (
    Awq,
    Binary,
    BitsByGroup,
    Gptq,
    Ldlq,
    Nf4,
    Quantization,
    Rotate,
    SalientColumns,
    SalientWeights,
    Smooth,
    Uniform,
)
from puna.edit.quantize.storage import NOTHING, Storage
from puna.edit.quantize.transforms import Inputs, awq, clip, rotate, smooth
from puna.model.blockwise import Blockwise
from puna.model.llama import Llama
from puna.model.sites import Site, sites
from puna.model.uniform_grid import UniformGrid

Planner = PlainPlanner | BitsByGroupPlanner | SalientWeightsPlanner | SalientColumnsPlanner | Nf4Planner


@dataclass
class Quantized:
    """What was done: storage of all matrices together and of each, seconds, and where it is known, errors.

    ``errors`` are the squared errors of a matrix's outputs over the squared outputs, on the calibration text
    as the matrix met it: of each that was calibrated. ``powers`` are those AWQ chose, by a site's first
    matrix.
    """

    storage: Storage = NOTHING
    matrices: dict[str, Storage] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    powers: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


@torch.no_grad()
def quantize(
    model: Llama,
    settings: Quantization,
    rows: Tensor | None = None,
    *,
    seed: int = 0,
    rows_at_once: int = 4,
    dtype: torch.dtype = torch.float32,
) -> Quantized:
    """Quantise ``model``, float32 and plain, in place; ``rows`` [rows, time] are token ids to calibrate on.

    Products of the passes over them run in ``dtype``; hidden states, moments and rounding are float32.

    ``model.grids`` has the grid of each matrix that lies on a uniform one afterwards. Raises
    :class:`PunaError` for a model in another dtype, with an adapter or in NF4, and where rows are needed and
    there are none.
    """
    _check(model, settings, rows)
    began = time.perf_counter()
    done = Quantized()
    model.grids = {}
    passing = None
    if settings.calibrated and rows is not None:
        passing = Blockwise(model, rows, rows_at_once=rows_at_once, dtype=dtype)
    last = max(
        (layer for layer in range(len(model.spec.blocks)) if layer not in settings.skip_layers), default=-1
    )
    with Track("quantising", last + 1, "blocks") as track:
        for layer in range(last + 1):
            if layer not in settings.skip_layers:
                _quantize_block(model, layer, settings, passing, seed, done)
            if passing is not None and layer < last:
                with rounded_activations(model.model.layers[layer], settings.activation_bits):
                    passing.advance()
            track.advance()
    done.storage = sum(done.matrices.values(), NOTHING)
    done.seconds = time.perf_counter() - began
    return done


def _check(model: Llama, settings: Quantization, rows: Tensor | None) -> None:
    odd = [
        name
        for name, module in model.named_modules()
        if name.endswith(("_proj", "linear_attn", "linear_mlp")) and type(module) is not nn.Linear
    ]
    if odd or model.dtype != torch.float32:
        raise PunaError(
            "a plain model in float32 is quantised",
            where=model.source,
            found=f"{type(model.get_submodule(odd[0])).__name__} at {odd[0]}" if odd else model.dtype,
            fix="merge the adapter first (merge_lora)" if odd else "load it with dtype float32",
        )
    beyond = [layer for layer in settings.skip_layers if not 0 <= layer < len(model.spec.blocks)]
    if beyond:
        raise PunaError(
            "a layer to skip is not one of the model's",
            where="skip_layers",
            found=beyond,
            expected=f"numbers from 0 to {len(model.spec.blocks) - 1}",
        )
    if settings.calibrated and (rows is None or not rows.numel()):
        raise PunaError(
            "this quantisation goes by activations, and there is no text to make them from",
            where="calibration",
            fix="give a corpus of documents, or choose grid and rounding that need none (rounding nearest)",
        )


def _quantize_block(
    model: Llama,
    layer: int,
    settings: Quantization,
    passing: Blockwise | None,
    seed: int,
    done: Quantized,
) -> None:
    places = list(sites(model, layer))
    found = collect(passing, places) if passing is not None else [None] * len(places)
    _transform(places, found, settings, done)
    for site, inputs in zip(places, found, strict=True):
        for name, linear, rounded in _round_site(site, inputs, settings, seed):
            if inputs is not None:
                done.errors[name] = relative_error(inputs.sums, linear.weight, rounded.weight)
            linear.weight.copy_(rounded.weight)
            done.matrices[name] = rounded.storage
            if rounded.grid is not None:
                model.grids[name] = replace(rounded.grid, activation_bits=settings.activation_bits)


def _transform(
    places: Sequence[Site], found: Sequence[Inputs | None], settings: Quantization, done: Quantized
) -> None:
    """All scales of the block first: that before down changes up."""
    transform, grid = settings.transform, settings.grid
    for site, inputs in zip(places, found, strict=True):
        if inputs is None or not isinstance(grid, Uniform):
            return
        if isinstance(transform, Smooth):
            smooth(site, inputs, transform)
        elif isinstance(transform, Awq):
            done.powers[site.names[0]] = awq(site, inputs, transform, grid)
    if isinstance(transform, Awq) and transform.clip and isinstance(grid, Uniform):
        for site, inputs in zip(places, found, strict=True):
            for name, linear in zip(site.names, site.linears, strict=True):
                if inputs is not None and not name.endswith(("q_proj.weight", "k_proj.weight")):
                    clip(linear, inputs, grid)


@dataclass(frozen=True)
class Rounded:
    """One matrix after rounding: weights [outputs, inputs], what they take, the uniform grid they lie on."""

    weight: Tensor
    storage: Storage
    grid: UniformGrid | None


def _round_site(
    site: Site, inputs: Inputs | None, settings: Quantization, seed: int
) -> list[tuple[str, nn.Linear, Rounded]]:
    """Round the matrices of a site, all in one go where each row has its own grid."""
    moments = _moments(inputs.sums, settings) if inputs is not None else None
    weights = [linear.weight.detach() for linear in site.linears]
    own_rows = settings.mix is None and not isinstance(settings.grid, Nf4)
    own_rows &= not (isinstance(settings.grid, Uniform) and settings.grid.deviations)
    if own_rows and not isinstance(settings.transform, Rotate):
        together = round_matrix(torch.cat(weights), settings, moments)
        rounded = split(together, [len(weight) for weight in weights])
    else:
        rounded = [
            round_matrix(weight, settings, moments, torch_generator(seed, "rotation", name))
            for name, weight in zip(site.names, weights, strict=True)
        ]
    return list(zip(site.names, site.linears, rounded, strict=True))


def _moments(sums: Tensor, settings: Quantization) -> Moments:
    """Moments as the rounding damps them; rounding to the nearest level has no damping of its own."""
    rounding = settings.rounding
    return Moments(sums, rounding.damping) if isinstance(rounding, Gptq | Ldlq) else Moments(sums)


def split(together: Rounded, counts: Sequence[int]) -> list[Rounded]:
    """The matrices that were rounded as one; each row had a grid of its own."""
    found = []
    start = 0
    for count in counts:
        share = count / len(together.weight)
        whole, grid = together.storage, together.grid
        storage = Storage(
            round(whole.weights * share), round(whole.levels * share), round(whole.steps * share)
        )
        rows = slice(start, start + count)
        if grid is not None:
            grid = replace(grid, step=grid.step[rows], zero=grid.zero[rows])
        found.append(Rounded(together.weight[rows], storage, grid))
        start += count
    return found


def round_matrix(
    weight: Tensor,
    settings: Quantization,
    moments: Moments | None = None,
    generator: torch.Generator | None = None,
) -> Rounded:
    """Round one matrix [outputs, inputs], float32. Transforms that are folded into a block are not done
    here.
    """
    weights = weight.detach().T.contiguous()  # [inputs, outputs]
    back = None
    if isinstance(settings.transform, Rotate):
        assert moments is not None and generator is not None
        weights, sums, back = rotate(weights, moments.sums, generator, rescale=settings.transform.rescale)
        moments = _moments(sums, settings)
    planner = make_planner(weights, settings, moments)
    if isinstance(settings.rounding, Gptq):
        assert moments is not None
        rounding = gptq_by_activation if settings.rounding.by_activation else gptq
        found = rounding(weights, moments, planner)
    elif isinstance(settings.rounding, Ldlq):
        assert moments is not None
        found = ldlq(weights, moments, planner)
    else:
        found = nearest(weights, planner)
    grid = planner.grids() if back is None else None
    found = found if back is None else back(found)
    return Rounded(found.T.contiguous(), planner.storage(), grid)


def make_planner(weights: Tensor, settings: Quantization, moments: Moments | None) -> Planner:
    """The planner of the settings for one matrix, given transposed."""
    grid, mix = settings.grid, settings.mix
    if isinstance(grid, Nf4):
        return Nf4Planner(grid, weights)
    if isinstance(mix, BitsByGroup):
        assert isinstance(grid, Uniform) and moments is not None
        return BitsByGroupPlanner(mix, grid, weights, moments)
    if isinstance(mix, SalientWeights):
        assert isinstance(grid, (Uniform, Binary))
        return SalientWeightsPlanner(mix, grid, weights, moments)
    if isinstance(mix, SalientColumns):
        assert moments is not None
        return SalientColumnsPlanner(mix, weights, moments)
    return PlainPlanner(grid, weights)
