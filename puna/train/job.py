"""The work of the stage ``train``: open, pack, train, merge, save, report."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from puna.core.errors import PunaError
from puna.core.files import fingerprint, room_for
from puna.core.hardware import release_memory, total_memory
from puna.core.progress import console
from puna.core.seeds import derive
from puna.core.stage import Context, Outcome
from puna.data.corpus import Corpus
from puna.model.mup import parts
from puna.text.encode import Encoded
from puna.text.packing import Packed, group_of, pack, usual_mode
from puna.train.checkpoint import seal_of, seed_of
from puna.train.curriculum import order_kept
from puna.train.distributed import World, world
from puna.train.gap import LayerUpdates
from puna.train.held_out import HeldOut, HeldOutCorpus, passes
from puna.train.ledger import check_trained, ledger, ledger_metrics, ledger_table
from puna.train.loader import Feed
from puna.train.loop import Evaluation, Handed, Loop, LoopSettings, measuring
from puna.train.metrics import read_metrics
from puna.train.nested_exits import CrossEntropyAtExits, NestedCrossEntropy, check_exits
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
from puna.train.prepare import encode, mixed_rows, packing_of, sources_of
from puna.train.schedule import PHASE, Schedule, compose, preset
from puna.train.settings import WITH_REFERENCE
from puna.train.sharding import shard, whole_on_first
from puna.train.sources import Sources
from puna.train.stages import Train, pair_settings
from puna.train.subnetworks import Alternating
from puna.train.summary import add_pairs, fill_report, metrics_of, start_table
from puna.train.teacher import bytes_beside, distillation, teachers_of
from puna.train.train_plan import SHARE_OF_MEMORY, exits_learnt, layers_to_recompute, memory_of
from puna.train.trained import (
    ADAPTERS,
    MODELS,
    dtype_of,
    is_shared_out,
    leave_adapters,
    leave_models,
    open_model,
    weights_fingerprint,
    write_model,
)
from puna.train.twins import with_divergence

if TYPE_CHECKING:
    from puna.model.llama import Llama


MakeLoop = Callable[..., Loop]
"""Makes the loop over a model; keywords change what it is given, those of ``recipe`` are added to it.

