"""Decoding strategies on the same prompts: what each wrote, in how many passes of which model.

Passes are counted, not timed: a pass of the target costs 1, one of another model the weights it reads
over the target's, and a head's weights come on top wherever it is asked. That is the cost of a step that
is bound by reading weights, as decoding for one person is; a pass that verifies a draft counts once.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from puna.core.errors import PunaError
from puna.core.files import write_json
from puna.core.seeds import derive
from puna.core.stage import Context
from puna.core.stage import Outcome as StageOutcome
from puna.data.corpus import Corpus
from puna.decode.engine import Completion, Engine
from puna.decode.goodness import chi_square
from puna.decode.heads import load_head
from puna.decode.request import TARGET
from puna.decode.respond import asked, questions
from puna.decode.sampling import Law, Sampling
from puna.decode.short_head import pass_weights
from puna.decode.speculative import Round, Speculative
from puna.decode.strategy import Strategy, resolve
from puna.decode.trace import TraceRow
from puna.text import pretrained

if TYPE_CHECKING:
    from puna.decode.draft_stages import SampledLaw, Strategies
    from puna.decode.engine import Prompt
    from puna.decode.lane import Steps
    from puna.decode.request import Running
    from puna.model.llama import Llama


@dataclass
class Counts:
    """Passes and tokens of one strategy over all prompts."""

    rounds: int = 0
    drafted: int = 0
    kept: int = 0
    emitted: int = 0
    scored: int = 0
    peak_bytes: dict[str, int] = field(default_factory=dict)

    def note(self, request: Running, round_: Round) -> None:
        """Count a round."""
        self.rounds += 1
        self.drafted += round_.drafted
        self.kept += round_.kept
        self.emitted += round_.emitted
        self.scored += max(round_.drafted - 1, 0)
        for place, lane in enumerate(request.lanes):
            name = TARGET if place == 0 else "draft"
            self.peak_bytes[name] = max(self.peak_bytes.get(name, 0), lane.sequence.bytes)


@dataclass(frozen=True)
class Outcome:
    """A strategy's completions, one for each prompt, with what they took; costs are those of a pass."""

    completions: list[Completion]
    counts: Counts
    seconds: float
    draft_cost: float
    head_cost: float
    pass_cost: float = 1.0

    @property
    def tokens(self) -> int:
        """Tokens that were produced."""
        return sum(len(completion.ids) for completion in self.completions)

    @property
    def target_passes(self) -> int:
        """Passes of the target: rounds, or tokens where nothing is drafted."""
        return self.counts.rounds or self.tokens

    @property
    def cost(self) -> float:
        """Passes of the target's size for each token."""
        counts = self.counts
        drafting = counts.drafted * self.draft_cost + counts.scored * self.head_cost
        return (self.target_passes * self.pass_cost + drafting) / self.tokens

    def figures(self) -> dict[str, float]:
        """Figures by their short names."""
        counts = self.counts
        found = {
            "tokens": float(self.tokens),
            "target_passes": float(self.target_passes),
            "draft_passes": float(counts.drafted),
            "cost": self.cost,
            "draft_cost": self.draft_cost,
            "seconds": self.seconds,
            "lossless": float(all(completion.lossless for completion in self.completions)),
        }
        if counts.rounds:
            found["accepted_length"] = counts.kept / counts.rounds
            found["accepted_share"] = counts.kept / max(counts.drafted, 1)
            found["draft_length"] = counts.drafted / counts.rounds
        for name, size in counts.peak_bytes.items():
            found[f"cache_bytes.{name}"] = float(size)
        return found


def run_strategy(
    engine: Engine,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    chosen: Mapping[str, Any],
    models: Mapping[str, Llama],
) -> Outcome:
    """Complete all prompts with one strategy and count what it takes; ``models`` are those it may use."""
    strategy: Strategy = resolve(chosen)
    counts = Counts()
    if isinstance(strategy, Speculative):
        strategy.on_round = counts.note
    start = time.perf_counter()
    completions = engine.generate(prompts, sampling, strategy)
    seconds = time.perf_counter() - start
    every = {TARGET: engine.model, **models}
    whole = pass_weights(engine.model)
    writer = every[str(chosen.get("model", TARGET))]
    drafter = every.get(str(chosen.get("draft", "draft")), engine.model)
    draft_cost = pass_weights(drafter, chosen.get("draft_vocabulary")) / whole
    head = load_head(chosen["head"]).parameter_count / whole if "head" in chosen else 0.0
    return Outcome(completions, counts, seconds, draft_cost, head, pass_weights(writer) / whole)


