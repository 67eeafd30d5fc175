"""Who writes the next token: entropy in bits, the window, the stay, the baseline's share."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.decode.routers import EntropyRouter, RandomRouter
from puna.decode.sampling import entropy_bits


def route(
    router: EntropyRouter | RandomRouter, entropies: list[float], start: Literal["small", "large"] = "small"
) -> str:
    """Who wrote each of the tokens whose distributions had these entropies: s or l, in order."""
    written, active = "", start
    for entropy in entropies:
        written += active[0]
        active = router.choose(entropy, active)
    return written


def test_entropy_is_in_bits_of_raw_logits() -> None:
    assert entropy_bits(torch.zeros(8)) == pytest.approx(3)
    assert entropy_bits(torch.tensor([0.0, -math.inf, -math.inf])) == 0
    quarters = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert entropy_bits(torch.tensor([0.0, math.log(3), -math.inf])) == pytest.approx(quarters)


def test_the_large_model_writes_while_the_mean_of_the_window_is_above_the_threshold() -> None:
    router = EntropyRouter(1.0, window=2, minimum_stay=1)
    #                             mean: 0    0.5  1.25            then the large one's own
    assert route(router, [0.0, 1.0, 1.5, 0.5, 0.9, 0.9]) == "ssslss"


def test_the_window_starts_empty_after_a_switch() -> None:
    # The three bits that made the small model leave are not held against the large one: its first
    # token is certain, so it leaves at once.
    router = EntropyRouter(1.0, window=5, minimum_stay=1)
    assert route(router, [0.0, 0.0, 9.0, 0.0, 0.0]) == "sssls"


def test_nobody_leaves_before_the_minimum_stay() -> None:
    router = EntropyRouter(1.0, window=1, minimum_stay=3)
    assert route(router, [9.0, 9.0, 9.0, 0.0, 0.0, 0.0, 9.0]) == "sssllls"


@given(st.lists(st.floats(0, 16), min_size=1, max_size=60), st.integers(1, 6), st.integers(1, 8))
def test_infinite_and_negative_thresholds_never_leave_their_model(
    entropies: list[float], window: int, stay: int
) -> None:
    small = EntropyRouter(math.inf, window=window, minimum_stay=stay)
    assert set(route(small, entropies)) == {"s"}
    large = EntropyRouter(-1.0, window=window, minimum_stay=stay)
    assert set(route(large, entropies, "large")) == {"l"}


@given(st.lists(st.floats(0, 4), min_size=1, max_size=80), st.integers(1, 8), st.floats(0, 4))
def test_every_run_but_the_last_is_at_least_the_minimum_stay(
    entropies: list[float], stay: int, threshold: float
) -> None:
    written = route(EntropyRouter(threshold, window=3, minimum_stay=stay), entropies)
    runs = [len(run) for run in written.replace("sl", "s l").replace("ls", "l s").split()]
    assert all(run >= stay for run in runs[:-1])


def test_each_model_may_have_its_own_threshold() -> None:
    router = EntropyRouter(1.0, threshold_large=0.2, window=1, minimum_stay=1)
    assert route(router, [2.0, 0.5, 0.5, 0.1, 0.5]) == "sllls"


def test_the_baseline_has_its_share_and_the_same_shortest_stay() -> None:
    router = RandomRouter(0.4, torch.Generator().manual_seed(0), minimum_stay=5)
    written = route(router, [0.0] * 20_000)
    assert written.count("l") / len(written) == pytest.approx(0.4, abs=0.02)
    assert all(len(set(written[start : start + 5])) == 1 for start in range(0, len(written), 5))


@pytest.mark.parametrize(("share", "wrote"), [(0.0, "s"), (1.0, "l")])
def test_the_baseline_at_its_ends_is_one_model(share: float, wrote: str) -> None:
    router = RandomRouter(share, torch.Generator(), minimum_stay=3)
    assert set(route(router, [9.0] * 50, "small" if share == 0 else "large")) == {wrote}


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(PunaError, match="minimum_stay"):
        EntropyRouter(1.0, minimum_stay=0)
    with pytest.raises(PunaError, match="window 0"):
        EntropyRouter(1.0, window=0)
    with pytest.raises(PunaError, match="share"):
        RandomRouter(1.2, torch.Generator())
