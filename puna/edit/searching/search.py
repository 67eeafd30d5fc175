"""Searches over children of a super-network: LINAS, plain NSGA-II and random search, with one budget each.

System S29, LLaMA-NAS (arXiv:2405.18377) with LINAS (Cummings and others 2022, of Intel's DyNAS-T): children
drawn at random are measured and go into an archive; a predictor of each objective is fitted to all of it;
NSGA-II runs for many generations on the predictors alone; the best and most diverse children of its last
population that were not measured yet are measured, and so on. What is counted is how many different
children are really measured. All three searches begin with the same children drawn at random. Where NSGA-II
on the predictors ends with too few children that are new, the rest is drawn at random.

Both objectives are minimised: a loss and a cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy

from puna.core.errors import PunaError, unknown_name
from puna.core.seeds import derive, numpy_generator
from puna.edit.searching.evolve import Evolution, best_diverse, evolve
from puna.edit.searching.predictors import Ridge
from puna.model.search_space import Genes, SearchSpace

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[numpy.float64]

Point = tuple[float, float]
Measure = Callable[[Genes], Point]
"""The loss and the cost of a child."""


@dataclass(frozen=True)
class SearchSettings:
    """``evaluations`` are children that are measured in all, ``population`` those of a round.

    ``generations`` are those on the predictors between two rounds.
    """

    evaluations: int = 250
    population: int = 50
    generations: int = 200
    crossover: float = 0.9
    mutation: float = 0.02

    @property
    def evolution(self) -> Evolution:
        """The same for NSGA-II."""
        return Evolution(self.population, self.crossover, self.mutation)


@dataclass
class Archive:
    """Children that were measured, in the order in which they were.

    ``guessed`` are, of the rounds that predictors chose, (loss, cost) as guessed beside what was measured.
    """

    points: dict[Genes, Point] = field(default_factory=dict)
    guessed: list[tuple[Point, Point]] = field(default_factory=list)
    drawn_instead: int = 0
    """Children drawn at random because the predictors' search ended with too few new ones."""

    def values(self) -> Floats:
        """[children, 2]."""
        return numpy.array(list(self.points.values())).reshape(-1, 2)


def predictors(space: SearchSpace, points: Mapping[Genes, Point]) -> tuple[Ridge, Ridge]:
    """One for the loss and one for the cost, of all that was measured."""
    features = features_of(space, list(points))
    values = numpy.array(list(points.values()))
    return Ridge.fit(features, values[:, 0]), Ridge.fit(features, values[:, 1])


def features_of(space: SearchSpace, children: Sequence[Genes]) -> Floats:
    """One-hot genes [children, features]."""
    return numpy.array([space.one_hot(genes) for genes in children], dtype=float)


def search(
    method: str, space: SearchSpace, measure: Measure, settings: SearchSettings, *, seed: int
) -> Archive:
    """Measure ``settings.evaluations`` different children, chosen by ``linas``, ``nsga2`` or ``random``."""
    if method not in METHODS:
        raise unknown_name("search", method, METHODS)
    if not settings.population <= settings.evaluations <= space.size:
        raise PunaError(
            "a search measures at least one population, and no more than there are children",
            where="evaluations",
            found=settings.evaluations,
            expected=f"{settings.population} to {space.size}",
        )
    archive = Archive()
    first = _unseen(space, archive, settings.population, numpy_generator(seed, "first children"))
    for genes in first:
        archive.points[genes] = measure(genes)
    METHODS[method](space, archive, measure, settings, derive(seed, "search", method))
    return archive


def _unseen(
    space: SearchSpace, archive: Archive, number: int, generator: numpy.random.Generator
) -> list[Genes]:
    """Different children, drawn at random, that were not measured."""
    found: dict[Genes, None] = {}
    while len(found) < number:
        genes = space.sample(generator)
        if genes not in archive.points:
            found[genes] = None
    return list(found)


def _random(
    space: SearchSpace, archive: Archive, measure: Measure, settings: SearchSettings, seed: int
) -> None:
    left = settings.evaluations - len(archive.points)
    for genes in _unseen(space, archive, left, numpy_generator(seed, "children")):
        archive.points[genes] = measure(genes)


def _nsga2(
    space: SearchSpace, archive: Archive, measure: Measure, settings: SearchSettings, seed: int
) -> None:
    """Every child of every generation is measured; one that was measured before costs nothing."""

    def evaluate(children: Sequence[Genes]) -> Floats | None:
        for genes in children:
            if genes not in archive.points:
                if len(archive.points) == settings.evaluations:
                    return None
                archive.points[genes] = measure(genes)
        return numpy.array([archive.points[genes] for genes in children])

    first = list(archive.points)
    most = 20 * settings.evaluations // settings.population + 2  # where hardly a child is new
    evolve(space, first, evaluate, settings.evolution, generations=most, seed=seed)


def _linas(
    space: SearchSpace, archive: Archive, measure: Measure, settings: SearchSettings, seed: int
) -> None:
    generator = numpy_generator(seed, "children")
    while (left := settings.evaluations - len(archive.points)) > 0:
        number = min(settings.population, left)
        guess_loss, guess_cost = predictors(space, archive.points)

        def guesses(children: Sequence[Genes], loss: Ridge = guess_loss, cost: Ridge = guess_cost) -> Floats:
            features = features_of(space, children)
            return numpy.stack((loss(features), cost(features)), axis=1)

        known = list(archive.points)
        start = [known[place] for place in best_diverse(archive.values(), settings.population)]
        last = evolve(
            space,
            start,
            guesses,
            Evolution(2 * settings.population, settings.crossover, settings.mutation),
            generations=settings.generations,
            seed=derive(seed, "round", len(archive.points)),
        )
        new = [genes for genes in last if genes not in archive.points]
        chosen = [new[place] for place in best_diverse(guesses(new), number)] if new else []
        guessed = [(float(loss), float(cost)) for loss, cost in guesses(chosen)] if chosen else []
        for genes, guess in zip(chosen, guessed, strict=True):
            archive.points[genes] = measure(genes)
            archive.guessed.append((guess, archive.points[genes]))
        for genes in _unseen(space, archive, number - len(chosen), generator):
            archive.points[genes] = measure(genes)
            archive.drawn_instead += 1


METHODS: dict[str, Callable[[SearchSpace, Archive, Measure, SearchSettings, int], None]] = {
    "linas": _linas,
    "nsga2": _nsga2,
    "random": _random,
}