def compare(context: Context, parameters: Strategies) -> StageOutcome:
    """The stage ``strategies``."""
    target, models = _open(context)
    source = Corpus.open(context.inputs["corpus"])
    rows = questions(source, skip=parameters.skip, rows=parameters.rows, seed=context.seed)
    engine = Engine(target, quantize=parameters.quantize, kernels=parameters.kernels, models=models)
    sampling = Sampling(
        max_tokens=parameters.max_tokens,
        temperature=parameters.temperature,
        top_k=parameters.top_k,
        top_p=parameters.top_p,
        seed=derive(context.seed, context.name),
        ignore_eos=parameters.ignore_eos,
    )
    prompts = [asked(row) for row in rows]
    answers = None if parameters.answers is None else _answers(rows, parameters.answers)
    found: dict[str, Outcome] = {}
    metrics: dict[str, float] = {"rows": float(len(rows))}
    for label, chosen in parameters.strategies.items():
        settings = with_heads(chosen, context.inputs.get("heads") or {})
        found[label] = run_strategy(engine, prompts, sampling, settings, models)
        figures = found[label].figures()
        if answers is not None:
            figures["correct"] = correct_share(found[label].completions, answers)
        metrics |= {f"{name}.{label}": value for name, value in figures.items()}
    for label, others in parameters.rivals.items():
        silent = [name for name in (label, *others) if f"accepted_length.{name}" not in metrics]
        if silent:
            raise PunaError(
                "rivals are strategies that draft", where=f"rivals.{label}", found=f"{silent[0]!r} does not"
            )
        points = [(metrics[f"accepted_length.{other}"], metrics[f"correct.{other}"]) for other in others]
        metrics[f"rivals_correct.{label}"] = between(metrics[f"accepted_length.{label}"], points)
    if parameters.baseline is not None:
        expected = found[parameters.baseline].completions
        for label, outcome in found.items():
            metrics[f"same.{label}"] = same_share(outcome.completions, expected)
            metrics[f"same_but_last.{label}"] = same_share(outcome.completions, expected, 1)
    context.report.setdefault("tables", []).append(_table(found, metrics))
    context.report.setdefault("samples", []).extend(
        {
            "prompt": prompts[place][-1]["content"][-400:],
            "outputs": {label: outcome.completions[place].text for label, outcome in found.items()},
        }
        for place in range(min(3, len(prompts)))
    )
    path = context.out / "texts.json"
    write_json(path, {label: [c.text for c in outcome.completions] for label, outcome in found.items()})
    return StageOutcome({"texts": path}, metrics)


def _open(context: Context) -> tuple[Llama, dict[str, Llama]]:
    """The target, and the further models by name."""
    places = context.inputs.get("models") or {}
    target, *others = (
        pretrained.load(place, dtype=context.dtype, device=context.device)
        for place in (context.inputs["target"], *places.values())
    )
    return target, dict(zip(places, others, strict=True))


def _answers(rows: Sequence[Mapping[str, Any]], pattern: str) -> list[str]:
    """What a right answer to each conversation holds: the part of its own answer that ``pattern`` finds."""
    found = []
    for row in rows:
        match = re.search(pattern, row["messages"][-1]["content"])
        if row["messages"][-1]["role"] != "assistant" or match is None:
            raise PunaError(
                "a conversation has no answer to check by",
                where=f"row {row['id']}",
                expected=f"a last turn of the assistant in which {pattern!r} finds something",
            )
        found.append(match[0])
    return found


def between(place: float, points: Sequence[tuple[float, float]]) -> float:
    """The height at ``place`` of the line through ``points``; beyond its ends that of the nearest one."""
    ordered = sorted(points)
    for (left, low), (right, high) in itertools.pairwise(ordered):
        if left <= place <= right and left < right:
            return low + (high - low) * (place - left) / (right - left)
    return ordered[0][1] if place < ordered[0][0] else ordered[-1][1]


_SHOWN = ("tokens", "target_passes", "draft_passes", "cost", "accepted_length", "same", "correct", "seconds")


def _table(found: Mapping[str, Outcome], metrics: Mapping[str, float]) -> dict[str, Any]:
    names = [name for name in _SHOWN if any(f"{name}.{label}" in metrics for label in found)]
    rows = [[label, *(metrics.get(f"{name}.{label}", "") for name in names)] for label in found]
    note = "cost: passes of the target's size for each token; accepted_length: drafted tokens kept in a round"
    return {"title": "Strategies", "columns": ["", *names], "rows": rows, "note": note}


