"""Whether a model knows how good its answers are, and what it gains by it.

Answers to questions that a program checks, several of each, are scored by the model itself as a whole and
cut in half. How well the scores order the answers is the area under the curve of all pairs of answers to one
question; what they gain is the reward of drawing until one scores enough, beside as many draws everywhere.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from puna.core.files import write_json
from puna.core.seeds import derive
from puna.core.stage import Context, Outcome
from puna.decode.best_of import BestOf, BestOfSettings, annealed
from puna.decode.checked_tasks import Task, make_tasks
from puna.decode.engine import Engine
from puna.decode.heads import area_under_curve
from puna.decode.lane import together
from puna.decode.sampling import Sampling
from puna.decode.self_evaluation import SelfEvaluation, wins_or_ties
from puna.text import pretrained

if TYPE_CHECKING:
    from puna.decode.lane import Lane, Steps
    from puna.decode.request import Running
    from puna.decode.routing_stages import SelfEvaluationStage


@dataclass
class Answers:
    """Several answers to one question: their tokens without a stop, their rewards, later their scores."""

    task: Task
    texts: list[str] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    half_scores: list[float] = field(default_factory=list)


def draw_answers(
    engine: Engine, tasks: Sequence[Task], sampling: Sampling, samples: int, *, anneal: bool
) -> list[Answers]:
    """So many answers to each question, with their rewards; annealed as the strategy does, or all alike."""
    found = [Answers(task) for task in tasks]
    prompts = [task.messages for task in tasks]
    stops = set(engine.tokenizer.stop_ids)
    for place in range(samples):
        temperature = annealed(sampling.temperature, place) if anneal else sampling.temperature
        drawing = Sampling(
            max_tokens=sampling.max_tokens, temperature=temperature, seed=sampling.seed + place
        )
        for answers, completion in zip(found, engine.generate(prompts, drawing), strict=True):
            answers.texts.append(completion.text)
            answers.ids.append([token for token in completion.ids if token not in stops])
            answers.rewards.append(answers.task.reward(completion.text))
    return found


class _Judge:
    """A method that writes nothing: it reads given answers on forks and scores each whole and in half."""

    name: ClassVar[str] = "judge-answers"
    lossless: ClassVar[bool] = False

    def __init__(self, answers: Answers, scorer: SelfEvaluation) -> None:
        self.answers, self.scorer = answers, scorer

    def run(self, request: Running) -> Steps[None]:
        """Score every answer."""
        yield from request.lane.catch_up(request.prompt[:-1], outputs=0)
        forks = [request.lane.fork() for _ in self.answers.ids]
        scored = yield from together(
            *[self._both(request, fork, ids) for fork, ids in zip(forks, self.answers.ids, strict=True)]
        )
        self.answers.scores = [whole for whole, _ in scored]
        self.answers.half_scores = [half for _, half in scored]

    def _both(self, request: Running, lane: Lane, ids: Sequence[int]) -> Steps[tuple[float, float]]:
        half = yield from self._score(request, lane, ids[: len(ids) // 2])
        whole = yield from self._score(request, lane, ids)
        return whole, half

    def _score(self, request: Running, lane: Lane, ids: Sequence[int]) -> Steps[float]:
        text = [*request.prompt, *ids]
        yield from lane.catch_up(text, outputs=0)
        return (yield from self.scorer.score(lane, text))


def score_answers(engine: Engine, answers: Sequence[Answers]) -> None:
    """Let the engine's model score all answers."""
    scorer = SelfEvaluation.of(engine.model)
    tickets = [engine.submit(each.task.messages, strategy=_Judge(each, scorer)) for each in answers]
    for ticket in tickets:
        for _ in ticket.events():
            pass
        ticket.completions  # noqa: B018  (raises what went wrong)


def area(answers: Sequence[Answers], *, half: bool) -> float:
    """Area under the curve of the scores against "wins or ties" with each other answer to its question."""
    scores: list[float] = []
    labels: list[float] = []
    for each in answers:
        for one, other in itertools.permutations(range(len(each.rewards)), 2):
            scores.append(each.half_scores[one] if half else each.scores[one])
            labels.append(float(wins_or_ties(each.rewards[one], each.rewards[other])))
    return area_under_curve(torch.tensor(scores), torch.tensor(labels))


def best(each: Answers, count: int) -> float:
    """The reward of the best-scored of the first ``count`` answers."""
    return each.rewards[max(range(count), key=lambda place: each.scores[place])]


def fixed(answers: Sequence[Answers]) -> list[float]:
    """Mean reward of the best of the first 1, 2, ... answers."""
    most = len(answers[0].rewards)
    return [sum(best(each, count) for each in answers) / len(answers) for count in range(1, most + 1)]


def adaptive(answers: Sequence[Answers], threshold: float) -> tuple[float, float]:
    """Mean samples and mean reward of drawing until a score reaches ``threshold``, or all are drawn."""
    counts = [
        next((place + 1 for place, score in enumerate(each.scores) if score >= threshold), len(each.scores))
        for each in answers
    ]
    rewards = [best(each, count) for each, count in zip(answers, counts, strict=True)]
    return sum(counts) / len(counts), sum(rewards) / len(rewards)


