"""The integer programme: one variant for each half of each layer, least score within what may be spent.

System S31, Puzzle (2411.19146): minimise the sum of scores over binaries, one of each group chosen, every
resource within its limit; further solutions share at most a share alpha of their choices with each one
before. HiGHS solves it through ``scipy.optimize.milp``. Beside it: every combination by hand, for small
problems; a greedy descent; and the two objectives the paper compares with, most parameters and no-ops alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from puna.core.errors import PunaError

if TYPE_CHECKING:
    import numpy

_ROOM = 1e-9  # of a limit: sums of floats
MOST_COMBINATIONS = 200_000


@dataclass(frozen=True)
class Option:
    """One variant of a group: its name, its score (low is good), and what it takes of each resource."""

    name: str
    score: float
    takes: Mapping[str, float]


@dataclass(frozen=True)
class Problem:
    """Groups of which one option each is chosen, and how much of each resource there is for them."""

    groups: tuple[tuple[Option, ...], ...]
    limits: Mapping[str, float]

    def score(self, chosen: Sequence[int]) -> float:
        """The sum of the chosen options' scores."""
        return math.fsum(group[place].score for group, place in zip(self.groups, chosen, strict=True))

    def used(self, chosen: Sequence[int], resource: str) -> float:
        """What the chosen options take of a resource."""
        return math.fsum(
            group[place].takes[resource] for group, place in zip(self.groups, chosen, strict=True)
        )

    def fits(self, chosen: Sequence[int]) -> bool:
        """Whether everything is within its limit."""
        return all(
            self.used(chosen, name) <= limit + _ROOM * abs(limit) for name, limit in self.limits.items()
        )

    def check(self) -> None:
        """Say which limit cannot be met, were it the only one."""
        for name, limit in self.limits.items():
            least = math.fsum(min(option.takes[name] for option in group) for group in self.groups)
            if least > limit + _ROOM * abs(limit):
                raise PunaError(
                    "no child is this cheap",
                    where=name,
                    found=f"at most {limit:.6g} for the layers",
                    expected=f"at least {least:.6g}",
                    fix="a higher limit, or cheaper variants in the library",
                )


Solution = tuple[int, ...]
"""Of each group the place of the chosen option."""


def solve(problem: Problem, *, before: Sequence[Solution] = (), alpha: float = 0.8) -> Solution:
    """The exact optimum; with ``before`` it agrees with each of those in at most ``alpha`` of the groups."""
    import numpy

    milp = _milp()
    problem.check()
    options = [option for group in problem.groups for option in group]
    starts = list(itertools.accumulate((len(group) for group in problem.groups), initial=0))
    rows: list[Any] = []
    low: list[float] = []
    high: list[float] = []
    for start, end in itertools.pairwise(starts):
        row = numpy.zeros(len(options))
        row[start:end] = 1.0
        rows.append(row)
        low.append(1.0)
        high.append(1.0)
    for name, limit in problem.limits.items():
        takes = numpy.array([option.takes[name] for option in options])
        unit = max(abs(limit), float(numpy.abs(takes).max())) or 1.0  # seconds and bytes side by side
        rows.append(takes / unit)
        low.append(-math.inf)
        high.append(limit / unit)
    for earlier in before:
        row = numpy.zeros(len(options))
        row[[start + place for start, place in zip(starts, earlier, strict=False)]] = 1.0
        rows.append(row)
        low.append(-math.inf)
        high.append(math.floor(alpha * len(problem.groups) + _ROOM))
    scores = numpy.array([option.score for option in options])
    found = milp(scores, numpy.stack(rows), low, high, _possible(problem))
    if found is None:
        raise PunaError(
            "no child keeps all limits together",
            where=", ".join(problem.limits),
            found=f"{len(before)} solutions before it" if before else "no solution",
            fix="higher limits" + (", a higher diversity or fewer solutions" if before else ""),
        )
    return tuple(int(found[start:end].argmax()) for start, end in itertools.pairwise(starts))


