"""The work of the stage ``train``: open, pack, train, merge, save, report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from puna.core.errors import PunaError
from puna.core.files import fingerprint
from puna.core.progress import console
from puna.core.seeds import derive
from puna.core.stage import Context, Outcome
from puna.data.corpus import Corpus
from puna.model.adapters import LoraSettings, add_lora, merge_lora
from puna.model.probe import difference, probe
from puna.text import pretrained
from puna.text.encode import Encoded, encode_rows
from puna.text.packing import Mode, Packed, pack, usual_mode
from puna.text.tokenizer import Tokenizer
from puna.train.distributed import World, world
from puna.train.dropout import quicken
from puna.train.held_out import HeldOut, HeldOutCorpus
from puna.train.loader import Feed
from puna.train.loop import Loop, LoopSettings
from puna.train.metrics import read_metrics
from puna.train.objectives import OBJECTIVES, CrossEntropy
from puna.train.optimizer import Optimizer, OptimizerSettings
from puna.train.schedule import Schedule
from puna.train.sharding import is_sharded, shard, whole_on_first
from puna.train.stages import Lora, Train, memory_of
from puna.train.summary import fill_report, metrics_of, start_table

if TYPE_CHECKING:
    from puna.model.llama import Llama


def run(context: Context, parameters: Train) -> Outcome:
    """Run the stage; under ``torchrun`` each process calls this and the first one writes."""
    seed = derive(context.seed if parameters.seed is None else parameters.seed, context.name)
    with world(context.device) as here:
        model, start_difference = _open(context, parameters, here, seed)
        packed = _training_rows(model, context.inputs["corpus"], parameters)
        held_out = _held_out(model, context.inputs.get("held_out") or {}, parameters, here)
        feed = Feed(
            packed,
            batch_tokens=parameters.batch_tokens,
            micro_batch_tokens=parameters.micro_batch_tokens,
            seed=seed,
            rank=here.rank,
            size=here.size,
            unit=OBJECTIVES[parameters.objective].unit,
        )
        settings = _settings(parameters, feed, seed)
        recipe = _recipe(model, context, parameters, seed)
        if _sharded(parameters, here):
            shard(model, here)
        optimizer = Optimizer(model.named_parameters(), _optimizer_settings(parameters))
        if here.is_main:
            dtype = _dtype(context, parameters)
            expected = memory_of(parameters, model.spec, dtype, here.size, here.device.type)
            console.print(start_table(model, optimizer.count, packed.report, settings, expected, dtype, here))
        loop = Loop(
            model,
            feed,
            CrossEntropy(),
            optimizer,
            settings,
            out=context.out,
            recipe=recipe,
            world=here,
            evaluate=held_out.measure if held_out.corpora else None,
        )
        state = loop.run()
        optimizer.close()
        outputs = _write(context, parameters, model, whole_on_first(optimizer.weights(), here), seed, here)
        here.wait()
        loop.checkpoints.remove()
    if not here.is_main:  # From here on the first process may move the folder.
        return Outcome(outputs)
    lines = read_metrics(context.out / "metrics.jsonl")
    fill_report(context.report, lines, packed.report, optimizer.count)
    metrics = metrics_of(lines, state, optimizer.count)
    if start_difference is not None:
        metrics["start_difference"] = start_difference
    return Outcome(outputs, metrics)


def _dtype(context: Context, parameters: Train) -> str:
    return parameters.dtype or context.dtype


def _sharded(parameters: Train, here: World) -> bool:
    """Whether weights are shared out: a single process has nobody to share with."""
    return parameters.sharding == "full" and here.size > 1


def _open(context: Context, parameters: Train, here: World, seed: int) -> tuple[Llama, float | None]:
    """The model to train, and how far its new adapter moves the logits before training: 0.0, to the bit."""
    dtype = _dtype(context, parameters)
    if dtype not in ("float32", "bfloat16"):
        raise PunaError("training computes in float32 or bfloat16", where="dtype", found=dtype)
    # What is shared out is whole in main memory first: a GPU need not hold it.
    device = "cpu" if _sharded(parameters, here) else str(here.device)
    model = _base(context.inputs["model"], parameters, dtype, device)
    if model.tokenizer is None:
        raise PunaError("the model has no tokenizer", where=model.source, fix="put tokenizer.json beside it")
    moved = None
    if parameters.lora is not None:
        before = probe(model)
        add_lora(model, _lora_settings(parameters.lora), seed=seed)
        moved = difference(before, probe(model))
    if here.device.type == "cpu":
        quicken(model)
    return model, moved


def _base(source: str | Path, parameters: Train, dtype: str, device: str) -> Llama:
    """The model as it is before anything is added: opened, its own adapter merged."""
    model = pretrained.load(source, dtype=dtype, device=device)
    if model.adapter is not None:
        if parameters.lora is not None and parameters.save_adapter:
            raise PunaError(
                "the new adapter cannot be written: the base it is for exists nowhere but here",
                where=source,
                found="a model that is itself an adapter",
                fix="set save_adapter: false, or convert the model to a plain folder first",
            )
        merge_lora(model)
    return model


def _lora_settings(lora: Lora) -> LoraSettings:
    return LoraSettings(lora.r, lora.alpha, lora.dropout, lora.target, lora.rslora, lora.full)


def _training_rows(model: Llama, paths: Mapping[str, Path], parameters: Train) -> Packed:
    """All training corpora, encoded and packed together in the order they are given."""
    kind = OBJECTIVES[parameters.objective].kind
    encoded: list[Encoded] = []
    for path in paths.values():
        corpus = Corpus.open(path)
        if corpus.kind != kind:
            raise PunaError(
                f"objective {parameters.objective!r} learns from a corpus of {kind}",
                where=path,
                found=f"a corpus of {corpus.kind}",
                fix=f"use objective {', '.join(n for n, o in OBJECTIVES.items() if o.kind == corpus.kind)!r}"
                if any(o.kind == corpus.kind for o in OBJECTIVES.values())
                else "convert the corpus",
            )
        encoded += _encode(model, corpus, parameters)
    return pack(encoded, parameters.max_length, mode=_packing(parameters))


def _packing(parameters: Train) -> Mode:
    return parameters.packing or usual_mode(OBJECTIVES[parameters.objective].kind)


def _encode(model: Llama, corpus: Corpus, parameters: Train, rows: Any = None) -> list[Encoded]:
    return encode_rows(
        corpus.rows() if rows is None else rows,
        corpus.kind,
        cast(Tokenizer, model.tokenizer),
        model.template,
        train_on=parameters.train_on,
    )


def _held_out(model: Llama, paths: Mapping[str, Path], parameters: Train, here: World) -> HeldOut:
    if parameters.eval_steps is not None and not paths:
        raise PunaError(
            "there is nothing to evaluate on", where="eval_steps", fix="give the stage an input held_out"
        )
    corpora = {name: _held_out_corpus(model, Corpus.open(path), parameters) for name, path in paths.items()}
    return HeldOut(corpora, parameters.micro_batch_tokens, here)


def _held_out_corpus(model: Llama, corpus: Corpus, parameters: Train) -> HeldOutCorpus:
    """The first rows of a corpus up to ``eval_tokens``; at least one."""
    limit = math.inf if parameters.eval_tokens is None else parameters.eval_tokens
    chosen: list[Encoded] = []
    tokens = size = 0
    for row in corpus.rows():
        encoded = _encode(model, corpus, parameters, [row])
        tokens += sum(map(len, encoded))
        if chosen and tokens > limit:
            break
        chosen += encoded
        size += len(row["text"].encode()) if corpus.kind == "documents" else 0
    return HeldOutCorpus(pack(chosen, parameters.max_length, mode=usual_mode(corpus.kind)), size)


def _settings(parameters: Train, feed: Feed, seed: int) -> LoopSettings:
    limited = parameters.max_steps is not None or parameters.max_tokens is not None
    steps, tokens = feed.count(
        epochs=None if limited else parameters.epochs or 1,
        max_steps=parameters.max_steps,
        max_tokens=parameters.max_tokens,
    )
    warmup = parameters.warmup_steps
    schedule = Schedule(
        kind=parameters.schedule,
        total_steps=steps,
        warmup_steps=math.ceil(parameters.warmup_ratio * steps) if warmup is None else warmup,
        minimum=parameters.min_learning_rate_ratio,
        timescale=parameters.timescale,
        step_size=parameters.step_size,
        gamma=parameters.gamma,
        decay_ratio=parameters.decay_ratio,
    )
    return LoopSettings(
        total_steps=steps,
        total_tokens=tokens,
        schedule=schedule,
        seed=seed,
        logging_steps=parameters.logging_steps,
        eval_steps=parameters.eval_steps,
        save_steps=parameters.save_steps,
        tensorboard=parameters.report_to == "tensorboard",
    )


def _optimizer_settings(parameters: Train) -> OptimizerSettings:
    return OptimizerSettings(
        learning_rate=parameters.learning_rate,
        embedding_factor=parameters.embedding_learning_rate_factor,
        weight_decay=parameters.weight_decay,
        betas=parameters.betas,
        max_grad_norm=parameters.max_grad_norm,
    )


def _recipe(model: Llama, context: Context, parameters: Train, seed: int) -> dict[str, Any]:
    """All parameters, and what else the trained weights depend on, for a resumed run to compare."""
    template, tokenizer = model.template, model.tokenizer
    return {
        **parameters.model_dump(mode="json"),
        "packing": _packing(parameters),
        "dtype": str(model.dtype),
        "seed": seed,
        "spec": fingerprint(model.spec.to_config()),
        "weights": _weights_fingerprint(model),
        "tokenizer": None if tokenizer is None else tokenizer.fingerprint,
        "template": None if template is None else template.fingerprint,
        "corpus": [Corpus.open(path).fingerprint for path in context.inputs["corpus"].values()],
    }


def _weights_fingerprint(model: Llama) -> str:
    """A fingerprint of all weights before training: the sum of each tensor's bits as integers."""
    integers = {2: torch.int16, 4: torch.int32}
    sums = {
        name: int(tensor.detach().view(integers[tensor.element_size()]).sum(dtype=torch.int64))
        for name, tensor in model.named_parameters()
    }
    return fingerprint(sums)


