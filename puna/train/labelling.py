"""Learning labels in the one loop: the objective, and the work of the stage ``label``.

Systems S14, LS-LLaMA (Li and others 2023, arXiv:2310.01208), and S75 (Dukić and Šnajder 2024,
arXiv:2401.14556). Short texts share a row of a batch as segments of their own. Every micro-batch of a step
counts: the published code of S75 clears the gradients inside its accumulation, so that three of four
micro-batches are lost. No epoch is chosen by a test set; the last step's weights are the result.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from puna.core.errors import PunaError
from puna.core.files import fingerprint
from puna.core.seeds import derive
from puna.core.stage import Context, Outcome
from puna.data.corpus import Corpus
from puna.model.adapters import add_lora, merge_lora, quantize_for
from puna.model.labels import SCORE, LabelKind, add_label_head, head_of, labels_of, states_of_texts
from puna.model.nf4 import take_quantised
from puna.model.unmasking import unmask
from puna.text import pretrained
from puna.text.encode import IGNORED
from puna.text.labelled import encode_labelled
from puna.text.packing import Packed, pack
from puna.text.tokenizer import Tokenizer
from puna.train.distributed import World
from puna.train.dropout import quicken
from puna.train.held_out import HeldOut, HeldOutCorpus
from puna.train.loader import Feed, MicroBatch
from puna.train.loop import Loop, LoopSettings
from puna.train.metrics import read_metrics
from puna.train.objectives import Loss
from puna.train.optimizer import Optimizer, OptimizerSettings
from puna.train.schedule import preset
from puna.train.summary import fill_report, metrics_of
from puna.train.trained import lora_settings, weights_fingerprint

if TYPE_CHECKING:
    from puna.model.llama import Llama
    from puna.train.labelling_stages import Label, LabelTraining


@dataclass(frozen=True)
class LabelLoss:
    """Cross-entropy over the labels, of texts or words; ``dropout`` is that of the states."""

    dropout: float = 0.0
    figures: tuple[str, ...] = ("accuracy",)

    def __call__(self, model: Llama, micro: MicroBatch) -> Loss:
        """Sum over the labels in ``micro``."""
        batch = micro.batch
        hidden = model.hidden(batch.input_ids, batch.positions, batch.segments)
        flat = batch.labels.flatten()
        places = (flat != IGNORED).nonzero()[:, 0]  # [labels]; of texts their first tokens, in reading order
        if labels_of(model).per == "word":
            states = hidden.flatten(0, 1)[places]  # [labels, width]
        else:
            states = states_of_texts(hidden, batch.segments, labels_of(model).pooling)
        states = functional.dropout(states, self.dropout, training=model.training)
        logits = head_of(model)(states).float()  # [labels, names]
        losses = functional.cross_entropy(logits, flat[places], reduction="none")
        right = (logits.detach().argmax(-1) == flat[places]).float()
        return Loss(losses.sum(), losses.detach(), {"accuracy": right.sum()})


def kind_of(corpus: Corpus, parameters: LabelTraining) -> LabelKind:
    """The labels of a corpus, and how the model shall say them."""
    names = corpus.labels
    if corpus.kind == "labelled_texts":
        return LabelKind(names, "text", parameters.pooling, parameters.bias)
    if parameters.pooling != "last":
        raise PunaError("words are not pooled", where="pooling", found=parameters.pooling, fix="leave it out")
    return LabelKind(names, "word", bias=parameters.bias)


def packed_rows(model: Llama, corpus: Corpus, max_length: int) -> Packed:
    """The rows of a corpus with the numbers of the model's labels, several to a packed row."""
    tokenizer = cast(Tokenizer, model.tokenizer)
    rows = encode_labelled(corpus.rows(), corpus.kind, tokenizer, labels_of(model).names)
    return pack(rows, max_length, mode="fit")


def open_labeller(
    source: str | Path, kind: LabelKind, parameters: LabelTraining, pattern: str, *, dtype: str, seed: int
) -> Llama:
    """``source`` with a new head, its masks by ``pattern``, and the adapter that is to be trained."""
    model = _with_head(source, kind, pattern, dtype=dtype, seed=seed)
    if parameters.lora is not None:
        settings = lora_settings(parameters.lora, SCORE)
        quantize_for(model, settings)
        add_lora(model, settings, seed=seed)
    return model


def _with_head(source: str | Path, kind: LabelKind, pattern: str, *, dtype: str, seed: int) -> Llama:
    model = pretrained.load_plain(source, dtype=dtype)
    if model.tokenizer is None:
        raise PunaError("the model has no tokenizer", where=model.source, fix="put tokenizer.json beside it")
    add_label_head(model, kind, seed=seed)
    unmask(model, pattern)
    return model


