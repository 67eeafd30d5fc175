"""The work of the stage ``mup_check``: the coordinate check and the sweep of rates of muP (S46, 2203.03466).

Decoders of several widths, alike in all else, take a few steps on the same batches by the training loop's own
optimiser. Under muP their activations are then as large at every width; plainly (matrices from N(0, 0.02),
one rate for all) they grow. In the second part each width is trained by a grid of rates, and the best one is
looked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from puna.core.errors import PunaError
from puna.core.progress import Track
from puna.core.seeds import derive, torch_generator
from puna.core.stage import Context, Outcome
from puna.data.corpus import Corpus
from puna.model import mup
from puna.model.llama import Llama
from puna.model.spec import BlockSpec, LlamaSpec
from puna.text import pretrained
from puna.text.encode import encode_rows
from puna.text.packing import pack
from puna.text.tokenizer import Tokenizer
from puna.train.loader import Feed, MicroBatch
from puna.train.objectives import CrossEntropy
from puna.train.optimizer import Optimizer, OptimizerSettings

if TYPE_CHECKING:
    from puna.train.mup_stages import MupCheck

KINDS = ("mup", "plain")
_LAST = 4  # of a sweep's steps the last quarter is averaged


def run(context: Context, parameters: MupCheck) -> Outcome:
    """Both parts, for muP and plainly."""
    tokenizer = pretrained.required_tokenizer(context.inputs["tokenizer"])
    seed = derive(context.seed, context.name)
    steps = max(parameters.steps, parameters.sweep_steps)
    batches = _batches(Path(context.inputs["corpus"]), tokenizer, parameters, steps, seed)
    figures: dict[str, float] = {}
    for kind in KINDS:
        moved = {
            width: _moved(kind, width, tokenizer, batches, parameters, seed) for width in parameters.widths
        }
        figures |= _flatness(kind, moved)
        context.report.setdefault("tables", []).append(_table(kind, moved))
    for kind in KINDS:
        losses = _sweep(kind, tokenizer, batches, parameters, seed)
        figures |= _best(kind, losses, parameters.rates)
        context.report["tables"].append(_sweep_table(kind, losses, parameters.rates))
    return Outcome(metrics=figures)


def _batches(
    corpus: Path, tokenizer: Tokenizer, parameters: MupCheck, steps: int, seed: int
) -> list[MicroBatch]:
    """One batch for each step, the same for every model, and one that is only looked at."""
    opened = Corpus.open(corpus, kind="documents")
    wanted = (steps + 3) * parameters.batch_tokens  # the first row and the last may be short
    chosen: list[Any] = []
    tokens = 0
    for row in opened.rows():
        chosen += encode_rows([row], "documents", tokenizer)
        tokens += len(chosen[-1])
        if tokens >= wanted:
            break
    packed = pack(chosen, parameters.length, mode="wrap")
    size = parameters.batch_tokens
    feed = Feed(packed, batch_tokens=size, micro_batch_tokens=size, seed=seed)
    found = [next(feed.micro_batches(step)) for step in feed.steps(0)]
    full = [micro for micro in found if micro.batch.tokens == size]
    if len(full) <= steps:
        raise PunaError(
            "the corpus is too small for these steps",
            where=corpus,
            found=f"{len(full)} full batches",
            expected=f"{steps + 1} of {size} tokens",
        )
    return full[: steps + 1]


def _model(kind: str, width: int, tokenizer: Tokenizer, parameters: MupCheck, seed: int) -> Llama:
    """A new decoder of this width; the same draws for both kinds."""
    size = width // parameters.heads
    feed_forward = width * parameters.feed_forward
    block = BlockSpec(heads=parameters.heads, kv_heads=parameters.heads, head_dim=size, width=feed_forward)
    spec = LlamaSpec(tokenizer.vocab_size, width, (block,) * parameters.layers, tied=parameters.tied)
    model = Llama(spec, generator=torch_generator(seed, "width", width))
    if kind == "mup":
        mup.begin(model, parameters.mup)
    return model


def _optimizer(kind: str, model: Llama, rate: float, parameters: MupCheck) -> Optimizer:
    scales = {}
    if kind == "mup":
        scales = {
            name: (part.rate, part.decay) for name, part in mup.parts(model.spec, parameters.mup).items()
        }
    settings = OptimizerSettings(rate, betas=(0.9, 0.95), max_grad_norm=0.0, scales=scales)
    return Optimizer(model.named_parameters(), settings)


def _train(model: Llama, optimizer: Optimizer, batches: Sequence[MicroBatch]) -> list[float]:
    """A step on each batch at a constant rate; each mean loss, infinite from where it is no number."""
    objective = CrossEntropy()
    losses: list[float] = []
    for micro in batches:
        loss = objective(model, micro)
        mean = float(loss.total.detach()) / loss.targets
        if not math.isfinite(mean):
            return losses + [math.inf] * (len(batches) - len(losses))
        losses.append(mean)
        loss.total.backward()  # type: ignore[no-untyped-call]
        optimizer.step(1.0, loss.targets, optimizer.gradient_norm(loss.targets))
    optimizer.close()
    return losses


def _moved(
    kind: str,
    width: int,
    tokenizer: Tokenizer,
    batches: Sequence[MicroBatch],
    parameters: MupCheck,
    seed: int,
) -> dict[str, float]:
    """Root mean squares of activations after the steps, by place, on a batch that was not trained on."""
    model = _model(kind, width, tokenizer, parameters, seed)
    optimizer = _optimizer(kind, model, parameters.learning_rate, parameters)
    _train(model, optimizer, batches[: parameters.steps])
    found: dict[str, float] = {}

    def note(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Tensor) -> None:
            found[name] = float(output.float().pow(2).mean().sqrt())

        return hook

    for number, block in enumerate(cast(Any, model.model.layers)):
        block.register_forward_hook(note(f"hidden.{number}"))
        block.self_attn.register_forward_hook(note(f"attention.{number}"))
        block.mlp.register_forward_hook(note(f"feed_forward.{number}"))
    batch = batches[-1].batch
    with torch.no_grad():
        logits = model(batch.input_ids, batch.positions, batch.segments)
    found["logits"] = float(logits.pow(2).mean().sqrt())
    return found


def _flatness(kind: str, moved: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """By group of places: the furthest that a width lies from the mean of all; widest over narrowest.

    Both of the place where they are largest.
    """
    figures: dict[str, float] = {}
    widths = sorted(moved)
    for group in ("hidden", "attention", "feed_forward", "logits"):
        places = [place for place in moved[widths[0]] if place.partition(".")[0] == group]
        apart, growth = [], []
        for place in places:
            values = [moved[width][place] for width in widths]
            mean = sum(values) / len(values)
            apart.append(max(abs(value / mean - 1) for value in values))
            growth.append(values[-1] / values[0])
        figures[f"{kind}.{group}.apart"] = max(apart)
        figures[f"{kind}.{group}.growth"] = max(growth)
    return figures


def _sweep(
    kind: str, tokenizer: Tokenizer, batches: Sequence[MicroBatch], parameters: MupCheck, seed: int
) -> dict[int, list[float]]:
    """By width the loss of the last steps at every rate."""
    found: dict[int, list[float]] = {}
    widths = parameters.sweep_widths or parameters.widths
    with Track(f"rates, {kind}", len(widths) * len(parameters.rates), "trainings") as track:
        for width in widths:
            found[width] = []
            for rate in parameters.rates:
                model = _model(kind, width, tokenizer, parameters, seed)
                optimizer = _optimizer(kind, model, rate, parameters)
                losses = _train(model, optimizer, batches[: parameters.sweep_steps])
                last = losses[-max(1, len(losses) // _LAST) :]
                found[width].append(sum(last) / len(last))
                track.advance(1)
    return found


def _best(kind: str, losses: Mapping[int, Sequence[float]], rates: Sequence[float]) -> dict[str, float]:
    """The best rate by width, how far it moves over the grid, and of how many widths it is at an end."""
    best = {width: min(range(len(rates)), key=values.__getitem__) for width, values in losses.items()}
    figures = {f"{kind}.best_rate.{width}": rates[place] for width, place in best.items()}
    figures |= {f"{kind}.best_loss.{width}": losses[width][place] for width, place in best.items()}
    figures[f"{kind}.moved"] = float(max(best.values()) - min(best.values()))
    figures[f"{kind}.at_an_end"] = float(sum(place in (0, len(rates) - 1) for place in best.values()))
    return figures


def _table(kind: str, moved: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    widths = sorted(moved)
    rows = [[place, *(f"{moved[width][place]:.4f}" for width in widths)] for place in moved[widths[0]]]
    title = f"Root mean squares after the steps by width, {kind}"
    return {"title": title, "columns": ["place", *map(str, widths)], "rows": rows}


def _sweep_table(kind: str, losses: Mapping[int, Sequence[float]], rates: Sequence[float]) -> dict[str, Any]:
    rows = [[str(width), *(f"{loss:.4f}" for loss in values)] for width, values in losses.items()]
    return {"title": f"Loss by width and rate, {kind}", "columns": ["width", *map(str, rates)], "rows": rows}