def _write(
    context: Context,
    parameters: Train,
    model: Llama,
    masters: Iterable[tuple[str, Tensor]],
    seed: int,
    here: World,
) -> dict[str, Path]:
    """Save the model, and the adapter on its own where there is one; only the first process writes.

    ``masters`` come one at a time, of sharded ones with the help of all processes.

    The float32 masters go into a float32 model: the trained one if all of it was trained and lies here,
    else the base opened again, so that an adapter is merged into weights that were never rounded.
    """
    folder, adapter = context.out / "model", context.out / "adapter"
    outputs = {"model": folder}
    if parameters.lora is not None and parameters.save_adapter:
        outputs["adapter"] = adapter
    if not here.is_main:
        for _ in masters:
            raise AssertionError("whole weights are for the first process alone")
        return outputs
    if parameters.lora is None and not is_sharded(model):
        final = model.float()
    else:
        final = _base(context.inputs["model"], parameters, "float32", "cpu")
    if parameters.lora is not None:
        add_lora(final, _lora_settings(parameters.lora), seed=seed)
    places = dict(final.named_parameters())
    with torch.no_grad():
        for name, master in masters:
            places[name].copy_(master)
    if "adapter" in outputs:
        # The folder of the run: model and adapter move with it.
        pretrained.save(final, adapter, "adapter", within=context.out.parent)
    if parameters.lora is not None:
        merge_lora(final)
    pretrained.save(final.to(pretrained.DTYPES[parameters.save_dtype]), folder)
    return outputs
