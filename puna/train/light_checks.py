"""The work of the stage ``adapter_checks`` (S09)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy
import torch
from torch import Tensor

from puna.core.errors import PunaError
from puna.core.seeds import derive
from puna.core.stage import Context, Outcome
from puna.data.corpus import Corpus
from puna.model.cache import KeyValueCache
from puna.model.light_adapter import add_light, fold
from puna.text import pretrained
from puna.text.encode import encode_rows
from puna.text.packing import IGNORED, collate, pack
from puna.text.tokenizer import Tokenizer
from puna.train.light import INSTRUCTIONS_AND_CAPTIONS, light_settings
from puna.train.loader import MicroBatch
from puna.train.objectives import CrossEntropy
from puna.train.optimizer import Optimizer, OptimizerSettings

if TYPE_CHECKING:
    from puna.model.llama import Llama
    from puna.train.light_stages import AdapterChecks

KINDS = ("caption", "instruction")


def run(context: Context, parameters: AdapterChecks) -> Outcome:
    """Open, add, look; steps by turns; fold."""
    model = pretrained.load(context.inputs["model"], dtype="float32").eval()
    settings = light_settings(parameters.adapter)
    if settings.kind != "llama_adapter_v2" or 0 not in settings.layers(len(model.spec.blocks)):
        raise PunaError(
            "captions have the first layer's prompt, instructions all else: both must be there",
            where="adapter",
            found=f"{settings.kind} with prompts in layers {[*settings.layers(len(model.spec.blocks))]}",
            fix=f"kind llama_adapter_v2 with prompt_layers {len(model.spec.blocks)}",
        )
    micro = _batch(model, Path(context.inputs["corpus"]), parameters.tokens)
    ids = micro.batch.input_ids
    with torch.no_grad():
        plain = model(ids)
    add_light(model, settings, seed=derive(context.seed, context.name))
    with torch.no_grad():
        figures = {"start_differ": float((model(ids) != plain).sum())}
    figures |= _by_turns(model, micro, parameters)
    with torch.no_grad():
        adapted = model(ids)
        figures["moved"] = float((adapted - plain).abs().max())
        cached = _in_parts(model, ids)
        fold(model)
        folded = model(ids)
    largest = float(adapted.abs().max())
    figures["cached_difference"] = float((cached - adapted).abs().max()) / largest
    figures["folded_difference"] = float((folded - adapted).abs().max()) / largest
    return Outcome(metrics=figures)


def _batch(model: Llama, corpus: Path, tokens: int) -> MicroBatch:
    """One row of so many tokens from the beginning of a corpus, every one of them learnt."""
    opened = Corpus.open(corpus)
    chosen = []
    for row in opened.rows():
        chosen += encode_rows([row], opened.kind, cast(Tokenizer, model.tokenizer), model.template)
        if sum(map(len, chosen)) > tokens:
            break
    batch = collate(pack(chosen, tokens, mode="wrap")[:1])
    ends = batch.segments != batch.segments.roll(-1, dims=1)
    ends[:, -1] = True
    labels = batch.input_ids.roll(-1, dims=1).masked_fill(ends, IGNORED)
    return MicroBatch(dataclasses.replace(batch, labels=labels), numpy.array([0]))


def _by_turns(model: Llama, micro: MicroBatch, parameters: AdapterChecks) -> dict[str, float]:
    """Steps on batches of each kind by turns: numbers of the other group and of the own that changed."""
    optimizer = Optimizer(
        model.named_parameters(), OptimizerSettings(parameters.learning_rate, weight_decay=0.1)
    )
    names = optimizer.masters
    owned = INSTRUCTIONS_AND_CAPTIONS.of(names)
    figures = {f"{kind}.{what}": 0.0 for kind in KINDS for what in ("others_changed", "own_changed")}
    objective = CrossEntropy()
    for _ in range(parameters.rounds):
        for kind in KINDS:
            before = {name: master.detach().clone() for name, master in optimizer.masters.items()}
            loss = objective(model, micro)
            loss.total.backward()  # type: ignore[no-untyped-call]
            held = INSTRUCTIONS_AND_CAPTIONS.held(kind, names)
            with optimizer.holding(held):
                optimizer.step(1.0, loss.targets, optimizer.gradient_norm(loss.targets))
            changed = {name: _differ(before[name], optimizer.masters[name]) for name in names}
            figures[f"{kind}.others_changed"] += sum(changed[name] for name in held)
            figures[f"{kind}.own_changed"] += sum(changed[name] for name in owned[kind])
    optimizer.close()
    return figures


def _differ(before: Tensor, after: Tensor) -> int:
    """Numbers of which a bit differs."""
    return int((before.view(torch.int32) != after.detach().view(torch.int32)).sum())


def _in_parts(model: Llama, ids: Tensor) -> Tensor:
    """The same logits with a cache, a few tokens at a time."""
    cache = KeyValueCache(model.spec, len(ids), ids.shape[1])
    return torch.cat([model(part, cache=cache) for part in torch.split(ids, 5, dim=1)], dim=1)
