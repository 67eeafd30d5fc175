from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.decode.sampling import Law, Sampling, draw_from, entropy_bits, make_law, penalised

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
        ("min_p", 1.0),
        ("repetition_penalty", 0.0),
        ("presence_penalty", float("nan")),
        ("frequency_penalty", float("inf")),
        ("stop", ("",)),
        ("stop_ids", (-1,)),
        ("logprobs", -1),
        ("n", 0),
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


def choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    return make_law(logits, sampling).draw(generator)


def by_hand(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The law written down from its definition, with sorting and without haste."""
    scaled = logits.double() / sampling.temperature
    law = scaled.softmax(0)  # by the logits in order: two of them may differ where their probabilities do not
    order = sorted(range(len(law)), key=lambda token: (-float(scaled[token]), token))
    kept = order[: sampling.top_k] if sampling.top_k else order
    law = torch.zeros_like(law).index_copy(0, torch.tensor(kept), law[kept]) / law[kept].sum()
    run, mass = [], 0.0
    for token in kept:
        if sampling.top_p < 1 and mass >= sampling.top_p:
            break
        run.append(token)
        mass += float(law[token])
    run = [token for token in run if law[token] >= sampling.min_p * law[run[0]]]
    return torch.zeros_like(law).index_copy(0, torch.tensor(run), law[run]) / law[run].sum()


@settings(deadline=None)
@given(logits_lists)
def test_greedy_is_the_first_of_the_largest(values: list[float]) -> None:
    logits = torch.tensor(values)
    assert values[choose(logits, Sampling(), Sampling().generator(0))] == max(values)
    law = make_law(logits, Sampling())
    assert law.probabilities.tolist() == [
        float(token == values.index(max(values))) for token in range(len(values))
    ]


@settings(deadline=None)
@example([0.0, 1.6208310385242916e-37], 1.0, 0.5, 0, 0.0)
@given(
    st.one_of(logits_lists, st.lists(st.sampled_from([0.0, 1.0, 2.5]), min_size=1, max_size=40)),
    st.floats(0.1, 3),
    st.floats(0.05, 1),
    st.integers(0, 10),
    st.sampled_from([0.0, 0.05, 0.5]),
)
def test_a_law_is_what_its_settings_say(
    values: list[float], temperature: float, top_p: float, top_k: int, min_p: float
) -> None:
    logits = torch.tensor(values)
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    found = make_law(logits, sampling).probabilities
    assert torch.isclose(found.sum(), torch.tensor(1.0, dtype=torch.float64))
    # A run may meet top_p, or a token min_p, to the last bit: then either side of the bound is right.
    allowed = [
        by_hand(logits, replace(sampling, top_p=min(1.0, top_p + over_p), min_p=max(0.0, min_p + over_min)))
        for over_p in (0.0, 1e-9, -1e-9)
        for over_min in (0.0, 1e-9, -1e-9)
    ]
    assert any(torch.allclose(found, expected, atol=1e-12) for expected in allowed)


def test_filters_look_as_far_as_they_must_in_a_large_vocabulary() -> None:
    logits = (
        torch.randn(5000, generator=torch.Generator().manual_seed(1)) * 0.1
    )  # a flat law: top-p keeps thousands
    for sampling in (
        Sampling(temperature=1.0, top_p=0.9),
        Sampling(temperature=1.0, min_p=0.5),
        Sampling(temperature=1.0, top_k=700, top_p=0.5),
        Sampling(temperature=1.0, top_p=0.02),
    ):
        found = make_law(logits, sampling).probabilities
        assert torch.allclose(found, by_hand(logits, sampling), atol=1e-12)


def test_top_p_keeps_the_shortest_run_that_reaches_it() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    for top_p, kept in ((0.4, 1), (0.6, 2), (0.9, 3), (0.97, 4)):
        law = make_law(logits, Sampling(temperature=1.0, top_p=top_p))
        assert int((law.probabilities > 0).sum()) == kept


def test_penalties_change_the_logits_of_tokens_that_were_there() -> None:
    logits = torch.tensor([2.0, -2.0, 1.0, 1.0, 0.5])
    repeated = penalised(logits, Sampling(repetition_penalty=2.0), prompt=[0, 1], ids=[2])
    assert repeated.tolist() == [1.0, -4.0, 0.5, 1.0, 0.5]
    present = penalised(
        logits, Sampling(presence_penalty=0.5, frequency_penalty=0.25), prompt=[0], ids=[2, 3, 3]
    )
    assert present.tolist() == [2.0, -2.0, 0.25, 0.0, 0.5]
    assert logits.tolist() == [2.0, -2.0, 1.0, 1.0, 0.5]


def test_entropy_is_in_bits() -> None:
    assert entropy_bits(torch.zeros(8)) == pytest.approx(3.0)
    assert entropy_bits(torch.tensor([0.0, -1e9])) == pytest.approx(0.0)


def test_weights_of_any_sum_can_be_drawn_from() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [
        draw_from(torch.tensor([0.0, 3.0, 0.0, 1.0], dtype=torch.float64), generator) for _ in range(400)
    ]
    assert set(drawn) == {1, 3}
    assert 60 < drawn.count(3) < 140
    assert Law.certain(2, 5).draw(generator) == 2


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
