"""What the stages of quantisation do: open, quantise, write and measure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from puna.core.errors import PunaError
from puna.core.files import write_json
from puna.core.stage import Context, Outcome
from puna.edit.quantize import checks, study
from puna.edit.quantize.measures import calibration_rows, make_task, texts_of
from puna.edit.quantize.methods import SETTINGS, setting
from puna.edit.quantize.quantize import quantize
from puna.edit.quantize.settings import Quantization
from puna.edit.quantize.tuning import Budget
from puna.text import pretrained

if TYPE_CHECKING:
    from puna.edit.quantize.stages import Calibrated, LowBitChecks, LowBitTable, Quantize
    from puna.model.llama import Llama


def open_plain(context: Context) -> Llama:
    """The stage's model in float32, without an adapter, with a tokenizer."""
    model = pretrained.load_plain(context.inputs["model"], dtype="float32").eval()
    if model.tokenizer is None:
        raise PunaError("the model has no tokenizer", where=model.source, fix="put tokenizer.json beside it")
    return model


def _rows(context: Context, parameters: Calibrated, model: Llama) -> torch.Tensor:
    corpus = str(context.inputs["corpus"])
    rows, tokens = parameters.calibration_rows, parameters.calibration_tokens
    return calibration_rows(model, corpus, rows, min(tokens, model.spec.max_positions), context.seed)


def run_quantize(context: Context, parameters: Quantize) -> Outcome:
    """The stage ``quantize``."""
    chosen = parameters.quantization
    settings = chosen if isinstance(chosen, Quantization) else setting(chosen).quantization
    model = open_plain(context)
    rows = _rows(context, parameters, model) if settings.calibrated and context.inputs.get("corpus") else None
    dtype = pretrained.DTYPES[context.dtype]
    done = quantize(model, settings, rows, seed=context.seed, dtype=dtype)
    path = _write(model, parameters, context.out)
    storage = done.storage
    figures = {
        "bits": storage.bits,
        "nominal_bits": storage.nominal,
        "matrix_bytes": storage.bytes,
        "file_bytes": float(_size(path)),
        "seconds": done.seconds,
        "on_a_grid": float(len(model.grids)),
    }
    if done.errors:
        figures["output_error"] = sum(done.errors.values()) / len(done.errors)
    if done.powers:
        figures["awq_power"] = sum(done.powers.values()) / len(done.powers)
    return Outcome({"model": path}, figures)


def _write(model: Llama, parameters: Quantize, out: Path) -> Path:
    if parameters.format == "gguf":
        return pretrained.save(model, out / "model.gguf", "gguf", kind="packed")
    if parameters.format == "dense":
        model.to(pretrained.DTYPES[parameters.save_dtype])
        return pretrained.save(model, out / "model")
    return pretrained.save(model, out / "model", packed=True)


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.suffix == ".safetensors"]
    return sum(file.stat().st_size for file in files)


def run_table(context: Context, parameters: LowBitTable) -> Outcome:
    """The stage ``low_bit_table``."""
    model = open_plain(context)
    corpora = {name: str(path) for name, path in context.inputs["texts"].items()}
    texts = {
        name: texts_of(path, parameters.evaluation_bytes, context.seed, name)
        for name, path in corpora.items()
    }
    lessons = calibration_rows(
        model,
        str(context.inputs["corpus"]),
        parameters.training_rows,
        parameters.training_tokens,
        context.seed + 1,
    )
    given = study.Given(
        rows=_rows(context, parameters, model),
        lessons=lessons,
        texts=texts,
        task=make_task(model, next(iter(corpora.values())), parameters.task_items, context.seed),
        budget=Budget(parameters.training_steps, 2, parameters.learning_rate, parameters.lora_rank),
        decoded_tokens=parameters.decoded_tokens,
        dtype=pretrained.DTYPES[context.dtype],
        seed=context.seed,
    )
    names = tuple(SETTINGS) if parameters.settings == "all" else tuple(parameters.settings)
    rows = study.study(model, names, given, context.out / "rows")
    context.report["tables"] = [study.table_of(rows, list(texts))]
    path = context.out / "table.json"
    write_json(path, rows)
    return Outcome({"table": path}, study.metrics_of(rows))


def run_checks(context: Context, parameters: LowBitChecks) -> Outcome:
    """The stage ``low_bit_checks``."""
    model = open_plain(context)
    beyond = [layer for layer in parameters.layers if not 0 <= layer < len(model.spec.blocks)]
    if beyond or not parameters.layers:
        raise PunaError(
            "a layer to look at is not one of the model's",
            where="layers",
            found=beyond or "none",
            expected=f"numbers from 0 to {len(model.spec.blocks) - 1}",
        )
    rows = _rows(context, parameters, model)
    figures = checks.exact(model, rows, parameters.layers, context.seed)
    figures |= checks.errors(model, rows, parameters.layers, parameters.shares, context.seed)
    figures |= checks.entropies(model, parameters.layers, parameters.shift_points)
    figures |= checks.packed(model, context.out / "packed")
    return Outcome({}, figures)
