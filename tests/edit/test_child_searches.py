"""Searches over children: budgets, fronts, volumes, predictors, and what a search is worth."""

from __future__ import annotations

import random
import sys

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.core.seeds import numpy_generator
from puna.edit.searching import search as searches
from puna.edit.searching.evolve import best_diverse, front_of, hypervolume
from puna.edit.searching.predictors import PENALTIES, Ridge, rank_correlation
from puna.edit.searching.search import METHODS, SearchSettings, predictors, search
from puna.model.search_space import Genes, SearchSpace
from puna.model.spec import BlockSpec, LlamaSpec

pytest.importorskip("pymoo")
BLOCK = BlockSpec(heads=4, kv_heads=2, head_dim=8, width=48)
SPACE = SearchSpace.of(LlamaSpec(120, 32, (BLOCK,) * 8, tied=True), (8, 7, 6, 5), (1.0, 0.75, 0.5, 0.25))
SETTINGS = SearchSettings(100, 25, 60, mutation=0.1)
POINTS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=12)


class Planted:
    """Losses that add up over layers, bent; costs that are channels and layers. Counts what is measured."""

    def __init__(self, seed: int) -> None:
        generator = numpy_generator(seed, "planted")
        self.narrow, self.gone = generator.gamma(1, 1, 8), generator.gamma(2, 1, 8)
        self.measured: list[Genes] = []

    def __call__(self, genes: Genes) -> tuple[float, float]:
        self.measured.append(genes)
        there = set(SPACE.layers(genes))
        lost = [
            self.narrow[layer] * (genes[1 + layer] / 4) ** 2 if layer in there else self.gone[layer]
            for layer in range(8)
        ]
        cost = sum(1.0 + SPACE.widths[layer][genes[1 + layer]] / 24 for layer in there)
        return float(sum(lost) + 0.05 * sum(lost) ** 2), cost

    @property
    def reference(self) -> tuple[float, float]:
        return Planted.__call__(self, SPACE.smallest)[0], Planted.__call__(self, SPACE.whole)[1]


def volume(method: str, seed: int) -> float:
    planted = Planted(seed)
    archive = search(method, SPACE, planted, SETTINGS, seed=seed)
    return hypervolume(archive.values(), planted.reference)


@pytest.mark.parametrize("method", [*METHODS])
def test_a_search_measures_so_many_different_children_and_no_more(method: str) -> None:
    planted = Planted(0)
    archive = search(method, SPACE, planted, SETTINGS, seed=5)
    assert len(planted.measured) == len({*planted.measured}) == len(archive.points) == 100
    assert all(SPACE.canonical(genes) == genes for genes in archive.points)
    again = search(method, SPACE, Planted(0), SETTINGS, seed=5)
    assert list(again.points) == list(archive.points)
    assert list(search(method, SPACE, Planted(0), SETTINGS, seed=6).points) != list(archive.points)


def test_all_searches_begin_with_the_same_children() -> None:
    firsts = [list(search(name, SPACE, Planted(0), SETTINGS, seed=1).points)[:25] for name in METHODS]
    assert firsts[0] == firsts[1] == firsts[2]


def test_a_search_leaves_global_generators_alone() -> None:
    random.seed(3)
    numpy.random.seed(3)
    before = (random.getstate(), numpy.random.get_state()[1].tolist())
    search("linas", SPACE, Planted(0), SearchSettings(20, 10, 5), seed=1)
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == before


def test_linas_finds_more_than_random_search_and_plain_evolution_with_one_budget() -> None:
    gains = []
    for seed in range(2):
        linas = volume("linas", seed)
        gains.append((linas / volume("random", seed), linas / volume("nsga2", seed)))
    assert min(gain for pair in gains for gain in pair) > 1.01
    assert numpy.mean([pair[0] for pair in gains]) > 1.03


def test_the_predictors_of_a_round_have_not_seen_what_they_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    planted, seen = Planted(2), []
    real = searches.predictors

    def noted(space: SearchSpace, points: dict[Genes, tuple[float, float]]) -> tuple[Ridge, Ridge]:
        seen.append((len(points), len(planted.measured)))
        return real(space, points)

    monkeypatch.setattr(searches, "predictors", noted)
    archive = search("linas", SPACE, planted, SETTINGS, seed=2)
    assert seen == [(25, 25), (50, 50), (75, 75)]
    assert len(archive.guessed) + archive.drawn_instead == 75
    losses = [(guess[0], real_[0]) for guess, real_ in archive.guessed]
    assert rank_correlation(*zip(*losses, strict=True)) > 0.8
    known = set(list(archive.points)[:25])
    assert not known & set(list(archive.points)[25:])