def measure_law(context: Context, parameters: SampledLaw) -> StageOutcome:
    """The stage ``sampled_law``: pairs of first tokens, counted, against the target's own law."""
    target, models = _open(context)
    engine = Engine(target, quantize=parameters.quantize, kernels=parameters.kernels, models=models)
    sampling = Sampling(
        max_tokens=3,  # two that are looked at, and room to draft for both
        temperature=parameters.temperature,
        top_k=parameters.top_k,
        top_p=parameters.top_p,
        seed=derive(context.seed, context.name),
        n=parameters.draws,
        ignore_eos=True,
    )
    prompt = engine.encode(parameters.prompt)
    law = pair_law(engine, prompt, sampling)
    cells = {pair: place for place, pair in enumerate(law)}
    metrics: dict[str, float] = {"cells": float(len(cells))}
    for label, chosen in parameters.strategies.items():
        settings = with_heads(chosen, context.inputs.get("heads") or {})
        counts = torch.zeros(len(cells) + 1)
        for completion in engine.generate([prompt], sampling, settings):
            first, second = completion.ids[:2]
            counts[cells.get((first, second), len(cells))] += 1
        statistic, p_value = chi_square(counts, torch.tensor([*law.values(), 0.0], dtype=torch.float64))
        metrics |= {f"chi_square.{label}": statistic, f"p_value.{label}": p_value}
        metrics[f"deviation.{label}"] = largest_deviation(counts.tolist(), law)
    return StageOutcome(metrics=metrics)


def largest_deviation(counts: Sequence[float], law: Mapping[tuple[int, int], float]) -> float:
    """How far a first token's count is from what ``law`` expects at most, in its standard deviations.

    ``counts`` are of the pairs of ``law``, in its order, and of all others.
    """
    total = sum(counts)
    seen, wanted = defaultdict[int, float](float), defaultdict[int, float](float)
    for (first, _), chance, count in zip(law, law.values(), counts, strict=False):
        seen[first] += count
        wanted[first] += chance
    return max(
        abs(seen[first] - total * chance) / math.sqrt(max(total * chance * (1 - chance), 1e-9))
        for first, chance in wanted.items()
    )


class Walk:
    """A method that writes nothing of its own: it reads given texts and keeps the law behind each."""

    name = "walk"
    lossless = True

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        self.texts = texts
        self.laws: list[Law] = []

    def run(self, request: Running) -> Steps[None]:
        """Read each text behind the prompt, then end."""
        for text in self.texts:
            result = yield from request.lane.catch_up([*request.prompt, *text])
            self.laws.append(request.law(result.logits[-1], list(text)))
        request.emit(0, TraceRow(0), result.logits[-1])


def pair_law(engine: Engine, prompt: Sequence[int], sampling: Sampling) -> dict[tuple[int, int], float]:
    """The probability of each pair of tokens that may follow ``prompt``, as the engine's target has it."""
    alone = dataclasses.replace(sampling, n=1, max_tokens=1)
    first = Walk([()])
    engine.generate([list(prompt)], alone, first)
    tokens = first.laws[0].probabilities.nonzero()[:, 0].tolist()
    second = Walk([(token,) for token in tokens])
    engine.generate([list(prompt)], alone, second)
    found: dict[tuple[int, int], float] = {}
    for token, law in zip(tokens, second.laws, strict=True):
        chance = float(first.laws[0].probabilities[token])
        for after in law.probabilities.nonzero()[:, 0].tolist():
            found[token, after] = chance * float(law.probabilities[after])
    return found


def with_heads(chosen: Mapping[str, Any], heads: Mapping[str, Path]) -> dict[str, Any]:
    """A strategy's settings with the name of a head turned into its file."""
    settings = dict(chosen)
    if isinstance(settings.get("head"), str):
        if settings["head"] not in heads:
            raise PunaError(
                f"strategy {settings.get('name')!r} names a head that is not among the inputs",
                where="strategies",
                found=settings["head"],
                expected=", ".join(heads) or "an input heads",
            )
        settings["head"] = str(heads[settings["head"]])
    return settings


def same_share(found: Sequence[Completion], expected: Sequence[Completion], but: int = 0) -> float:
    """Share of completions that equal others token by token, but for the last ``but``."""
    pairs = [
        (one.ids[: len(one.ids) - but], other.ids[: len(other.ids) - but])
        for one, other in zip(found, expected, strict=True)
    ]
    return sum(one == other for one, other in pairs) / len(pairs)


def correct_share(found: Sequence[Completion], answers: Sequence[str]) -> float:
    """Share of completions that hold the answer to their question, whatever the case."""
    pairs = zip(found, answers, strict=True)
    return sum(answer.casefold() in completion.text.casefold() for completion, answer in pairs) / len(found)