def gains(answers: Sequence[Answers], low: float, high: float) -> list[tuple[float, float, float]]:
    """(mean samples, adaptive reward, fixed reward at as many) of every threshold between two mean counts.

    The fixed reward at a count between two whole ones mixes their two, as drawing the one or the other would.
    """
    levels = fixed(answers)
    found = []
    for threshold in sorted({score for each in answers for score in each.scores}):
        samples, reward = adaptive(answers, threshold)
        if low <= samples <= high:
            below = min(int(samples), len(levels) - 1)
            rest = samples - below
            found.append((samples, reward, levels[below - 1] * (1 - rest) + levels[below] * rest))
    return found


def run(context: Context, parameters: SelfEvaluationStage) -> Outcome:
    """The stage ``self_evaluation``."""
    trained, untrained = (
        Engine(pretrained.load(context.inputs[name], dtype=context.dtype, device=context.device))
        for name in ("model", "untrained")
    )
    seed = derive(context.seed, context.name)
    tasks = make_tasks(parameters.tasks, parameters.questions, seed, held_out=True)
    sampling = Sampling(
        max_tokens=parameters.max_tokens, temperature=parameters.temperature, seed=seed % 2**31
    )
    answers = draw_answers(trained, tasks, sampling, parameters.samples, anneal=parameters.anneal)
    score_answers(untrained, answers)
    metrics = {"area.untrained": area(answers, half=False), "area.untrained.half": area(answers, half=True)}
    score_answers(trained, answers)
    metrics |= {"area": area(answers, half=False), "area.half": area(answers, half=True)}
    levels = fixed(answers)
    metrics |= {f"reward.fixed_{count}": reward for count, reward in enumerate(levels, start=1)}
    metrics["reward.first"] = levels[0]
    greedy = draw_answers(trained, tasks, sampling, 1, anneal=True)
    metrics["reward.greedy"] = sum(each.rewards[0] for each in greedy) / len(greedy)
    metrics["reward.any"] = sum(max(each.rewards) for each in answers) / len(answers)
    metrics["reward.mean"] = sum(sum(each.rewards) / len(each.rewards) for each in answers) / len(answers)
    found = gains(answers, parameters.low, parameters.high)
    metrics["thresholds"] = float(len(found))
    for name, place in (("samples", 0), ("reward.adaptive", 1), ("reward.fixed", 2)):
        metrics[name] = sum(point[place] for point in found) / len(found) if found else math.nan
    metrics |= check(trained, tasks[: min(8, len(tasks))], sampling, parameters)
    context.report["tables"] = [_table(levels, found)]
    path = context.out / "answers.json"
    write_json(path, [_told(each) for each in answers])
    return Outcome({"answers": path}, metrics)


def check(
    engine: Engine, tasks: Sequence[Task], sampling: Sampling, parameters: SelfEvaluationStage
) -> dict[str, float]:
    """The strategy itself: how many samples it draws at the ends, and whether scoring disturbs answers."""
    prompts = [task.messages for task in tasks]

    def ran(**settings: Any) -> tuple[list[list[int]], BestOf, int]:
        strategy = BestOf(BestOfSettings(samples=parameters.samples, anneal=parameters.anneal, **settings))
        before = engine.statistics
        found = engine.generate(prompts, sampling, strategy)
        after = engine.statistics
        # Prompts that earlier texts have read are shared, not read again: both counts together are the same.
        read = after.tokens_read + after.tokens_shared - before.tokens_read - before.tokens_shared
        return [completion.ids for completion in found], strategy, read

    _, first, _ = ran(threshold=0.0)
    undisturbed, every, read = ran(threshold=1.1)
    side_by_side, _, read = ran()
    scored, strategy, more = ran(prune_at=parameters.prune_at, prune_keep=1.0)
    suffix = len(SelfEvaluation.of(engine.model).suffix)
    return {
        "samples.threshold_0": sum(first.drawn) / len(first.drawn),
        "samples.threshold_above_1": sum(every.drawn) / len(every.drawn),
        "undisturbed": sum(
            one == other == third for one, other, third in zip(undisturbed, side_by_side, scored, strict=True)
        )
        / len(prompts),
        "scored_midway": float(strategy.judged_midway),
        "excess_tokens": float(more - read - strategy.judged_midway * suffix),
    }


def _table(levels: Sequence[float], found: Sequence[tuple[float, float, float]]) -> dict[str, Any]:
    rows = [[f"best of {count}", f"{count}", f"{reward:.3f}", ""] for count, reward in enumerate(levels, 1)]
    for samples, reward, level in found[:: max(1, len(found) // 6)]:
        rows.append(["adaptive", f"{samples:.2f}", f"{reward:.3f}", f"{level:.3f}"])
    return {
        "title": "Reward by mean samples",
        "columns": ["", "samples", "reward", "fixed at as many"],
        "rows": rows,
    }


def _told(each: Answers) -> dict[str, Any]:
    return {
        "question": each.task.messages[-1]["content"],
        "texts": each.texts,
        "rewards": each.rewards,
        "scores": each.scores,
        "half_scores": each.half_scores,
    }