def _milp() -> Any:
    """HiGHS over binaries: gives the values, or None where nothing is feasible."""
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError:
        raise PunaError("the integer programme needs scipy", fix='pip install "puna[search]"') from None

    def run(scores: Any, rows: Any, low: Any, high: Any, possible: Any) -> numpy.ndarray[Any, Any] | None:
        import numpy

        unit = float(numpy.abs(scores).max()) or 1.0
        done = milp(
            scores / unit,
            constraints=LinearConstraint(rows, low, high),
            integrality=numpy.ones(len(scores)),
            bounds=Bounds(0, numpy.array(possible, dtype=float)),
            options={"mip_rel_gap": 0.0},
        )
        values: numpy.ndarray[Any, Any] | None = done.x
        return values

    return run


def _possible(problem: Problem) -> list[bool]:
    """Of every option whether it fits beside the cheapest of all other groups; the others are ruled out."""
    found = [True] * sum(len(group) for group in problem.groups)
    for name, limit in problem.limits.items():
        cheapest = [min(option.takes[name] for option in group) for group in problem.groups]
        least = math.fsum(cheapest)
        takes = [
            option.takes[name] - low
            for group, low in zip(problem.groups, cheapest, strict=True)
            for option in group
        ]
        room = limit + _ROOM * abs(limit) - least
        found = [before and more <= room for before, more in zip(found, takes, strict=True)]
    return found


def brute_force(problem: Problem) -> Solution:
    """The same by trying every combination; of equal ones the first."""
    count = math.prod(len(group) for group in problem.groups)
    if count > MOST_COMBINATIONS:
        raise PunaError(
            "too many combinations to try",
            found=f"{count:.3g}",
            expected=f"at most {MOST_COMBINATIONS:,}",
        )
    problem.check()
    every = itertools.product(*(range(len(group)) for group in problem.groups))
    fitting = [chosen for chosen in every if problem.fits(chosen)]
    if not fitting:
        raise PunaError("no child keeps all limits together", where=", ".join(problem.limits))
    return min(fitting, key=problem.score)


def greedy(problem: Problem) -> Solution:
    """From the best option everywhere, the exchange that costs the least score for what it saves, until all
    fits.

    What is saved counts as the share of each limit that is overspent. May find nothing where there is
    something.
    """
    problem.check()
    chosen = [min(range(len(group)), key=lambda place: group[place].score) for group in problem.groups]
    while not problem.fits(chosen):
        best: tuple[float, int, int] | None = None
        over = _overspent(problem, chosen)
        for number, group in enumerate(problem.groups):
            now = group[chosen[number]]
            for place, option in enumerate(group):
                saved = over - _overspent(problem, chosen, now, option)
                if saved > _ROOM:  # so that every exchange is a step down, and the descent ends
                    price = (option.score - now.score) / saved
                    best = min(best or (math.inf, 0, 0), (price, number, place))
        if best is None:
            raise PunaError("the greedy descent finds no child", where=", ".join(problem.limits))
        chosen[best[1]] = best[2]
    return tuple(chosen)


def _overspent(
    problem: Problem, chosen: Sequence[int], now: Option | None = None, other: Option | None = None
) -> float:
    """The sum of what is beyond the limits, each as a share of its limit; with ``other`` in the place of
    ``now``."""
    total = 0.0
    for name, limit in problem.limits.items():
        used = problem.used(chosen, name)
        if now is not None and other is not None:
            used += other.takes[name] - now.takes[name]
        total += max(0.0, used - limit) / (abs(limit) or 1.0)
    return total


def most_of(problem: Problem, resource: str) -> Problem:
    """The same problem with another aim: as much of a resource as fits, whatever the scores."""
    groups = tuple(
        tuple(dataclasses.replace(option, score=-option.takes[resource]) for option in group)
        for group in problem.groups
    )
    return Problem(groups, problem.limits)


def only(problem: Problem, names: Sequence[str]) -> Problem:
    """The same problem with the options of these names alone."""
    groups = tuple(tuple(option for option in group if option.name in names) for group in problem.groups)
    if not all(groups):
        raise PunaError(
            "a half has none of these variants", found=", ".join(names), fix="have the library make them"
        )
    return Problem(groups, problem.limits)