``optimizer`` is called with named parameters and settings, in place of :class:`Optimizer`."""
Course = Callable[["Llama", LoopSettings, MakeLoop], Loop]
"""How a training goes: from the model and the settings to the loop that has run, or the last of several."""


def straight(model: Llama, _settings: LoopSettings, make_loop: MakeLoop) -> Loop:
    """The usual course: one loop, from the first step to the last."""
    loop = make_loop(model)
    loop.run()
    return loop


def run(context: Context, parameters: Train, course: Course = straight) -> Outcome:
    """Run the stage; under ``torchrun`` each process calls this and the first one writes."""
    handed = _handed(context, parameters)
    seed = derive(context.seed if parameters.seed is None else parameters.seed, context.name)
    if handed is not None and parameters.seed is None:
        seed = seed_of(handed.folder)
    with world(context.device) as here:
        model, measured = open_model(context, parameters, here, seed)
        dtype = dtype_of(context, parameters)
        teachers = teachers_of(context.inputs, model, parameters, dtype, here)
        recipe = _recipe(model, context, parameters, seed)
        recipe |= {name: weights_fingerprint(one) for name, one in teachers.items()}
        sources, recipe = sources_of(model, context, parameters, seed=seed, recipe=recipe, here=here)
        packed = sources.rows
        feed = _feed(sources, parameters, seed, here)
        settings = _settings(parameters, feed, seed)
        held_out = _held_out(model, context.inputs.get("held_out") or {}, parameters, sources.names, here)
        objective = _of_text(model, parameters, seed)
        if feed.unit == "pairs":
            start = time.perf_counter()
            reference = Reference(context.out / "reference.safetensors", recipe, here)
            objective, held_out = _preferences(model, parameters, feed, settings, held_out, reference)
            measured["reference_seconds"] = time.perf_counter() - start
        if teachers:
            objective = distillation(teachers, parameters, feed.rows, context.out, recipe, here)
            teachers.clear()  # a stored one is no longer held
        _fit_into_memory(model, parameters, dtype, here, beside=bytes_beside(objective))

        def make_loop(model: Llama, **changes: Any) -> Loop:
            optimizer = changes.pop("optimizer", Optimizer)(
                model.named_parameters(), _optimizer_settings(parameters, model)
            )
            if here.is_main:
                _tell(model, parameters, optimizer, packed, settings, dtype, here)
            whole_recipe = {**recipe, **changes.pop("recipe", {})}
            given: dict[str, Any] = {
                "settings": settings,
                "out": context.out,
                "world": here,
                "evaluate": _evaluation(held_out, LayerUpdates.of(model, parameters.watched_layers)),
                "handed": handed,
                "before_step": objective.begin if isinstance(objective, Alternating) else None,
                "after_step": leave_adapters(context, parameters, here)
                or leave_models(context, parameters, here),
            }
            return Loop(model, feed, objective, optimizer, recipe=whole_recipe, **{**given, **changes})

        loop = course(model, settings, make_loop)
        model, optimizer = loop.model, loop.optimizer
        optimizer.close()
        with room_for(context.out / "model", fix=loop.checkpoints.advice()):
            weights = whole_on_first(optimizer.weights(), here)
            release_memory()  # what steps left behind would stand beside the float32 model that is written
            outputs = write_model(context, parameters, model, weights, seed, here)
        outputs |= _left_on_the_way(context, parameters)
        here.wait()
    if not here.is_main:  # From here on the first process may move the folder.
        return Outcome(outputs)
    return Outcome(outputs, _reported(context, parameters, loop, sources, feed, objective) | measured)


def _of_text(model: Llama, parameters: Train, seed: int) -> Objective:
    """What is learnt of text and of no other model: its tokens, at exits, with children or twins."""
    check_exits(parameters.exits, len(model.spec.blocks))
    learnt = exits_learnt(parameters)
    objective: Objective = NestedCrossEntropy(parameters.exits) if learnt else CrossEntropy()
    if parameters.children is not None:
        space = parameters.children.space(model.spec)
        objective = Alternating(objective, space, seed, parameters.child_steps)
    return with_divergence(objective, parameters.twins)


def _left_on_the_way(context: Context, parameters: Train) -> dict[str, Path]:
    """Outputs that were written in the course of the training, of those that were asked for."""
    asked = {
        "adapters": (parameters.adapter_steps, ADAPTERS),
        "models": (parameters.model_steps, MODELS),
        "state": (parameters.state_after, "state"),
    }
    return {name: context.out / path for name, (when, path) in asked.items() if when is not None}


def _reported(
    context: Context, parameters: Train, loop: Loop, sources: Sources, feed: Feed, objective: Objective
) -> dict[str, float]:
    """Fill the report of a training that is over; its metrics."""
    state, optimizer = loop.state, loop.optimizer
    lines = read_metrics(context.out / "metrics.jsonl")
    fill_report(context.report, lines, sources.rows.report, optimizer.count)
    accounts = ledger(sources, feed.lengths, feed.uses(state.epoch, state.epoch_step))
    check_trained(accounts, state.tokens)
    context.report.setdefault("tables", []).append(ledger_table(accounts))
    figures = metrics_of(lines, state, optimizer.count, objective.figures)
    figures |= order_kept(sources, feed, state.epoch, state.epoch_step, descending=parameters.descending)
    return figures | ledger_metrics(accounts)


def _feed(sources: Sources, parameters: Train, seed: int, here: World) -> Feed:
    """The order in which this process gets the rows."""
    return Feed(
        sources.rows,
        batch_tokens=parameters.batch_tokens,
        micro_batch_tokens=parameters.micro_batch_tokens,
        seed=seed,
        rank=here.rank,
        size=here.size,
        unit=OBJECTIVES[parameters.objective].unit,
        shuffled=parameters.order == "shuffled",
        mixture=mixed_rows(sources, parameters, seed),
        sources=None if parameters.mixture is None else sources,
    )


def _fit_into_memory(model: Llama, parameters: Train, dtype: str, here: World, *, beside: int) -> None:
    """Share the weights out, or recompute layers, where that is asked for or needed.

    ``beside`` are the bytes of what else lies on the device: a teacher.
    """
    if is_shared_out(parameters, here):
        shard(model, here)
    limit = SHARE_OF_MEMORY * _memory_of_device(here) - beside
    model.recomputed_layers = layers_to_recompute(
        parameters, model.spec, dtype, here.size, here.device.type, limit
    )


def _handed(context: Context, parameters: Train) -> Handed | None:
    """The state of another run that this one begins with."""
    folder = context.inputs.get("state")
    if folder is not None:
        return Handed(Path(folder), moments=parameters.restore == "all")
    if "restore" in parameters.model_fields_set:
        raise PunaError("there is nothing to restore", where="restore", fix="give the stage an input state")
    return None


def _tell(
    model: Llama,
    parameters: Train,
    optimizer: Optimizer,
    packed: Packed,
    settings: LoopSettings,
    dtype: str,
    here: World,
) -> None:
    """Print what is about to happen."""
    expected = memory_of(parameters, model.spec, dtype, here.size, here.device.type, model.recomputed_layers)
    table = start_table(model, optimizer.count, packed.report, settings, expected, dtype, here)
    if OBJECTIVES[parameters.objective].unit == "pairs":
        add_pairs(table, packed.report, parameters.objective)
    console.print(table)


def _memory_of_device(here: World) -> float:
    """Bytes of memory where the tensors live."""
    if here.device.type == "cuda":
        return float(torch.cuda.get_device_properties(here.device).total_memory)
    return float(total_memory())


def _held_out(
    model: Llama, paths: Mapping[str, Path], parameters: Train, names: Sequence[str], here: World
) -> HeldOut:
    if parameters.mixture is not None and parameters.mixture.feedback is not None:
        missing = [name for name in names if name not in paths]
        if missing:
            raise PunaError(
                f"source {missing[0]!r} has no held-out text that feedback could go by",
                where="mixture.feedback",
                found=f"held_out: {', '.join(paths) or 'nothing'}",
                fix="give the stage an input held_out with a corpus under the name of every source",
            )
    for option, value in (
        ("eval_steps", parameters.eval_steps),
        ("watched_layers", parameters.watched_layers),
    ):
        if value is not None and not paths:
            raise PunaError(
                "there is nothing to evaluate on", where=option, fix="give the stage an input held_out"
            )
    corpora = {name: _held_out_corpus(model, Corpus.open(path), parameters) for name, path in paths.items()}
    return HeldOut(corpora, parameters.micro_batch_tokens, here)


def _evaluation(held_out: HeldOut, updates: LayerUpdates | None) -> Evaluation | None:
    """What is measured between steps: held-out text, and how far layers moved that are watched."""
    if not held_out.corpora:
        return None
    if updates is None:
        return held_out.measure
    return lambda model: {**held_out.measure(model), **updates.measure()}


def _held_out_corpus(model: Llama, corpus: Corpus, parameters: Train) -> HeldOutCorpus:
    """The first rows of a corpus up to ``eval_tokens``; at least one."""
    limit = math.inf if parameters.eval_tokens is None else parameters.eval_tokens
    chosen: list[Encoded] = []
    tokens = size = 0
    for row in corpus.rows():
        encoded = encode(model, corpus, parameters, [row])
        tokens += sum(map(len, encoded))
        if chosen and tokens > limit:
            break
        chosen += encoded
        size += len(row["text"].encode()) if corpus.kind == "documents" else 0
    mode, group = usual_mode(corpus.kind), group_of(corpus.kind)
    packed = pack(chosen, parameters.max_length, mode=mode, group=group)
    # Text is measured as text beside any objective, pairs as pairs beside one of theirs.
    compared = corpus.kind == "preferences" and OBJECTIVES[parameters.objective].unit == "pairs"
    objective = CrossEntropyAtExits(parameters.exits) if parameters.exits else CrossEntropy()
    return HeldOutCorpus(packed, size, objective, unit="pairs" if compared else "tokens")


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
    last = _within(steps, "stop_after", parameters.stop_after)
    if parameters.stop_after is not None:
        tokens = feed.count(max_steps=last)[1]
    kept = last if parameters.state_after == "end" else parameters.state_after
    return LoopSettings(
        total_steps=steps,
        total_tokens=tokens,
        schedule=_schedule(parameters, steps, feed),
        seed=seed,
        logging_steps=parameters.logging_steps,
        eval_steps=parameters.eval_steps,
        save_steps=parameters.save_steps,
        tensorboard=parameters.report_to == "tensorboard",
        stop_after=parameters.stop_after,
        state_after=None if kept is None else _within(last, "state_after", kept),
    )


def _schedule(parameters: Train, steps: int, feed: Feed) -> Schedule:
    """The learning-rate schedule over so many steps."""
    if not isinstance(parameters.schedule, str):
        segments = [segment.part() for segment in parameters.schedule]
        by_phase = any(segment.length == PHASE for segment in segments)
        return compose(segments, steps, feed.phase_ends() if by_phase else ())
    warmup = parameters.warmup_steps
    return preset(
        parameters.schedule,
        steps,
        math.ceil(parameters.warmup_ratio * steps) if warmup is None else warmup,
        parameters.min_learning_rate_ratio,
        timescale=parameters.timescale,
        step_size=parameters.step_size,
        gamma=parameters.gamma,
        decay_ratio=parameters.decay_ratio,
    )


def _within(last: int, name: str, step: int | None) -> int:
    """``step``, which must not lie beyond the last one; without it the last one."""
    if step is not None and step > last:
        raise PunaError(
            f"{name} lies beyond the last step", where=name, found=step, expected=f"at most {last}"
        )
    return last if step is None else step


def _optimizer_settings(parameters: Train, model: Llama) -> OptimizerSettings:
    scaled = {} if parameters.mup is None else parts(model.spec, parameters.mup)
    return OptimizerSettings(
        scales={name: (part.rate, part.decay) for name, part in scaled.items()},
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
        "packing": packing_of(parameters),
        "dtype": str(model.dtype),
        "seed": seed,
        "spec": fingerprint(model.spec.to_config()),
        "weights": weights_fingerprint(model),
        "tokenizer": None if tokenizer is None else tokenizer.fingerprint,
        "template": None if template is None else template.fingerprint,
        "corpus": [Corpus.open(path).fingerprint for path in context.inputs["corpus"].values()],
        **_read_by_mixture(context, parameters),
        "state": None if context.inputs.get("state") is None else seal_of(Path(context.inputs["state"])),
    }


def _read_by_mixture(context: Context, parameters: Train) -> dict[str, Any]:
    """What a mixture goes by besides: the names of the corpora, and with feedback the held-out text."""
    if parameters.mixture is None:
        return {}
    found: dict[str, Any] = {"sources": list(context.inputs["corpus"])}
    if parameters.mixture.feedback is not None:
        held_out = context.inputs.get("held_out") or {}
        found["held_out"] = {name: Corpus.open(path).fingerprint for name, path in held_out.items()}
    return found
