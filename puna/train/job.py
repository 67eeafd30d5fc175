"""The work of the stage ``train``: open, pack, train, merge, save, report."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
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
from puna.model.adapters import LoraSettings, add_lora, merge_lora, quantize_for
from puna.model.nf4 import take_quantised
from puna.model.probe import difference, probe
from puna.text import pretrained
from puna.text.encode import Encoded, encode_rows
from puna.text.packing import Mode, Packed, group_of, pack, usual_mode
from puna.text.tokenizer import Tokenizer
from puna.train import plan
from puna.train.distributed import World, world
from puna.train.dropout import quicken
from puna.train.held_out import HeldOut, HeldOutCorpus, passes
from puna.train.loader import Feed
from puna.train.loop import Loop, LoopSettings, measuring
from puna.train.metrics import read_metrics
from puna.train.objectives import OBJECTIVES, CrossEntropy, Objective
from puna.train.optimizer import Optimizer, OptimizerSettings
from puna.train.preferences import (
    TRAINED,
    Answers,
    Pairs,
    Passes,
    Reference,
    pair_loss,
    trained_passes,
)
from puna.train.schedule import Schedule
from puna.train.stages import WITH_REFERENCE, Lora, Train, method_of, pair_settings
from puna.train.summary import add_pairs, fill_report, metrics_of, start_table

if TYPE_CHECKING:
    from puna.model.llama import Llama


def run(context: Context, parameters: Train) -> Outcome:
    """Run the stage; under ``torchrun`` each process calls this and the first one writes."""
    seed = derive(context.seed if parameters.seed is None else parameters.seed, context.name)
    with world(context.device) as here:
        model, differences = _open(context, parameters, here, seed)
        packed = _training_rows(model, context.inputs["corpus"], parameters)
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
        held_out = _held_out(model, context.inputs.get("held_out") or {}, parameters, here)
        objective: Objective = CrossEntropy()
        if feed.unit == "pairs":
            reference = Reference(context.out / "reference.safetensors", recipe, here)
            objective, held_out = _preferences(model, parameters, feed, settings, held_out, reference)
        optimizer = Optimizer(model.named_parameters(), _optimizer_settings(parameters))
        if here.is_main:
            _tell(model, context, parameters, optimizer, packed, settings)
        loop = Loop(
            model,
            feed,
            objective,
            optimizer,
            settings,
            out=context.out,
            recipe=recipe,
            world=here,
            evaluate=held_out.measure if held_out.corpora else None,
        )
        state = loop.run()
        optimizer.close()
        outputs = _write(context, parameters, model, optimizer.weights(), seed, here)
        here.wait()
        loop.checkpoints.remove()
    if not here.is_main:  # From here on the first process may move the folder.
        return Outcome(outputs)
    lines = read_metrics(context.out / "metrics.jsonl")
    fill_report(context.report, lines, packed.report, optimizer.count)
    figures = metrics_of(lines, state, optimizer.count, objective.figures)
    return Outcome(outputs, figures | differences)


def _tell(
    model: Llama,
    context: Context,
    parameters: Train,
    optimizer: Optimizer,
    packed: Packed,
    settings: LoopSettings,
) -> None:
    """Print what is about to happen."""
    expected = plan.memory(
        model.spec,
        method_of(parameters),
        _dtype(context, parameters),
        parameters.micro_batch_tokens,
        longest=parameters.max_length,
        device=model.device.type,
    )
    table = start_table(model, optimizer.count, packed.report, settings, expected)
    if OBJECTIVES[parameters.objective].unit == "pairs":
        add_pairs(table, packed.report, parameters.objective)
    console.print(table)


def _dtype(context: Context, parameters: Train) -> str:
    return parameters.dtype or context.dtype


def _open(context: Context, parameters: Train, here: World, seed: int) -> tuple[Llama, dict[str, float]]:
    """The model to train, and how far what was done to it moves the logits of the probe before training.

    A new adapter moves no bit (``start_difference`` 0.0); a base put into NF4 moves them
    (``nf4_difference``).
    """
    dtype = _dtype(context, parameters)
    if dtype not in ("float32", "bfloat16"):
        raise PunaError("training computes in float32 or bfloat16", where="dtype", found=dtype)
    model = _base(context.inputs["model"], parameters, dtype, str(here.device))
    if model.tokenizer is None:
        raise PunaError("the model has no tokenizer", where=model.source, fix="put tokenizer.json beside it")
    moved: dict[str, float] = {}
    if parameters.lora is not None:
        settings = _lora_settings(parameters.lora)
        before = probe(model)
        if quantize_for(model, settings):
            before, exact = probe(model), before
            moved["nf4_difference"] = difference(exact, before)
        add_lora(model, settings, seed=seed)
        moved["start_difference"] = difference(before, probe(model))
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
    return LoraSettings(
        lora.r, lora.alpha, lora.dropout, lora.target, lora.rslora, lora.full, lora.dora, lora.base
    )


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
    return pack(encoded, parameters.max_length, mode=_packing(parameters), group=group_of(kind))


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
    mode, group = usual_mode(corpus.kind), group_of(corpus.kind)
    packed = pack(chosen, parameters.max_length, mode=mode, group=group)
    # Text is measured as text beside any objective, pairs as pairs beside one of theirs.
    compared = corpus.kind == "preferences" and OBJECTIVES[parameters.objective].unit == "pairs"
    return HeldOutCorpus(packed, size, unit="pairs" if compared else "tokens")


def _preferences(
    model: Llama,
    parameters: Train,
    feed: Feed,
    settings: LoopSettings,
    held_out: HeldOut,
    reference: Reference,
) -> tuple[Pairs, HeldOut]:
    """The objective over pairs, and what is held out measured by it, with their references."""
    loss = pair_loss(parameters.objective, pair_settings(parameters))
    corpora = {name: corpus for name, corpus in held_out.corpora.items() if corpus.unit == "pairs"}
    known: dict[str, Tensor] = {}
    if parameters.objective in WITH_REFERENCE:
        looked_at = {TRAINED: trained_passes(feed, settings.total_steps)}
        for name, corpus in corpora.items():
            own = functools.partial(passes, corpus.packed, held_out.micro_batch_tokens, reference.world)
            looked_at[f"held_out.{name}"] = Passes(corpus.packed, own, corpus.packed.report.tokens)
        with measuring(model, reference.world.device):
            known = reference.log_probs(model, looked_at)
    compared = {
        name: dataclasses.replace(
            corpus, objective=Pairs(loss, Answers(corpus.packed), known.get(f"held_out.{name}"))
        )
        for name, corpus in corpora.items()
    }
    objective = Pairs(loss, Answers(feed.rows), known.get(TRAINED))
    return objective, dataclasses.replace(held_out, corpora={**held_out.corpora, **compared})


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
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    sums = {
        name: int(tensor.view(integers[tensor.element_size()]).sum(dtype=torch.int64))
        for name, tensor in model.state_dict().items()  # codes and scales in NF4 are no parameters
    }
    return fingerprint(sums)


def _write(
    context: Context, parameters: Train, model: Llama, masters: Mapping[str, Tensor], seed: int, here: World
) -> dict[str, Path]:
    """Save the model, and the adapter on its own where there is one; only the first process writes.

    The float32 masters go into a float32 model: the trained one if all of it was trained, else the
    base opened again, so that an adapter is merged into weights that were never rounded. An adapter
    of a base in NF4 is merged into the decoded base, which is what it was trained on: codes and scales
    are taken from the trained model, and decoded in float32.
    """
    folder, adapter = context.out / "model", context.out / "adapter"
    outputs = {"model": folder}
    if parameters.lora is not None and parameters.save_adapter:
        outputs["adapter"] = adapter
    if not here.is_main:
        return outputs
    if parameters.lora is None:
        final = model.float()
    else:
        final = _base(context.inputs["model"], parameters, "float32", "cpu")
        take_quantised(final, model)
        add_lora(final, _lora_settings(parameters.lora), seed=seed)
    with torch.no_grad():
        for name, parameter in final.named_parameters():
            if name in masters:
                parameter.copy_(masters[name])
    if "adapter" in outputs:
        # The folder of the run: model and adapter move with it.
        pretrained.save(final, adapter, "adapter", within=context.out.parent)
    if parameters.lora is not None:
        merge_lora(final)
    pretrained.save(final.to(pretrained.DTYPES[parameters.save_dtype]), folder)
    return outputs
