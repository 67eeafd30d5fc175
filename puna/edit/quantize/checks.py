"""What must hold of the methods of the low-bit study (S18) on a real model: identities, orders,
entropies, bytes.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from puna.core.seeds import torch_generator
from puna.edit.quantize.calibration import collect
from puna.edit.quantize.methods import setting
from puna.edit.quantize.nf4_planner import Nf4Planner, entropy
from puna.edit.quantize.quantize import Quantized, quantize, round_matrix
from puna.edit.quantize.rounding import Moments
from puna.edit.quantize.settings import (
    Awq,
    Binary,
    Gptq,
    Ldlq,
    Nf4,
    Quantization,
    SalientColumns,
    SalientWeights,
    Smooth,
    Uniform,
)
from puna.edit.quantize.study import twin
from puna.edit.quantize.transforms import awq, rotate, smooth
from puna.model import nf4
from puna.model.blockwise import Blockwise
from puna.model.native.weights import DOWN, OUT
from puna.model.sites import sites
from puna.model.steppers import make_stepper
from puna.text import pretrained

if TYPE_CHECKING:
    from puna.model.llama import Llama

_GRID = Uniform(bits=3, group=None)


def exact(model: Llama, rows: Tensor, layers: Sequence[int], seed: int) -> dict[str, float]:
    """Identities: each figure is a largest difference, 0 or within rounding."""
    site = next(iter(sites(model, layers[0])))
    weight = site.linears[0].weight.detach()
    inputs = collect(_at(model, rows, layers[0]), [site])[0]
    moments = Moments(inputs.sums)
    identity = Moments(torch.eye(weight.shape[1]))
    gptq = Quantization(grid=_GRID, rounding=Gptq())
    plain = round_matrix(weight, Quantization(grid=_GRID)).weight
    without = round_matrix(weight, gptq, identity).weight
    forward = round_matrix(weight.double().float(), gptq, moments).weight
    back = round_matrix(weight, Quantization(grid=_GRID, rounding=Ldlq()), moments).weight
    turned, sums, undo = rotate(
        weight.T.contiguous(), inputs.sums, torch_generator(seed, "check"), rescale=True
    )
    levels = nf4.levels()
    bits = {
        f"bits.{name}": round_matrix(weight, setting(name).quantization, moments).storage.nominal
        for name in ("pb-1.7", "pb-2.0")
    }
    stored = round_matrix(weight, setting("pb-1.7").quantization, moments).storage.bits
    return {
        "gptq_without_moments": float((plain - without).abs().max()),
        "gptq_against_ldlq": float((forward != back).float().mean()),
        "nf4_zero": float(levels.abs().min()),
        "rotation": float((undo(turned) - weight.T).abs().max() / weight.abs().max()),
        "rotation_error": _same_error(weight, turned, inputs.sums, sums),
        "awq_fold": _fold(model, rows, layers, "awq"),
        "smooth_fold": _fold(model, rows, layers, "smooth"),
        "bits.pb-1.7.stored": stored,
        **bits,
    }


def _at(model: Llama, rows: Tensor, layer: int) -> Blockwise:
    passing = Blockwise(model, rows)
    for _ in range(layer):
        passing.advance()
    return passing


def _same_error(weight: Tensor, turned: Tensor, sums: Tensor, moments: Tensor) -> float:
    """How far the mean square of the outputs differs between the two bases, as a share."""
    plain = float((weight * (weight @ sums)).sum())
    return abs(float((turned * (moments @ turned)).sum()) / plain - 1)


@torch.no_grad()
def _fold(model: Llama, rows: Tensor, layers: Sequence[int], kind: str) -> float:
    """The largest difference of logits after scales were folded in and nothing was rounded."""
    changed = twin(model)
    for layer in layers:
        places = list(sites(changed, layer))
        for site, inputs in zip(places, collect(_at(changed, rows[:2], layer), places), strict=True):
            if kind == "awq":
                awq(site, inputs, Awq(points=4, clip=False), Uniform(bits=3))
            else:
                smooth(site, inputs, Smooth(power=0.5))
    return float((changed(rows[:1]) - model(rows[:1])).abs().max())


def errors(
    model: Llama, rows: Tensor, layers: Sequence[int], shares: Sequence[float], seed: int
) -> dict[str, float]:
    """Mean relative errors of the matrices' outputs: binary grids, and shares of salient weights to int8."""
    skipped = tuple(layer for layer in range(len(model.spec.blocks)) if layer not in layers)

    def of(**chosen: object) -> float:
        settings = Quantization.model_validate({**chosen, "skip_layers": skipped})
        done: Quantized = quantize(twin(model), settings, rows, seed=seed)
        return sum(done.errors.values()) / len(done.errors)

    gptq = Gptq()
    found = {
        # A share of 0 is sign binarisation; hessian makes the pass look at activations, as the others do.
        "error.sign": of(grid=Binary(), mix=SalientWeights(share=0.0)),
        "error.billm": of(grid=Binary(), rounding=gptq, mix=SalientColumns()),
        "error.int8": of(grid=Uniform(bits=8, group=None), rounding=gptq),
    }
    steps = [of(grid=Binary(), rounding=gptq, mix=SalientWeights(share=share)) for share in shares]
    found |= {f"error.salient.{share:g}": error for share, error in zip(shares, steps, strict=True)}
    falls = all(later < earlier for earlier, later in itertools.pairwise(steps))
    return found | {"salient_falls": float(falls), "salient_least": steps[-1], "salient_most": steps[0]}


