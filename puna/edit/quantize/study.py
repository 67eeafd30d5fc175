"""The low-bit table: one model, many quantisations, each measured on the same texts. System S18 (2404.14047).

A row is written down as soon as it is measured, and a study that was killed goes on behind the last one. Rows
are measured one after another on one machine, so their seconds and rates are comparable only if it was quiet.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from puna.core.files import write_json
from puna.edit.quantize.measures import Task, decoding_rate, quality
from puna.edit.quantize.methods import METHODS, Setting, setting
from puna.edit.quantize.quantize import Quantized, quantize
from puna.edit.quantize.settings import DualBinary
from puna.edit.quantize.storage import NOTHING, Storage
from puna.edit.quantize.tuning import Budget, tune_dual, tune_lora
from puna.model.llama import Llama
from puna.model.sites import sites
from puna.model.steppers import Quantize

if TYPE_CHECKING:
    from collections.abc import Iterator

EXACT = "exact"


@dataclass(frozen=True)
class Given:
    """What every row is measured on; ``rows`` [rows, tokens] to calibrate, ``lessons`` to train on.

    Rounding computes in float32; passes over the calibration text, and what is measured then, in ``dtype``.
    """

    rows: Tensor
    lessons: Tensor
    texts: Mapping[str, Sequence[str]]
    task: Task
    budget: Budget
    decoded_tokens: int
    dtype: torch.dtype
    seed: int


def twin(model: Llama) -> Llama:
    """A copy with weights of its own, in float32; tokenizer and template are shared."""
    copied = Llama(model.spec, device="meta")
    weights = {name: tensor.detach().float().clone() for name, tensor in model.state_dict().items()}
    copied.load_state_dict(weights, strict=True, assign=True)
    copied.tokenizer, copied.template, copied.source = model.tokenizer, model.template, model.source
    return copied.eval()


def study(model: Llama, names: Sequence[str], given: Given, folder: Path) -> dict[str, dict[str, float]]:
    """Figures of every named setting by its name, and those of the model as it is under "exact"."""
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, float]] = {}
    for name in (EXACT, *names):
        file = folder / f"{name}.json"
        if file.exists():
            found[name] = json.loads(file.read_text(encoding="utf-8"))
            continue
        found[name] = _exact(model, given) if name == EXACT else _row(model, setting(name), given)
        write_json(file, found[name])
    return found


def _exact(model: Llama, given: Given) -> dict[str, float]:
    exact = twin(model).to(given.dtype)
    figures = quality(exact, given.texts, given.task, None)
    weights = sum(linear.weight.numel() for linear in _projections(model))
    rate, laid_out = decoding_rate(exact, None, given.decoded_tokens)
    bits = 8.0 * given.dtype.itemsize
    figures |= {"bits": bits, "nominal": bits, "matrix_bytes": bits / 8 * weights, "seconds": 0.0}
    figures |= {"rate": rate, "engine_bits": bits, "engine_bytes": float(laid_out)}
    return figures


def _projections(model: Llama) -> Iterator[torch.nn.Linear]:
    for layer in range(len(model.spec.blocks)):
        for site in sites(model, layer):
            yield from site.linears


def apply(
    model: Llama,
    chosen: Setting,
    rows: Tensor,
    lessons: Tensor,
    budget: Budget,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> Quantized:
    """Quantise ``model`` in place, and train behind it where the setting says so; passes run in ``dtype``."""
    began = time.perf_counter()
    if chosen.training == "dual":
        grid = chosen.quantization.grid
        assert isinstance(grid, DualBinary)
        done = Quantized(storage=_dual_storage(model, grid))
        teacher = twin(model)
        tune_dual(model, teacher, grid, lessons, budget, seed)
    else:
        done = quantize(model, chosen.quantization, rows, seed=seed, dtype=dtype)
        if chosen.training is not None:
            tune_lora(model, lessons, budget, seed, pooled=chosen.training == "pooled_lora")
            done.storage = done.storage + _lora_storage(model, budget.rank)
            model.grids = {}
    done.seconds = time.perf_counter() - began
    return done


def _dual_storage(model: Llama, grid: DualBinary) -> Storage:
    total = NOTHING
    for linear in _projections(model):
        outputs, inputs = linear.weight.shape
        groups = -(-inputs // (grid.group or inputs)) * outputs
        total += Storage(outputs * inputs, 2 * outputs * inputs, 32 * groups)
    return total


def _lora_storage(model: Llama, rank: int) -> Storage:
    """16 bits for each number of the LoRA, which is kept beside the weights: they are its weights' steps."""
    numbers = sum(rank * sum(linear.weight.shape) for linear in _projections(model))
    return Storage(0, 0, 16 * numbers)


def _row(model: Llama, chosen: Setting, given: Given) -> dict[str, float]:
    changed = twin(model)
    done = apply(changed, chosen, given.rows, given.lessons, given.budget, given.seed, given.dtype)
    changed.to(given.dtype)
    figures = quality(changed, given.texts, given.task, chosen.quantization.activation_bits)
    if done.errors:
        figures["output_error"] = sum(done.errors.values()) / len(done.errors)
    kernels = kernels_for(changed)
    rate, laid_out = decoding_rate(changed, kernels, given.decoded_tokens)
    storage = done.storage
    figures |= {
        "bits": storage.bits,
        "nominal": storage.nominal,
        "matrix_bytes": storage.bytes,
        "seconds": done.seconds,
        "rate": rate,
        "engine_bits": {"int4": 4.0, "int8": 8.0}.get(kernels or "", 8.0 * given.dtype.itemsize),
        "engine_bytes": float(laid_out),
    }
    return figures


def kernels_for(model: Llama) -> Quantize | None:
    """The packed kernels that keep the levels of all matrices; None where they lie on no grid that fits."""
    linears = sum(1 for _ in _projections(model))
    fit = [grid for name, grid in model.grids.items() if grid.packed(model.get_parameter(name).shape[1])]
    if len(fit) < linears:
        return None
    return "int4" if max(grid.bits for grid in fit) <= 4 else "int8"


def metrics_of(rows: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """All figures by flat names: ``NAME.FIGURE``, dots and dashes of a name's width as they are."""
    return {f"{name}.{key}": value for name, figures in rows.items() for key, value in figures.items()}


def table_of(rows: Mapping[str, Mapping[str, float]], texts: Sequence[str]) -> dict[str, Any]:
    """The table of the report."""
    columns = ["method", "width", *(f"BPB {name}" for name in texts)]
    columns += ["task", "levels, bits", "stored, bits", "MB", "seconds", "tokens/s"]
    body = []
    for name, figures in rows.items():
        chosen = None if name == EXACT else setting(name)
        title = "in full" if chosen is None else METHODS[chosen.method].title
        body.append(
            [
                title,
                "as it is" if chosen is None else chosen.label,
                *(f"{figures[f'bpb.{text}']:.3f}" for text in texts),
                f"{figures['task']:.2f}",
                f"{figures['nominal']:.2f}",
                f"{figures['bits']:.2f}",
                f"{figures['matrix_bytes'] / 1e6:.1f}",
                f"{figures['seconds']:.1f}",
                f"{figures['rate']:.0f}",
            ]
        )
    return {"title": "low-bit study", "columns": columns, "rows": body}