def loop_of(
    model: Llama,
    packed: Packed,
    parameters: LabelTraining,
    out: Path,
    *,
    seed: int,
    recipe: Mapping[str, Any],
    device: str = "cpu",
    logging_steps: int = 10,
    held_out: Mapping[str, Packed] | None = None,
) -> Loop:
    """The loop that trains ``model`` on ``packed`` rows; figures of ``held_out`` at both ends."""
    here = World(device=torch.device(device))
    model.to(here.device)
    if here.device.type == "cpu":
        quicken(model)
    feed = Feed(
        packed,
        batch_tokens=parameters.batch_tokens,
        micro_batch_tokens=parameters.micro_batch_tokens,
        seed=seed,
    )
    epochs = None if parameters.max_steps else parameters.epochs or 1
    steps, tokens = feed.count(epochs=epochs, max_steps=parameters.max_steps)
    warmup = math.ceil(parameters.warmup_ratio * steps)
    settings = LoopSettings(
        total_steps=steps,
        total_tokens=tokens,
        schedule=preset(parameters.schedule, steps, warmup),
        seed=seed,
        logging_steps=logging_steps,
    )
    optimizer = OptimizerSettings(
        learning_rate=parameters.learning_rate,
        weight_decay=parameters.weight_decay,
        betas=parameters.betas,
        max_grad_norm=parameters.max_grad_norm,
    )
    corpora = {name: HeldOutCorpus(rows, 0, LabelLoss()) for name, rows in (held_out or {}).items()}
    return Loop(
        model,
        feed,
        LabelLoss(parameters.dropout),
        Optimizer(model.named_parameters(), optimizer),
        settings,
        out=out,
        recipe={**recipe, "weights": weights_fingerprint(model), "spec": fingerprint(model.spec.to_config())},
        world=here,
        evaluate=HeldOut(corpora, parameters.micro_batch_tokens, here).measure if corpora else None,
    )


def run(context: Context, parameters: Label) -> Outcome:
    """Open, pack, train, merge, save, report."""
    corpus = Corpus.open(context.inputs["corpus"])
    kind = kind_of(corpus, parameters)
    seed = derive(context.seed if parameters.seed is None else parameters.seed, context.name)
    source, dtype = context.inputs["model"], parameters.dtype or context.dtype
    model = open_labeller(source, kind, parameters, parameters.unmask, dtype=dtype, seed=seed)
    packed = packed_rows(model, corpus, parameters.max_length)
    held_out = {
        name: packed_rows(model, Corpus.open(path, kind=corpus.kind), parameters.max_length)
        for name, path in (context.inputs.get("held_out") or {}).items()
    }
    recipe = {**parameters.model_dump(mode="json"), "seed": seed, "corpus": corpus.fingerprint}
    loop = loop_of(
        model,
        packed,
        parameters,
        context.out,
        seed=seed,
        recipe=recipe,
        device=context.device,
        logging_steps=parameters.logging_steps,
        held_out=held_out,
    )
    state = loop.run()
    loop.optimizer.close()
    outputs = _write(context, parameters, model, kind, loop.optimizer.weights(), seed)
    lines = read_metrics(context.out / "metrics.jsonl")
    fill_report(context.report, lines, packed.report, loop.optimizer.count)
    figures = metrics_of(lines, state, loop.optimizer.count, loop.objective.figures)
    figures["truncated"] = float(packed.report.truncated)
    figures["layers_both_ways"] = float(len(model.spec.layers_both_ways))
    shutil.rmtree(context.out / "checkpoints", ignore_errors=True)
    return Outcome(outputs, figures)


def _write(
    context: Context,
    parameters: Label,
    model: Llama,
    kind: LabelKind,
    masters: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    seed: int,
) -> dict[str, Path]:
    """Save the model and, where there is one, the adapter: float32 masters over a base never rounded."""
    outputs = {"model": context.out / "model"}
    if parameters.lora is None:
        final = model.float()
    else:
        final = _with_head(context.inputs["model"], kind, parameters.unmask, dtype="float32", seed=seed)
        take_quantised(final, model)
        add_lora(final, lora_settings(parameters.lora, SCORE), seed=seed)
    places = dict(final.named_parameters())
    with torch.no_grad():
        for name, master in dict(masters).items():
            places[name].copy_(master)
    if parameters.lora is not None and parameters.save_adapter:
        outputs["adapter"] = context.out / "adapter"
        pretrained.save(final, outputs["adapter"], "adapter", within=context.out.parent)
    if parameters.lora is not None:
        merge_lora(final)
    pretrained.save(final.to(pretrained.DTYPES[parameters.save_dtype]), outputs["model"])
    return outputs
