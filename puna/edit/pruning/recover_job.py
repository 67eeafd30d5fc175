"""The work of the stages ``recover_adapter`` and ``sparsegpt``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from puna.core.errors import PunaError
from puna.core.progress import Track
from puna.core.seeds import derive
from puna.core.stage import Context, Outcome
from puna.data.corpus import Corpus
from puna.edit.calibration import calibration_batches
from puna.edit.pruning.recover import Comparison, Recovered, compare, recover, write_recovered
from puna.edit.pruning.sparsegpt import Pattern, follows, sparsify
from puna.model.adapter_files import ADAPTER_CONFIG, StoredAdapter, is_masked, open_adapter
from puna.model.checkpoint import open_weights
from puna.model.kept_units import read_kept
from puna.model.spec import LlamaSpec
from puna.model.units import Kept, parameter_shapes, sliced_spec
from puna.text import pretrained
from puna.text.encode import Encoded, encode_rows
from puna.text.packing import group_of, pack, usual_mode
from puna.text.tokenizer import Tokenizer
from puna.train.distributed import World
from puna.train.held_out import HeldOut, HeldOutCorpus

if TYPE_CHECKING:
    from puna.edit.pruning.recover_stages import RecoverAdapter, SparseGpt
    from puna.model.llama import Llama


def run_sparsegpt(context: Context, parameters: SparseGpt) -> Outcome:
    """Open, prune block by block, save, count."""
    pattern = Pattern.of(parameters.pattern, parameters.share)
    model = _opened(context, "model")
    batches = calibration_batches(
        model,
        context.inputs["corpus"],
        rows=parameters.calibration_rows,
        length=parameters.calibration_length,
        batch_rows=parameters.calibration_rows,
        seed=derive(context.seed, context.name),
    )
    done = sparsify(model, pattern, batches[0].input_ids, dtype=pretrained.DTYPES[context.dtype])
    figures = {"zero_share": done.zeros / max(1, done.weights), "wanted_share": pattern.removed}
    if done.errors:
        figures["output_error"] = math.fsum(done.errors.values()) / len(done.errors)
    if pattern.among:
        figures["groups_beyond"] = float(
            follows({name: dict(model.named_parameters())[name] for name in done.errors}, pattern)
        )
    model.to(pretrained.DTYPES[parameters.save_dtype])
    return Outcome({"model": pretrained.save(model, context.out / "model")}, figures)


def run_recover(context: Context, parameters: RecoverAdapter) -> Outcome:
    """Open the whole model, put each candidate into it, choose, write, compare."""
    pruned = context.inputs.get("pruned")
    candidates = _candidates(Path(context.inputs["adapter"]))
    if pruned is None and not all(is_masked(folder) for folder in candidates.values()):
        raise PunaError(
            "it is not known where in the whole model this adapter belongs",
            where=context.inputs["adapter"],
            fix="give the stage the pruned model as the input pruned",
        )
    base = _opened(context, "base")
    kept = None if pruned is None else _kept(Path(pruned), base.spec)
    small = base.spec if kept is None else sliced_spec(base.spec, kept)
    held_out = _held_out(base, context, parameters)
    if held_out is None and len(candidates) > 1:
        raise PunaError(
            "there are several adapters, and no text to choose by",
            where=context.inputs["adapter"],
            found=", ".join(candidates),
            fix="give the stage an input held_out, or one of these folders as the input adapter",
        )
    losses: dict[str, float] = {}
    whole = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    if held_out is not None:
        losses["base"] = _loss(base, held_out)
        with Track("recovering", len(candidates), "adapters") as track:
            for name, folder in candidates.items():
                _put(base, whole, _recovered(folder, small, base.spec, kept)[1].changes)
                losses[name] = _loss(base, held_out)
                track.advance()
    chosen = min(candidates, key=lambda name: losses.get(name, 0.0))
    stored, found = _recovered(candidates[chosen], small, base.spec, kept)
    _put(base, whole, found.changes)
    outputs = {
        "model": pretrained.save(base.to(pretrained.DTYPES[parameters.save_dtype]), context.out / "model")
    }
    if found.factors:
        base.source = _source(context.inputs["base"])
        folder = context.out / "adapter"
        name = pretrained.base_name(base, folder, context.out.parent)
        write_recovered(found, candidates[chosen], folder, base.spec, base_name=name)
        outputs["adapter"] = folder
    context.report["tables"] = [_table(losses, chosen)]
    return Outcome(outputs, _figures(losses, chosen, candidates, compare(stored, found, base.spec, kept)))


def _opened(context: Context, name: str) -> Llama:
    """A model in float32, its own adapter merged."""
    return pretrained.load_plain(context.inputs[name], dtype="float32").eval()


def _source(base: str | Path) -> str:
    """How an adapter may name its base: a path in full, or the name of an asset."""
    return str(Path(base).resolve()) if Path(base).exists() else str(base)


def _kept(pruned: Path, spec: LlamaSpec) -> Kept:
    """What the pruned model holds of the whole; another whole model than that is an error."""
    kept = read_kept(pruned)
    kept.check(spec)
    expected, (found, _) = sliced_spec(spec, kept), open_weights(pruned)
    if parameter_shapes(expected) != parameter_shapes(found):
        raise PunaError(
            "the pruned model does not come from this base",
            where=pruned,
            found=f"blocks {_sizes(found)}",
            expected=f"those kept of the base, {_sizes(expected)}",
            fix="give the base that was pruned",
        )
    return kept


def _sizes(spec: LlamaSpec) -> str:
    return ", ".join(f"{block.kv_heads}x{block.width}" for block in spec.blocks[:6])


def _candidates(folder: Path) -> dict[str, Path]:
    """One adapter, or those that a training left, by their names, in the order of their steps."""
    if (folder / ADAPTER_CONFIG).is_file():
        return {folder.name: folder}
    found = (
        [inner for inner in folder.iterdir() if (inner / ADAPTER_CONFIG).is_file()] if folder.is_dir() else []
    )
    if not found:
        raise PunaError(
            "there is no adapter here",
            where=folder,
            expected=f"a folder with {ADAPTER_CONFIG}, or one of such folders",
            fix="give the output adapter of a training with lora, or its output adapters",
        )
    return {inner.name: inner for inner in sorted(found, key=lambda inner: (len(inner.name), inner.name))}


def _recovered(
    folder: Path, small: LlamaSpec, spec: LlamaSpec, kept: Kept | None
) -> tuple[StoredAdapter, Recovered]:
    stored = open_adapter(folder, parameter_shapes(small))
    unknown = sorted(set(stored.low_rank) - set(parameter_shapes(small)))
    if unknown:
        raise PunaError(
            "the adapter is for other layers than the pruned model's", where=folder, found=unknown[0]
        )
    return stored, recover(stored, spec, kept)


@torch.no_grad()
def _put(model: Llama, whole: dict[str, Tensor], changes: dict[str, Tensor]) -> None:
    """Weights of the base with these changes, and as they were for all others."""
    for name, parameter in model.named_parameters():
        parameter.copy_(whole[name])
        if name in changes:
            parameter.add_(changes[name])


def _held_out(model: Llama, context: Context, parameters: RecoverAdapter) -> HeldOut | None:
    """The text to choose by: the first rows of a corpus up to so many tokens."""
    path = context.inputs.get("held_out")
    if path is None:
        return None
    corpus = Corpus.open(path)
    chosen: list[Encoded] = []
    tokens = 0
    for row in corpus.rows():
        encoded = encode_rows([row], corpus.kind, cast(Tokenizer, model.tokenizer), model.template)
        tokens += sum(map(len, encoded))
        if chosen and tokens > parameters.eval_tokens:
            break
        chosen += encoded
    packed = pack(chosen, parameters.max_length, mode=usual_mode(corpus.kind), group=group_of(corpus.kind))
    return HeldOut({"held_out": HeldOutCorpus(packed, 0)}, 2 * parameters.max_length, World())


def _loss(model: Llama, held_out: HeldOut) -> float:
    return held_out.measure(model)["held_out.loss"]


def _table(losses: dict[str, float], chosen: str) -> dict[str, Any]:
    rows = [[name, f"{loss:.4f}", "chosen" if name == chosen else ""] for name, loss in losses.items()]
    return {
        "title": "Loss of the whole model, nats a token",
        "columns": ["adapter", "loss", ""],
        "rows": rows,
    }


def _figures(
    losses: dict[str, float], chosen: str, candidates: dict[str, Path], comparison: Comparison
) -> dict[str, float]:
    """Bits that differ, what is elsewhere, and the losses by candidate."""
    figures = {
        "kept_differ": float(comparison.differ),
        "elsewhere": float(comparison.elsewhere),
        "factors_difference": comparison.factors,
        "candidates": float(len(candidates)),
        "chosen": float(list(candidates).index(chosen) + 1),
    }
    if losses:
        figures |= {f"loss.{name}": loss for name, loss in losses.items()}
        figures |= {"loss": losses[chosen], "loss.last": losses[list(candidates)[-1]]}
    return figures
