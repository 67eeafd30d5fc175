"""From scores, costs and limits to a child: the integer programme, and the ways it is compared with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from puna.core.errors import PunaError
from puna.core.files import read_json
from puna.core.seeds import numpy_generator
from puna.edit.sub_blocks import programme
from puna.edit.sub_blocks.costs import Workload
from puna.edit.sub_blocks.divergence import Scores
from puna.edit.sub_blocks.library import Choice, child_spec
from puna.edit.sub_blocks.programme import Option, Problem, Solution
from puna.edit.sub_blocks.variants import HALVES, NONE, PARENT, Half
from puna.model.sizes import cache_bytes
from puna.model.spec import LlamaSpec

_BYTES = 2  # of a weight, in bfloat16
_SECONDS, _MEMORY, _WEIGHTS = "seconds", "bytes", "parameters"


@dataclass(frozen=True)
class Limits:
    """What a child may take; None: as much as it likes.

    ``runtime`` is a share of the parent's time for the job and ``parameters`` a share of its weights;
    ``latency`` is in seconds of the job, ``throughput`` in tokens a second (prompts and answers), ``memory``
    in bytes of weights in bfloat16 and of the keys and values of all texts.
    """

    runtime: float | None = None
    latency: float | None = None
    throughput: float | None = None
    memory: float | None = None
    parameters: float | None = None


class Prices:
    """A file of costs of one workload, read."""

    def __init__(self, about: Mapping[str, Any]) -> None:
        self.workload = Workload(**about["workload"])
        self.shared: Mapping[str, float] = about["shared"]
        self.rows = {(row["layer"], row["half"], row["variant"]): row for row in about["variants"]}

    def takes(self, layer: int, half: Half, variant: str) -> dict[str, float]:
        """What a variant takes of every resource."""
        if variant == NONE:
            return {_SECONDS: 0.0, _MEMORY: 0.0, _WEIGHTS: 0.0}
        row = self.rows.get((layer, half, variant))
        if row is None:
            raise PunaError(
                "the costs know no such variant",
                where=f"layer {layer}, {half}",
                found=variant,
                fix="measure the costs of the library that is chosen from",
            )
        return self._resources(row)

    def _resources(self, row: Mapping[str, float]) -> dict[str, float]:
        stored = row["cache_bytes"] * self.workload.tokens
        return {
            _SECONDS: row["seconds"],
            _MEMORY: row["parameters"] * _BYTES + stored,
            _WEIGHTS: row["parameters"],
        }

    def fixed(self) -> dict[str, float]:
        """What every child takes besides its layers."""
        return self._resources(self.shared)

    def parent(self, layers: int) -> dict[str, float]:
        """What the parent takes in all."""
        halves = [self.takes(layer, half, PARENT) for layer in range(layers) for half in HALVES]
        return {name: value + sum(half[name] for half in halves) for name, value in self.fixed().items()}


def read_costs(file: str | Path) -> list[Prices]:
    """The costs in a file, one for each workload."""
    content = read_json(file)
    if not isinstance(content, list) or not all("workload" in about for about in content):
        raise PunaError("this is no file of costs", where=file, expected="one that block_costs has written")
    return [Prices(about) for about in content]


def read_scores(file: str | Path) -> Scores:
    """The replace-one scores in a file."""
    content = read_json(file)
    if not isinstance(content, dict) or "scores" not in content:
        raise PunaError("this is no file of scores", where=file, expected="one that replace_one has written")
    return {(row["layer"], row["half"], row["variant"]): row["score"] for row in content["scores"]}


def problem_of(scores: Scores, prices: Prices, limits: Limits, layers: int) -> Problem:
    """The groups, attention and feed-forward of each layer in turn, and what is left for them."""
    groups = []
    for layer in range(layers):
        for half in HALVES:
            names = [PARENT, *(name for at, of, name in scores if (at, of) == (layer, half))]
            groups.append(
                tuple(
                    Option(name, scores.get((layer, half, name), 0.0), prices.takes(layer, half, name))
                    for name in names
                )
            )
    fixed, parent = prices.fixed(), prices.parent(layers)
    seconds = [
        None if limits.runtime is None else limits.runtime * parent[_SECONDS],
        limits.latency,
        # The throughput of the job, b * seq / seconds, is a limit of the seconds.
        None if limits.throughput is None else prices.workload.tokens / limits.throughput,
    ]
    bounds = {
        _SECONDS: min((bound for bound in seconds if bound is not None), default=None),
        _MEMORY: limits.memory,
        _WEIGHTS: None if limits.parameters is None else limits.parameters * parent[_WEIGHTS],
    }
    given = {name: bound - fixed[name] for name, bound in bounds.items() if bound is not None}
    if not given:
        raise PunaError(
            "a child needs a limit", expected=", ".join(f.name for f in dataclasses.fields(Limits))
        )
    return Problem(tuple(groups), given)


def choose(problem: Problem, method: str, *, solutions: int = 1, alpha: float = 0.8) -> list[Solution]:
    """Children by ``programme`` (several, best first), ``greedy``, ``most_parameters`` or ``no_op_only``."""
    if method == "greedy":
        return [programme.greedy(problem)]
    if method == "most_parameters":
        return [programme.solve(programme.most_of(problem, _WEIGHTS))]
    if method == "no_op_only":
        narrow = programme.only(problem, (PARENT, NONE))
        found = programme.solve(narrow)
        names = [group[place].name for group, place in zip(narrow.groups, found, strict=True)]
        return [
            tuple(
                next(place for place, option in enumerate(group) if option.name == name)
                for group, name in zip(problem.groups, names, strict=True)
            )
        ]
    chosen: list[Solution] = []
    for _ in range(solutions):
        chosen.append(programme.solve(problem, before=chosen, alpha=alpha))
    return chosen


def choice_of(problem: Problem, solution: Solution) -> Choice:
    """The variants by layer."""
    names = [group[place].name for group, place in zip(problem.groups, solution, strict=True)]
    return tuple(zip(names[::2], names[1::2], strict=True))


def uniform(spec: LlamaSpec, prices: Prices, problem: Problem) -> tuple[Choice, dict[str, float]]:
    """The same share of every layer's channels, as many as all limits leave, and no other change.

    The seconds of a width lie on the line between those of the two nearest widths that were measured.
    """
    most = max(block.width for block in spec.blocks)
    low, high = 0, most  # the largest count of channels of the widest layer that fits lies between
    while low < high:
        middle = (low + high + 1) // 2
        if _fits(problem, _uniform_takes(spec, prices, middle / most)):
            low = middle
        else:
            high = middle - 1
    if not low:
        raise PunaError(
            "narrower feed-forwards alone do not reach the limits", where=", ".join(problem.limits)
        )
    choice = tuple(
        (PARENT, _width_name(block.width, low / most) if block.feed_forward == "swiglu" else PARENT)
        for block in spec.blocks
    )
    return choice, _uniform_takes(spec, prices, low / most)


def _fits(problem: Problem, takes: Mapping[str, float]) -> bool:
    return all(takes[name] <= limit for name, limit in problem.limits.items())


def _width_name(width: int, share: float) -> str:
    number = max(1, round(share * width))
    return PARENT if number == width else f"width-{number}"


def _uniform_takes(spec: LlamaSpec, prices: Prices, share: float) -> dict[str, float]:
    """What the layers take with this share of all channels."""
    total = dict.fromkeys((_SECONDS, _MEMORY, _WEIGHTS), 0.0)
    for layer, block in enumerate(spec.blocks):
        takes = [prices.takes(layer, "attention", PARENT)]
        whole = prices.takes(layer, "feed_forward", PARENT)
        if block.feed_forward == "swiglu":
            number = max(1, round(share * block.width))
            known = {0: 0.0, block.width: whole[_SECONDS]}
            for at, half, name in prices.rows:
                if at == layer and half == "feed_forward" and name.startswith("width-"):
                    known[int(name.removeprefix("width-"))] = prices.takes(layer, half, name)[_SECONDS]
            widths = sorted(known)
            seconds = float(numpy.interp(number, widths, [known[width] for width in widths]))
            one = dataclasses.replace(block, attention="none", width=number)
            weights = one.parameter_count(spec.hidden_size, spec.attention_bias, spec.mlp_bias)
            takes.append({_SECONDS: seconds, _WEIGHTS: weights, _MEMORY: weights * _BYTES})
        else:
            takes.append(whole)
        for name in total:
            total[name] += sum(part[name] for part in takes)
    return total


def figures(
    spec: LlamaSpec, prices: Prices, choice: Choice, takes: Mapping[str, float], score: float
) -> dict[str, float]:
    """Of a child: its predicted divergence, and shares of what the parent takes."""
    parent, fixed = prices.parent(len(spec.blocks)), prices.fixed()
    child = child_spec(spec, choice)
    stored = cache_bytes(spec)
    seconds = fixed[_SECONDS] + takes[_SECONDS]
    return {
        "score": score,
        "runtime_share": seconds / parent[_SECONDS],
        "seconds": seconds,
        "memory": fixed[_MEMORY] + takes[_MEMORY],
        "throughput": prices.workload.tokens / seconds,
        "parameters": float(child.parameter_count()),
        "parameter_share": child.parameter_count() / spec.parameter_count(),
        "cache_share": cache_bytes(child) / stored if stored else 0.0,
        "batch": float(prices.workload.batch),
    }


def takes_of(problem: Problem, solution: Solution) -> dict[str, float]:
    """What a solution's layers take of every resource, limited or not."""
    chosen = [group[place] for group, place in zip(problem.groups, solution, strict=True)]
    return {
        name: math.fsum(option.takes[name] for option in chosen) for name in (_SECONDS, _MEMORY, _WEIGHTS)
    }


