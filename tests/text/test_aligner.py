import random
from itertools import pairwise

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.text.aligner import SYMMETRISATIONS, Symmetrisation, _digamma, align

Links = set[tuple[int, int]]
WORDS = [f"w{index}" for index in range(80)]
sentences = st.lists(st.sampled_from(WORDS[:12]), max_size=7)


def _sets(found: list[numpy.ndarray]) -> list[Links]:
    return [{(int(left), int(right)) for left, right in links} for links in found]


def _invented_language(
    count: int, seed: int, *, added: float = 0.0, swapped: float = 0.3
) -> tuple[list[tuple[list[str], list[str]]], list[Links]]:
    """Sentences and their word-by-word translations with neighbours swapped and words added in between."""
    draw = random.Random(seed)
    pairs, truth = [], []
    for _ in range(count):
        source = [draw.choice(WORDS) for _ in range(draw.randint(3, 12))]
        order = list(range(len(source)))
        for left, right in pairwise(range(len(order))):
            if draw.random() < swapped:
                order[left], order[right] = order[right], order[left]
        target: list[str] = []
        links: Links = set()
        for place in order:
            if draw.random() < added:
                target.append(draw.choice(["eh", "uh"]))
            links.add((place, len(target)))
            target.append(source[place].upper())
        pairs.append((source, target))
        truth.append(links)
    return pairs, truth


def _precision_and_recall(found: list[Links], truth: list[Links]) -> tuple[float, float]:
    right = sum(len(a & b) for a, b in zip(found, truth, strict=True))
    return right / sum(map(len, found)), right / sum(map(len, truth))


@pytest.mark.parametrize("symmetrisation", SYMMETRISATIONS)
def test_a_known_alignment_is_found_again(symmetrisation: Symmetrisation) -> None:
    pairs, truth = _invented_language(400, seed=1)
    precision, recall = _precision_and_recall(_sets(align(pairs, symmetrisation=symmetrisation)), truth)
    assert precision > 0.97
    assert recall > 0.97


def test_words_that_translate_nothing_stay_unaligned() -> None:
    pairs, truth = _invented_language(400, seed=2, added=0.2)
    found = _sets(align(pairs, symmetrisation="intersection"))
    precision, recall = _precision_and_recall(found, truth)
    assert precision > 0.97
    assert recall > 0.95


def test_in_one_language_each_word_aligns_with_itself() -> None:
    pairs, _ = _invented_language(300, seed=3)
    for (source, _), links in zip(pairs, _sets(align([(s, s) for s, _ in pairs])), strict=True):
        assert all(source[left] == source[right] for left, right in links)
        assert {right for _, right in links} == set(range(len(source)))


def test_the_same_word_twice_aligns_in_order() -> None:
    pairs, _ = _invented_language(300, seed=4, swapped=0.0)
    twice = (["w1", "w2", "w3", "w4", "w1"], ["W1", "W2", "W3", "W4", "W1"])
    assert _sets(align([*pairs, twice]))[-1] == {(place, place) for place in range(5)}


@settings(deadline=None, max_examples=40)
@given(pairs=st.lists(st.tuples(sentences, sentences), max_size=12))
def test_links_are_places_of_the_pair_and_joins_lie_within_each_other(
    pairs: list[tuple[list[str], list[str]]],
) -> None:
    found = {name: _sets(align(pairs, iterations=2, symmetrisation=name)) for name in SYMMETRISATIONS}
    for index, (source, target) in enumerate(pairs):
        inner, outer = found["intersection"][index], found["union"][index]
        assert inner <= found["grow-diag-final-and"][index] <= outer
        assert outer <= {(left, right) for left in range(len(source)) for right in range(len(target))}


def test_no_pairs_and_empty_sides_have_no_links() -> None:
    assert align([]) == []
    found = align([([], ["a"]), (["b"], []), (["b"], ["a"])])
    assert [links.shape for links in found] == [(0, 2), (0, 2), (1, 2)]


def test_the_same_pairs_give_the_same_links() -> None:
    pairs, _ = _invented_language(100, seed=5, added=0.1)
    assert _sets(align(pairs)) == _sets(align(pairs))


def test_an_unknown_symmetrisation_and_no_iterations_are_refused() -> None:
    with pytest.raises(PunaError, match="did you mean 'intersection'"):
        align([], symmetrisation="intersect")  # type: ignore[arg-type]
    with pytest.raises(PunaError, match="at least one iteration"):
        align([], iterations=0)


def test_digamma_has_its_known_values() -> None:
    # psi(1) = -gamma, psi(1/2) = -gamma - 2 ln 2, psi(x + 1) = psi(x) + 1/x
    gamma = 0.5772156649015329
    known = [-gamma, -gamma - 2 * numpy.log(2), -gamma + 1]
    assert _digamma(numpy.array([1.0, 0.5, 2.0])) == pytest.approx(known, abs=1e-8)
    assert _digamma(numpy.array([0.01])) == pytest.approx([_digamma(numpy.array([1.01]))[0] - 100], abs=1e-8)