def entropies(model: Llama, layers: Sequence[int], points: int) -> dict[str, float]:
    """Entropy of the codes of every block, shifted and not: the least gain of a block, and the mean of
    all.
    """
    gains = []
    for layer in layers:
        for site in sites(model, layer):
            for linear in site.linears:
                weights = linear.weight.detach()
                planner = Nf4Planner(Nf4(shift=True, points=points), weights.T)
                blocks = functional.pad(weights, (0, -weights.shape[1] % 64)).reshape(-1, 64)
                counts = torch.full((len(blocks),), 64)
                counts.view(len(weights), -1)[:, -1] -= -weights.shape[1] % 64
                plain = entropy(blocks, counts, torch.zeros(len(blocks)))
                gains.append(entropy(blocks, counts, planner.shift) - plain)
    every = torch.cat(gains)
    return {"entropy_least_gain": float(every.min()), "entropy_mean_gain": float(every.mean())}


def packed(model: Llama, folder: Path) -> dict[str, float]:
    """Weights that differ by a bit after packing: in a file that is read again, and in the engine's
    kernels.
    """
    found = {}
    for name, bits in (("int4", 4), ("int8", 8)):
        changed = twin(model)
        quantize(changed, Quantization(grid=Uniform(bits=bits, group=64, symmetric=bits == 8)))
        pretrained.save(changed, folder, packed=True)
        again = pretrained.load(folder, dtype="float32")
        theirs = dict(again.named_parameters())
        differ = sum(int((each != theirs[key]).sum()) for key, each in changed.named_parameters())
        found[f"packed_differ.{name}"] = float(differ)
        found[f"packed_bytes.{name}"] = float((folder / "model.safetensors").stat().st_size)
        shutil.rmtree(folder)
        found[f"engine_differs.{name}"] = engine_differences(changed, name)
    return found


def engine_differences(model: Llama, quantize_as: str) -> float:
    """Weights of all output and down projections that the engine multiplies with and the model does not
    have.
    """
    stepper = make_stepper(model, quantize=quantize_as, cache_tokens=32, kernels="native")  # type: ignore[arg-type]
    differ = 0
    for layer in range(len(model.spec.blocks)):
        for which, site in ((OUT, 1), (DOWN, 3)):
            weight = list(sites(model, layer))[site].linears[0].weight
            for row in range(0, len(weight), 16):
                stored = stepper.stored_row(layer, which, row)[: weight.shape[1]]  # type: ignore[attr-defined]
                differ += int((stored != weight[row]).sum())
    return float(differ)