def test_genes_of_layers_that_are_not_there_mislead_no_predictor() -> None:
    """Children spelt in another way are guessed alike."""
    planted = Planted(1)
    archive = search("random", SPACE, planted, SearchSettings(60, 20), seed=0)
    loss, _ = predictors(SPACE, archive.points)
    gone = next(layer for layer in range(8) if layer not in SPACE.layers(SPACE.smallest))
    other = [*SPACE.smallest]
    other[1 + gone] = 2
    one, two = (numpy.array([SPACE.one_hot(genes)]) for genes in (SPACE.smallest, other))
    assert loss(one)[0] == loss(two)[0]


@pytest.mark.parametrize(("evaluations", "population"), [(200_000, 50), (10, 20)])
def test_budgets_that_cannot_be_are_refused(evaluations: int, population: int) -> None:
    with pytest.raises(PunaError, match="measures at least one population"):
        search("random", SPACE, Planted(0), SearchSettings(evaluations, population), seed=0)
    with pytest.raises(PunaError, match="search"):
        search("annealing", SPACE, Planted(0), SETTINGS, seed=0)


def test_without_pymoo_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymoo.algorithms.moo.nsga2", None)
    with pytest.raises(PunaError, match=r"puna\[search\]"):
        search("linas", SPACE, Planted(0), SETTINGS, seed=0)
    assert len(search("random", SPACE, Planted(0), SETTINGS, seed=0).points) == 100


@given(POINTS)
def test_the_volume_is_that_of_pymoo_and_grows_with_what_is_added(points: list[tuple[int, int]]) -> None:
    from pymoo.indicators.hv import HV

    found = hypervolume(points, (10, 10))
    assert found == pytest.approx(float(HV(ref_point=numpy.array([10.0, 10.0]))(numpy.array(points, float))))
    assert hypervolume([*points, (0, 0)], (10, 10)) == 100
    assert hypervolume(points[:1], (10, 10)) <= found


@given(POINTS)
def test_a_front_is_what_nothing_else_is_better_than(points: list[tuple[int, int]]) -> None:
    front = [points[place] for place in front_of(points)]
    assert [cost for _, cost in front] == sorted({cost for _, cost in front})

    def beaten(point: tuple[int, int]) -> bool:
        return any(other[0] <= point[0] and other[1] <= point[1] and other != point for other in points)

    assert set(front) == {point for point in points if not beaten(point)}


def test_the_best_and_most_diverse_come_front_by_front_ends_first() -> None:
    points = numpy.array([(0.0, 4.0), (1.0, 3.0), (1.2, 2.8), (4.0, 0.0), (5.0, 5.0)])
    assert {*best_diverse(points, 2)} == {0, 3}
    assert {*best_diverse(points, 4)} == {0, 1, 2, 3}
    assert best_diverse(points, 5)[-1] == 4


def test_ridge_is_the_closed_form_and_its_penalty_that_of_leaving_one_out() -> None:
    generator = numpy_generator(0, "ridge")
    features = generator.integers(0, 2, (30, 6)).astype(float)
    values = features @ generator.normal(size=6) + 2 + 0.3 * generator.normal(size=30)

    def fitted(rows: numpy.ndarray, wanted: numpy.ndarray, penalty: float) -> Ridge:
        return Ridge.fit(rows, wanted, [penalty])

    centred = features - features.mean(0)
    exact = numpy.linalg.solve(centred.T @ centred + 0.1 * numpy.eye(6), centred.T @ (values - values.mean()))
    numpy.testing.assert_allclose(fitted(features, values, 0.1).weights, exact)
    errors = {}
    for penalty in PENALTIES:
        missed = []
        for row in range(30):
            rest = numpy.arange(30) != row
            one = fitted(features[rest], values[rest], penalty)
            missed.append(one(features[row : row + 1])[0] - values[row])
        errors[penalty] = numpy.square(missed).mean()
    assert Ridge.fit(features, values).penalty == min(errors, key=lambda penalty: errors[penalty])


@given(st.lists(st.integers(0, 6), min_size=3, max_size=20), st.integers(0, 99))
def test_the_rank_correlation_is_that_of_scipy(values: list[int], seed: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    other = numpy_generator(seed, "other").integers(0, 6, len(values))
    if len({*values}) > 1 and len({*other.tolist()}) > 1:
        assert rank_correlation(values, other) == pytest.approx(stats.spearmanr(values, other).statistic)
    assert rank_correlation(values, [1.0] * len(values)) == 0
