from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.decode.sampling import Sampling, choose, distribution

logits_lists = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=30)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("stop", ("",)),
    ],
)
def test_a_setting_out_of_range_is_named_with_what_was_expected(name: str, value: Any) -> None:
    with pytest.raises(PunaError) as caught:
        Sampling(**{name: value})
    assert name in str(caught.value)
    assert "expected:" in str(caught.value)


def test_one_stop_string_means_a_tuple_of_one() -> None:
    assert Sampling(stop="\n").stop == ("\n",)  # type: ignore[arg-type]
    assert Sampling(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]


@settings(deadline=None)
@given(logits_lists)
def test_greedy_is_the_first_of_the_largest(values: list[float]) -> None:
    logits = torch.tensor(values)
    assert values[choose(logits, Sampling(), Sampling().generator(0))] == max(values)


@settings(deadline=None)
@given(logits_lists, st.floats(0.1, 3), st.floats(0.05, 1), st.integers(0, 10))
def test_filters_keep_the_likeliest_and_a_proper_distribution(
    values: list[float], temperature: float, top_p: float, top_k: int
) -> None:
    logits = torch.tensor(values)
    probabilities, ids = distribution(logits, Sampling(temperature=temperature, top_p=top_p, top_k=top_k))
    assert len(set(ids.tolist())) == len(ids)
    assert torch.isclose(probabilities.sum(), torch.tensor(1.0, dtype=torch.float64))
    assert (probabilities.diff() <= 1e-12).all()
    if top_k:
        assert len(ids) <= top_k
    excluded = set(range(len(values))) - set(ids.tolist())
    assert all(values[id] <= logits[ids].min() for id in excluded)


def test_top_p_keeps_the_shortest_run_that_reaches_it() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    for top_p, kept in ((0.4, 1), (0.6, 2), (0.9, 3), (0.97, 4)):
        assert len(distribution(logits, Sampling(temperature=1.0, top_p=top_p))[1]) == kept


def test_draws_follow_the_distribution_at_the_temperature() -> None:
    logits = torch.tensor([0.1, 0.4, 0.5]).log()
    sampling = Sampling(temperature=0.5, seed=3)
    generator = sampling.generator(0)
    drawn = (
        torch.bincount(torch.tensor([choose(logits, sampling, generator) for _ in range(4000)]), minlength=3)
        / 4000
    )
    expected = torch.tensor([0.01, 0.16, 0.25]) / 0.42
    assert (drawn - expected).abs().max() < 0.03


def test_a_request_draws_the_same_for_the_same_seed_and_index_only() -> None:
    logits = torch.zeros(1000)

    def draw(seed: int, index: int) -> list[int]:
        sampling = Sampling(temperature=1.0, seed=seed)
        generator = sampling.generator(index)
        return [choose(logits, sampling, generator) for _ in range(5)]

    assert draw(0, 0) == draw(0, 0)
    assert draw(0, 0) != draw(0, 1)
    assert draw(0, 0) != draw(1, 0)


def test_a_device_without_float64_draws_the_same(
    without_float64: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    with pytest.raises(TypeError, match="no float64"):
        without_float64(logits).double()
    for sampling in (Sampling(), Sampling(temperature=0.7, top_k=20, top_p=0.9, seed=3)):
        there = choose(without_float64(logits), sampling, sampling.generator(0))
        assert there == choose(logits, sampling, sampling.generator(0))
