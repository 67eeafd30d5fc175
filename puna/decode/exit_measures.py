"""The stage ``early_exits``: what leaving early saves, and how often the whole model would have differed.

A text written with exits is read once more by the whole model: the agreement is the share of its tokens
that the whole model would have written next behind the same words. Layers are counted as a step runs
them: rows that waited below and are read along use the same weights in the same pass.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from puna.core.stage import Context, Outcome
from puna.data.corpus import Corpus
from puna.decode.early_exit import EarlyExiting
from puna.decode.engine import Completion, Engine
from puna.decode.plain import Plain
from puna.decode.respond import asked, questions
from puna.decode.sampling import Sampling
from puna.model.early_exit import EarlyExit
from puna.text import pretrained
from puna.text.encode import encode_prompt

if TYPE_CHECKING:
    from puna.decode.engine import Prompt
    from puna.decode.routing_stages import EarlyExitsStage
    from puna.decode.strategy import Strategy
    from puna.model.llama import Llama

_NEVER = 1.0


def run(context: Context, parameters: EarlyExitsStage) -> Outcome:
    """Answer the questions in full and with each set of thresholds, in turn."""
    model = pretrained.load(context.inputs["model"], dtype=context.dtype, device=context.device)
    rows = questions(
        Corpus.open(context.inputs["corpus"]), skip=parameters.skip, rows=parameters.rows, seed=context.seed
    )
    prompts: list[Prompt] = [asked(row) for row in rows]
    engine = Engine(model, kernels=parameters.kernels, quantize=parameters.quantize)
    sampling = Sampling(max_tokens=parameters.max_tokens)
    ways: dict[str, Strategy] = {"whole": Plain()}
    never = EarlyExit(parameters.exits, (_NEVER,) * len(parameters.exits))
    ways |= {
        label: EarlyExiting(EarlyExit(parameters.exits, thresholds))
        for label, thresholds in parameters.thresholds.items()
    }
    found = {label: engine.generate(prompts, sampling, way) for label, way in ways.items()}
    unmoved = engine.generate(prompts, sampling, EarlyExiting(never))
    same = [one.ids == other.ids for one, other in zip(found["whole"], unmoved, strict=True)]
    metrics = {"rows": float(len(rows)), "same.never": sum(same) / len(same)}
    layers = len(model.spec.blocks)
    for label in parameters.thresholds:
        metrics |= {
            f"{name}.{label}": value for name, value in _figures(found[label], model, prompts, layers).items()
        }
    metrics |= _speeds(engine, prompts[: parameters.timed_rows], sampling, ways, parameters.timed_rounds)
    context.report["tables"] = [_table(metrics, list(parameters.thresholds), parameters.exits)]
    context.report["samples"] = [
        {"prompt": str(rows[place]["messages"][0]["content"])[-400:], "outputs": _texts(found, place)}
        for place in range(min(3, len(rows)))
    ]
    return Outcome({}, metrics)


def _texts(found: Mapping[str, Sequence[Completion]], place: int) -> dict[str, str]:
    return {label: completions[place].text for label, completions in found.items()}


def _figures(
    completions: Sequence[Completion], model: Llama, prompts: Sequence[Prompt], layers: int
) -> dict[str, float]:
    """Agreement, layers and weights read a token, and the share that left behind each exit."""
    depths: Counter[int] = Counter()
    costs: list[float] = []
    agreed = 0
    for completion, prompt in zip(completions, prompts, strict=True):
        # The first token comes out of the prompt, which is read in full: it had no way to leave.
        for row in completion.trace[1:]:
            depths[layers if row.source == "target" else int(row.source.removeprefix("layer "))] += 1
            costs.append(row.cost or 0.0)
        agreed += _agreed(completion, model, prompt)
    written = sum(depths.values())
    if not written:
        return {"agreement": 1.0, "layers": 1.0, "cost": 1.0}
    figures = {
        "agreement": agreed / written,
        "layers": sum(depth * count for depth, count in depths.items()) / (layers * written),
        "cost": sum(costs) / written,
    }
    return figures | {f"left_{depth}": count / written for depth, count in sorted(depths.items())}


@torch.inference_mode()
def _agreed(completion: Completion, model: Llama, prompt: Any) -> int:
    """Tokens behind the first that the whole model would have written as well."""
    assert model.tokenizer is not None and model.template is not None
    before = encode_prompt(model.tokenizer, model.template, prompt)
    ids = torch.tensor([[*before, *completion.ids]], device=model.device)
    hidden = model.hidden(ids)[:, len(before) : -1]  # behind the first token, up to the last but one
    chosen = model.logits(hidden).argmax(-1)[0].tolist()
    return sum(one == other for one, other in zip(chosen, completion.ids[1:], strict=True))


def _speeds(
    engine: Engine, prompts: Sequence[Prompt], sampling: Sampling, ways: Mapping[str, Strategy], rounds: int
) -> dict[str, float]:
    """Tokens a second over those of the whole model, one text at a time; the median of rounds in turn."""
    rates: dict[str, list[float]] = {label: [] for label in ways}
    for _ in range(rounds):
        for label, way in ways.items():
            start = time.perf_counter()
            tokens = sum(len(engine.generate([prompt], sampling, way)[0].ids) for prompt in prompts)
            rates[label].append(tokens / (time.perf_counter() - start))
    ratios = {
        label: [mine / whole for mine, whole in zip(found, rates["whole"], strict=True)]
        for label, found in rates.items()
        if label != "whole"
    }
    return {f"speed.{label}": sorted(found)[len(found) // 2] for label, found in ratios.items()}


def _table(metrics: Mapping[str, float], labels: Sequence[str], exits: Sequence[int]) -> dict[str, Any]:
    columns = [
        "thresholds",
        "agreement",
        "layers",
        "weights read",
        "tokens/s",
        *(f"left at {n}" for n in exits),
    ]
    names = ["agreement", "layers", "cost", "speed", *(f"left_{layer}" for layer in exits)]
    return {
        "title": "Leaving early, against the whole model",
        "columns": columns,
        "rows": [
            [label, *(f"{metrics.get(f'{name}.{label}', 0.0):.3f}" for name in names)] for label in labels
        ],
    }
