"""NSGA-II over genes, from pymoo, and what goes with two objectives: fronts, their crowding, their volume.

NSGA-II: Deb and others 2002. Parents are crossed gene by gene, each gene of a child is drawn anew with a
small probability, and a child is put into its one spelling before it is compared. Both objectives are
minimised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy

from puna.core.errors import PunaError
from puna.core.seeds import derive
from puna.model.search_space import Genes, SearchSpace

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[numpy.float64]

Evaluate = Callable[[Sequence[Genes]], "Floats | None"]
"""Objectives [children, 2] of children; None: it is enough, the search ends here."""


@dataclass(frozen=True)
class Evolution:
    """Children of a generation; probabilities that parents are crossed, and that a gene is drawn anew."""

    population: int
    crossover: float = 0.9
    mutation: float = 0.02


def evolve(
    space: SearchSpace,
    first: Sequence[Genes],
    evaluate: Evaluate,
    settings: Evolution,
    *,
    generations: int,
    seed: int,
) -> list[Genes]:
    """NSGA-II from the ``first`` children on; the last population, each child once.

    It ends after so many generations, when ``evaluate`` gives None, or when no new child can be made.
    """
    pymoo = _pymoo()
    algorithm = pymoo.nsga2(space, numpy.array(first), settings)
    problem = pymoo.problem(n_var=len(space.choices), n_obj=2, xl=0, xu=numpy.array(space.choices) - 1)
    whole = derive(seed, "evolution") % 2**32
    algorithm.setup(problem, termination=("n_gen", generations), seed=whole, verbose=False)
    while algorithm.has_next():
        children = algorithm.ask()
        if children is None or not len(children):
            break
        found = evaluate([space.canonical(row) for row in children.get("X").tolist()])
        if found is None:
            break
        children.set("F", found)
        for child in children:
            child.evaluated.update({"F", "G", "H"})
        algorithm.tell(infills=children)
    population = algorithm.pop
    rows = [] if population is None else population.get("X").tolist()
    return list(dict.fromkeys(space.canonical(row) for row in rows))


@dataclass(frozen=True)
class _Pymoo:
    nsga2: Callable[[SearchSpace, Any, Evolution], Any]
    problem: Any
    sort: Callable[[Floats], list[list[int]]]
    crowding: Callable[[Floats], Floats]


def _pymoo() -> _Pymoo:
    """What is used of pymoo; a PunaError where it is missing."""
    try:
        from pymoo.algorithms.moo.nsga2 import NSGA2
        from pymoo.core.mutation import Mutation
        from pymoo.core.problem import Problem
        from pymoo.core.repair import Repair
        from pymoo.operators.crossover.ux import UniformCrossover
        from pymoo.operators.survival.rank_and_crowding.metrics import get_crowding_function
        from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting
    except ImportError:
        raise PunaError(
            "NSGA-II comes from pymoo, which is not installed", fix='pip install "puna[search]"'
        ) from None

    class Redraw(Mutation):  # type: ignore[misc]
        def __init__(self, choices: Sequence[int], probability: float) -> None:
            super().__init__()
            self.choices, self.probability = numpy.array(choices), probability

        def _do(self, problem: Any, genes: Any, *_: Any, random_state: Any, **__: Any) -> Any:
            drawn = random_state.integers(self.choices, size=genes.shape)
            return numpy.where(random_state.random(genes.shape) < self.probability, drawn, genes)

    class Canonical(Repair):  # type: ignore[misc]
        def __init__(self, space: SearchSpace) -> None:
            super().__init__()
            self.space = space

        def _do(self, problem: Any, genes: Any, **_: Any) -> Any:
            return numpy.array([self.space.canonical(row) for row in genes.tolist()])

    def nsga2(space: SearchSpace, first: Any, settings: Evolution) -> Any:
        return NSGA2(
            pop_size=settings.population,
            sampling=first,
            crossover=UniformCrossover(prob=settings.crossover),
            mutation=Redraw(space.choices, settings.mutation),
            repair=Canonical(space),
            eliminate_duplicates=True,
        )

    crowding = get_crowding_function("cd").do

    def sort(values: Floats) -> list[list[int]]:
        return [list(map(int, front)) for front in NonDominatedSorting().do(values)]

    return _Pymoo(nsga2, Problem, sort, crowding)


def best_diverse(values: Floats, number: int) -> list[int]:
    """Places of the best of ``values`` [children, 2]: by front, in a front those that stand most alone."""
    pymoo = _pymoo()
    chosen: list[int] = []
    for front in pymoo.sort(values):
        alone = pymoo.crowding(values[front])
        order = sorted(range(len(front)), key=lambda place: (-float(alone[place]), place))
        chosen += [front[place] for place in order]
        if len(chosen) >= number:
            break
    return chosen[:number]


def front_of(values: Sequence[Sequence[float]] | Floats) -> list[int]:
    """Places of what nothing else is better than in both, in the order of the second; of equals the first."""
    array = numpy.asarray(values, dtype=float).reshape(-1, 2)
    order = sorted(range(len(array)), key=lambda place: (array[place, 1], array[place, 0], place))
    found: list[int] = []
    lowest = float("inf")
    for place in order:
        if array[place, 0] < lowest:
            found.append(place)
            lowest = float(array[place, 0])
    return found


def hypervolume(values: Sequence[Sequence[float]] | Floats, reference: Sequence[float]) -> float:
    """The area between ``values`` [children, 2] and a fixed ``reference`` that is worse in both.

    Exact in two dimensions: the rectangles under the front. What is beyond the reference adds nothing.
    """
    array = numpy.asarray(values, dtype=float).reshape(-1, 2)
    inside = array[(array < numpy.asarray(reference)).all(1)]
    area, lowest = 0.0, float(reference[0])
    for place in front_of(inside):
        first, second = inside[place]
        area += (lowest - float(first)) * (float(reference[1]) - float(second))
        lowest = float(first)
    return area
