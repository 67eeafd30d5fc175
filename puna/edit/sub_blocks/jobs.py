"""The work of the stages ``sub_blocks``, ``replace_one``, ``block_costs``, ``choose_child``,
``assemble_child``, ``parent_divergence`` and ``model_speed``.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from puna.core.assets import cache_folder
from puna.core.errors import PunaError
from puna.core.files import fingerprint, folder_aside, read_json, write_aside, write_json
from puna.core.seeds import derive, numpy_generator
from puna.core.stage import Context, Outcome
from puna.data.corpus import Corpus
from puna.edit.calibration import calibration_batches
from puna.edit.searching.predictors import rank_correlation
from puna.edit.stats import collect
from puna.edit.sub_blocks import choosing, costs
from puna.edit.sub_blocks.costs import Workload
from puna.edit.sub_blocks.divergence import (
    Scores,
    final_states,
    mean_kl,
    predicted,
    random_choices,
    replace_one,
)
from puna.edit.sub_blocks.library import META, ORDER, Choice, Library, assemble, layer_file, open_parent
from puna.edit.sub_blocks.local_distillation import (
    Learnt,
    LocalSettings,
    distil_layers,
    parent_half,
    untrained,
)
from puna.edit.sub_blocks.programme import Problem
from puna.edit.sub_blocks.text_stream import text_stream
from puna.edit.sub_blocks.variants import HALVES, NONE, PARENT, Half, Space, initial
from puna.model.probe import difference, probe
from puna.text import pretrained
from puna.text.packing import Batch

if TYPE_CHECKING:
    from puna.edit.sub_blocks.stages import (
        AssembleChild,
        BlockCosts,
        ChooseChild,
        ModelSpeed,
        ParentDivergence,
        ReplaceOne,
        SubBlocks,
        Text,
    )
    from puna.model.llama import Llama

Key = tuple[Half, str]


def run_sub_blocks(context: Context, parameters: SubBlocks) -> Outcome:
    """Contributions, then the layers in groups, each of which is written down before the next begins."""
    parent, known = open_parent(context.inputs["model"], context.dtype, context.device)
    seed = derive(context.seed, context.name)
    corpus = Path(context.inputs["corpus"])
    orders = _orders(parent, corpus, parameters, seed)
    space = Space(parameters.kv_heads, parameters.widths, parameters.linear, parameters.none)
    layers = [{half: list(space.variants(block, half)) for half in HALVES} for block in parent.spec.blocks]
    _check_space(parameters, layers)
    recipe = fingerprint(
        {"parent": known, "corpus": Corpus.open(corpus).fingerprint, "seed": seed, "dtype": context.dtype}
        | {"layers": layers, "settings": parameters.model_dump(exclude={"layers_at_once"}, mode="json")}
    )
    working = context.out / "sub_blocks"
    missing = [n for n in range(len(layers)) if not _is_done(working / layer_file(n), recipe)]
    at_once = parameters.layers_at_once or len(layers)
    for start in range(0, len(missing), at_once):
        group = missing[start : start + at_once]
        learnt = _distil(parent, corpus, {n: layers[n] for n in group}, orders, parameters, seed)
        for layer in group:
            _write_layer(working / layer_file(layer), learnt[layer], orders[layer], recipe)
    library = context.out / "library"
    with folder_aside(library) as aside:
        for layer in range(len(layers)):
            (aside / layer_file(layer)).write_bytes((working / layer_file(layer)).read_bytes())
        write_json(aside / META, Library.described(known, parent.spec, layers))
    losses = _losses(library, len(layers))
    context.report["tables"] = [_losses_table(losses)]
    return Outcome({"library": library}, _losses_figures(losses))


def _orders(parent: Llama, corpus: Path, parameters: SubBlocks, seed: int) -> list[list[int]]:
    """The channels of each layer, those that contribute most first."""
    batches = calibration_batches(
        parent,
        corpus,
        rows=parameters.calibration_rows,
        length=parameters.length,
        batch_rows=parameters.batch_rows,
        seed=seed,
    )
    found = collect(parent, batches, ("contribution",), folder=cache_folder() / "statistics")
    orders: list[list[int]] = []
    for layer, block in enumerate(parent.spec.blocks):
        if block.width:
            scores = found.units("contribution", "channel", layer)
            orders.append(torch.argsort(scores, descending=True, stable=True).tolist())
        else:
            orders.append([])
    return orders


def _check_space(parameters: SubBlocks, layers: Sequence[Mapping[Half, Sequence[str]]]) -> None:
    """Every count of heads that was asked for must fit some layer."""
    for number in parameters.kv_heads:
        if not any(f"kv_heads-{number}" in layer["attention"] for layer in layers):
            raise PunaError(
                "no layer's key-value heads can be shared out over so many",
                where="kv_heads",
                found=number,
                expected="a proper divisor of the parent's",
            )


def _is_done(file: Path, recipe: str) -> bool:
    """Whether a layer was trained before the run was killed, for the very same."""
    if not file.is_file():
        return False
    return _about(file).get("recipe") == recipe


def _about(file: Path) -> dict[str, Any]:
    """What is said of a layer beside its weights; one entry, for several come in any order."""
    with safe_open(file, framework="pt") as opened:
        found: dict[str, Any] = json.loads((opened.metadata() or {}).get("about", "{}"))
    return found


def _distil(
    parent: Llama,
    corpus: Path,
    layers: Mapping[int, Mapping[Half, Sequence[str]]],
    orders: Sequence[Sequence[int]],
    parameters: SubBlocks,
    seed: int,
) -> dict[int, dict[Key, Learnt]]:
    starts: dict[int, dict[Key, dict[str, torch.Tensor]]] = {}
    for layer, halves in layers.items():
        starts[layer] = {
            (half, variant): initial(
                parent_half(parent, layer, half), parent.spec, layer, half, variant, orders[layer]
            )
            for half, variants in halves.items()
            for variant in variants
            if variant not in (PARENT, NONE)
        }
    steps = math.ceil(parameters.tokens / (parameters.batch_rows * parameters.length))
    if not steps:
        return {layer: untrained(found) for layer, found in starts.items()}
    batches = text_stream(parent, corpus, rows=parameters.batch_rows, length=parameters.length, seed=seed)
    settings = LocalSettings(
        steps, parameters.learning_rate, parameters.warmup_ratio, parameters.max_grad_norm
    )
    return distil_layers(parent, starts, batches, settings)


def _write_layer(file: Path, learnt: Mapping[Key, Learnt], order: Sequence[int], recipe: str) -> None:
    tensors = {ORDER: torch.tensor(order, dtype=torch.int64)}
    losses = []
    for (half, variant), found in learnt.items():
        tensors |= {f"{half}.{variant}.{name}": tensor.contiguous() for name, tensor in found.weights.items()}
        losses.append([half, variant, found.first_loss, found.last_loss])
    with write_aside(file) as aside:
        save_file(tensors, aside, metadata={"about": json.dumps({"recipe": recipe, "losses": losses})})


_Losses = list[tuple[int, Half, str, float, float]]


def _losses(library: Path, layers: int) -> _Losses:
    """Layer, half, variant, first and last loss."""
    found: _Losses = []
    for layer in range(layers):
        rows = _about(library / layer_file(layer))["losses"]
        found += [(layer, half, variant, first, last) for half, variant, first, last in rows]
    return found


def _losses_figures(losses: _Losses) -> dict[str, float]:
    figures = {"variants": float(len(losses))}
    trained = [row for row in losses if not math.isnan(row[3])]
    if trained:
        ratios = [last / first for *_, first, last in trained if first > 0]
        figures |= {"loss_ratio": statistics.geometric_mean(ratios), "worst_loss_ratio": max(ratios)}
        figures["last_loss"] = statistics.fmean(last for *_, last in trained)
    return figures


def _losses_table(losses: _Losses) -> dict[str, Any]:
    return {
        "title": "Local distillation: squared error over that of a block that gives nothing",
        "columns": ["layer", "half", "variant", "first", "last"],
        "rows": [
            [str(layer), half, variant, f"{first:.4g}", f"{last:.4g}"]
            for layer, half, variant, first, last in losses
        ],
    }


def _texts(parent: Llama, corpus: Path, parameters: Text, seed: int) -> list[Batch]:
    return calibration_batches(
        parent,
        corpus,
        rows=parameters.rows,
        length=parameters.length,
        batch_rows=parameters.batch_rows,
        seed=seed,
    )


def run_replace_one(context: Context, parameters: ReplaceOne) -> Outcome:
    """Scores layer by layer, kept as they come; then random children against the sums of theirs."""
    parent, known = open_parent(context.inputs["model"], context.dtype, context.device)
    library = Library.open(context.inputs["library"], known)
    seed = derive(context.seed, context.name)
    corpus = Path(context.inputs["corpus"])
    batches = _texts(parent, corpus, parameters, seed)
    folder = context.out / "scoring"

    def read(layer: int) -> Scores | None:
        file = folder / f"{layer}.json"
        return choosing.read_scores(file) if file.is_file() else None

    def write(layer: int, scores: Scores) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{layer}.json", _scores_json(scores))

    scores = replace_one(parent, library, batches, known=read, finished=write)
    same = assemble(parent, library, ((PARENT, PARENT),) * len(parent.spec.blocks))
    states = final_states(parent, batches)
    metrics = {
        "parent_difference": difference(probe(parent), probe(same)),
        "parent_kl": mean_kl(parent, states, same, batches),
        "largest_score": max(scores.values()),
        "smallest_score": min(scores.values()),
    }
    if parameters.random_children:
        generator = numpy_generator(seed, "random children")
        choices = random_choices(library, parameters.random_children, generator)
        sums = [predicted(scores, choice) for choice in choices]
        true = [mean_kl(parent, states, assemble(parent, library, choice), batches) for choice in choices]
        metrics["rank_correlation"] = rank_correlation(sums, true)
        context.report["tables"] = [_children_table(sums, true)]
    write_json(context.out / "scores.json", _scores_json(scores))
    return Outcome({"scores": context.out / "scores.json"}, metrics)


def _scores_json(scores: Scores) -> dict[str, Any]:
    rows = [
        {"layer": layer, "half": half, "variant": variant, "score": score}
        for (layer, half, variant), score in scores.items()
    ]
    return {"scores": rows}


def _children_table(sums: Sequence[float], true: Sequence[float]) -> dict[str, Any]:
    pairs = sorted(zip(sums, true, strict=True))
    return {
        "title": "Random children: sums of scores, and their own divergence from the parent (nats a token)",
        "columns": ["sum", "child"],
        "rows": [[f"{one:.4f}", f"{other:.4f}"] for one, other in pairs],
    }


def run_block_costs(context: Context, parameters: BlockCosts) -> Outcome:
    """Time every shape for every batch size, or count its operations."""
    parent, known = open_parent(context.inputs["model"], context.dtype, context.device)
    library = Library.open(context.inputs["library"], known)
    places: list[tuple[int, Half, str]] = [
        (layer, half, variant)
        for layer in range(len(library.layers))
        for half in HALVES
        for variant in library.variants(layer, half)
    ]
    shapes = costs.shapes_of(parent.spec, places)
    workloads = [Workload(batch, parameters.prompt, parameters.answer) for batch in parameters.batches]
    if parameters.measure == "timed":
        timed = costs.measured(
            parent, shapes, workloads, repeats=parameters.repeats, quantize=parameters.quantize
        )
        found = [
            costs.joined(parent.spec, times, shared, work, most_spread=parameters.most_spread)
            for (times, shared), work in zip(timed, workloads, strict=True)
        ]
    else:
        found = [costs.counted(parent.spec, shapes, work) for work in workloads]
    metrics: dict[str, float] = {"shapes": float(len(shapes))}
    for each, work in zip(found, workloads, strict=True):
        fallbacks = sum(1 for cost in each.halves.values() if not cost.timed)
        metrics[f"fallbacks.batch{work.batch}"] = float(fallbacks)
    context.report["tables"] = [_costs_table(parent.spec, shapes, found, workloads)]
    file = context.out / "costs.json"
    write_json(file, [costs.written(one, work, places) for one, work in zip(found, workloads, strict=True)])
    return Outcome({"costs": file}, metrics)


def _costs_table(
    spec: Any, shapes: Sequence[Any], found: Sequence[costs.Costs], workloads: Sequence[Workload]
) -> dict[str, Any]:
    rows = []
    for shape in shapes:
        name = (
            f"attention {shape.attention}, {shape.kv_heads} key-value heads"
            if shape.attention != "none"
            else f"feed-forward {shape.feed_forward}, {shape.width} channels"
        )
        cells = [
            f"{1e3 * one.halves[shape].seconds:.3f}{'' if one.halves[shape].timed else ' (counted)'}"
            for one in found
        ]
        rows.append([name, *cells, f"{found[0].halves[shape].parameters:,}"])
    shared = [f"{1e3 * one.shared.seconds:.3f}" for one in found]
    rows.append(["embedding, last norm, head", *shared, f"{found[0].shared.parameters:,}"])
    batches = [f"batch {work.batch}, ms" for work in workloads]
    return {"title": "Cost of a half for a whole job", "columns": ["half", *batches, "weights"], "rows": rows}


def run_choose_child(context: Context, parameters: ChooseChild) -> Outcome:
    """Solve for every batch size, and keep the one with the least score."""
    library = Library.open(context.inputs["library"])
    spec = library.spec
    scores = choosing.read_scores(context.inputs["scores"])
    limits = choosing.Limits(**parameters.limits())
    best: tuple[float, list[dict[str, Any]], dict[str, float], Problem] | None = None
    refused: PunaError | None = None
    for prices in choosing.read_costs(context.inputs["costs"]):
        try:
            problem = choosing.problem_of(scores, prices, limits, len(spec.blocks))
            found = _solved(spec, prices, problem, parameters)
        except PunaError as error:
            refused = error
            continue
        first = found[0]["figures"]
        if best is None or first["score"] < best[0]:
            best = first["score"], found, first, problem
    if best is None:
        assert refused is not None
        raise refused
    _, solutions, metrics, problem = best
    metrics = dict(metrics) | {"solutions": float(len(solutions))}
    if parameters.check_problems:
        metrics |= choosing.checked(problem, parameters.check_problems, derive(context.seed, context.name))
    context.report["tables"] = [_choice_table(solutions[0]["choice"])]
    file = context.out / "choice.json"
    write_json(file, {"parent": library.parent, "solutions": solutions})
    return Outcome({"choice": file}, {name: value for name, value in metrics.items() if math.isfinite(value)})


def _solved(
    spec: Any, prices: choosing.Prices, problem: Problem, parameters: ChooseChild
) -> list[dict[str, Any]]:
    """Choices and their figures; a uniform child has no score, its width was never scored."""
    if parameters.method == "uniform":
        choice, takes = choosing.uniform(spec, prices, problem)
        about = choosing.figures(spec, prices, choice, takes, 0.0)
        return [{"choice": choice, "figures": about}]
    chosen = choosing.choose(
        problem, parameters.method, solutions=parameters.solutions, alpha=parameters.diversity
    )
    found = []
    for solution in chosen:
        choice = choosing.choice_of(problem, solution)
        takes = choosing.takes_of(problem, solution)
        about = choosing.figures(spec, prices, choice, takes, problem.score(solution))
        found.append({"choice": choice, "figures": about})
    return found


def _choice_table(choice: Choice) -> dict[str, Any]:
    rows = [[str(layer), attention, feed] for layer, (attention, feed) in enumerate(choice)]
    return {"title": "The child", "columns": ["layer", "attention", "feed-forward"], "rows": rows}


def run_assemble_child(context: Context, parameters: AssembleChild) -> Outcome:
    """Put the chosen variants together and save the child."""
    parent, known = open_parent(context.inputs["model"], "float32", context.device)
    library = Library.open(context.inputs["library"], known)
    about = read_json(context.inputs["choice"])
    if not isinstance(about, dict) or about.get("parent") != known:
        raise PunaError(
            "the choice was made for another parent",
            where=context.inputs["choice"],
            fix="give the model that choose_child had",
        )
    solutions = about["solutions"]
    if parameters.solution >= len(solutions):
        raise PunaError(
            "there is no such solution",
            where="solution",
            found=parameters.solution,
            expected=f"0 to {len(solutions) - 1}",
        )
    choice: Choice = tuple((one, other) for one, other in solutions[parameters.solution]["choice"])
    child = assemble(parent, library, choice, trained=parameters.trained)
    child = child.to(pretrained.DTYPES[parameters.save_dtype])
    share = child.spec.parameter_count() / parent.spec.parameter_count()
    metrics = {"parameters": float(child.spec.parameter_count()), "parameter_share": share}
    return Outcome({"model": pretrained.save(child, context.out / "model")}, metrics)


def run_parent_divergence(context: Context, parameters: ParentDivergence) -> Outcome:
    """One child after the other on the same text."""
    parent, _ = open_parent(context.inputs["model"], context.dtype, context.device)
    seed = derive(context.seed, context.name)
    corpus = Path(context.inputs["corpus"])
    batches = _texts(parent, corpus, parameters, seed)
    states = final_states(parent, batches)
    metrics = {}
    for name, source in context.inputs["models"].items():
        child = pretrained.load_merged(source, dtype=context.dtype, device=context.device).eval()
        if child.spec.vocab_size != parent.spec.vocab_size:
            raise PunaError(
                "parent and child must share one vocabulary",
                where=source,
                found=f"{child.spec.vocab_size:,} tokens",
                expected=f"{parent.spec.vocab_size:,}",
            )
        metrics[f"kl.{name}"] = mean_kl(parent, states, child, batches)
    return Outcome({}, metrics)


def run_model_speed(context: Context, parameters: ModelSpeed) -> Outcome:
    """Whole models in turn through the engine's stepper."""
    from puna.decode.step_costs import StepBench
    from puna.model.steppers import make_stepper

    work = Workload(parameters.batch, parameters.prompt, parameters.answer)
    room = 2 * work.tokens + 2 * work.prompt
    benches = {}
    for name, source in context.inputs["models"].items():
        model = pretrained.load_merged(source, dtype=context.dtype, device=context.device)
        stepper = make_stepper(model, quantize=parameters.quantize, cache_tokens=room)
        ids = [place % model.spec.vocab_size for place in range(64)]
        benches[name] = StepBench(stepper, ids, work.batch, work.prompt + work.answer // 2)
    taken: dict[str, list[float]] = {name: [] for name in benches}
    for turn in range(parameters.repeats + 1):
        for name in benches if turn % 2 else reversed(benches):
            prefill, step = benches[name].layers(0, work.prompt), benches[name].step(work.batch, 0).whole
            if turn:
                taken[name].append(work.batch * prefill + work.answer * step)
    medians = {name: statistics.median(times) for name, times in taken.items()}
    first = next(iter(medians.values()))
    metrics = {f"seconds.{name}": value for name, value in medians.items()}
    metrics |= {f"share.{name}": value / first for name, value in medians.items()}
    return Outcome({}, metrics)