def checked(problem: Problem, count: int, seed: int) -> dict[str, float]:
    """The programme against every combination and against greed, on small problems out of this one.

    Each has up to 6 groups of up to 4 options, drawn by the seed, and limits between the least and the most
    that they take.
    """
    generator = numpy_generator(seed, "small problems")
    worst, least, feasible = 0.0, math.inf, 0
    for _ in range(count):
        small = _small(problem, generator)
        best, found = small.score(programme.brute_force(small)), small.score(programme.solve(small))
        worst = max(worst, abs(best - found))
        try:
            least = min(least, small.score(programme.greedy(small)) - found)
        except PunaError:  # greed may end where nothing is left to save
            continue
        feasible += 1
    return {"brute_force_difference": worst, "greedy_least_excess": least, "greedy_problems": float(feasible)}


def _small(problem: Problem, generator: numpy.random.Generator) -> Problem:
    number = int(generator.integers(2, 7))
    places = sorted(generator.permutation(len(problem.groups))[:number].tolist())
    groups = []
    for place in places:
        group = problem.groups[place]
        kept = sorted(generator.permutation(len(group))[:4].tolist())
        groups.append(tuple(group[each] for each in kept))
    limits = {}
    for name in problem.limits:
        low = sum(min(option.takes[name] for option in group) for group in groups)
        high = sum(max(option.takes[name] for option in group) for group in groups)
        limits[name] = float(generator.uniform(low, high))
    # Two limits drawn apart may exclude each other: the cheapest in one need not be in the other.
    cheapest = Problem(tuple(groups), limits)
    first = next(iter(problem.limits))
    alone: Sequence[int] = [
        min(range(len(group)), key=lambda each: group[each].takes[first]) for group in groups
    ]
    for name in limits:
        limits[name] = max(limits[name], cheapest.used(alone, name))
    return Problem(tuple(groups), limits)
