"""Schedules by their values."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.train.schedule import Part, Schedule, compose, factor, preset

KINDS = ["constant", "cosine", "linear", "inverse_sqrt", "step", "wsd"]


def values(schedule: Schedule) -> list[float]:
    return [factor(step, schedule) for step in range(schedule.total_steps)]


def test_constant_stays() -> None:
    assert values(preset("constant", 4)) == [1.0] * 4


def test_warm_up_rises_in_equal_steps_and_ends_at_one() -> None:
    assert values(preset("constant", 6, warmup_steps=4)) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_falls_in_equal_steps_to_its_minimum() -> None:
    assert values(preset("linear", 4)) == [1.0, 0.75, 0.5, 0.25]
    assert values(preset("linear", 4, minimum=0.2)) == pytest.approx([1.0, 0.8, 0.6, 0.4])
    assert factor(4, preset("linear", 4, minimum=0.2)) == pytest.approx(0.2)


def test_linear_falls_from_the_end_of_the_warm_up() -> None:
    assert values(preset("linear", 6, warmup_steps=2)) == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_cosine_passes_through_its_quarter_points() -> None:
    schedule = preset("cosine", 8, minimum=0.1)
    assert factor(0, schedule) == 1.0
    assert factor(4, schedule) == pytest.approx(0.55)
    assert factor(2, schedule) == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    assert factor(8, schedule) == pytest.approx(0.1)
    assert factor(100, schedule) == pytest.approx(0.1)


def test_inverse_sqrt_halves_after_three_timescales() -> None:
    schedule = preset("inverse_sqrt", 1000, warmup_steps=10, timescale=100)
    assert factor(10, schedule) == 1.0
    assert factor(110, schedule) == pytest.approx(math.sqrt(0.5))
    assert factor(310, schedule) == pytest.approx(0.5)


def test_step_is_that_of_torch() -> None:
    """The settings of ChocoLlama: times 0.85 every 6212 steps."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=6212, gamma=0.85)
    schedule = preset("step", 20_000, step_size=6212, gamma=0.85)
    for step in range(20_000):
        if step % 997 == 0 or step % 6212 < 2:
            assert factor(step, schedule) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


def test_wsd_is_flat_and_then_falls_as_one_minus_square_root() -> None:
    schedule = preset("wsd", 100, warmup_steps=10, decay_ratio=0.2)
    assert factor(4, schedule) == 0.5
    assert {factor(step, schedule) for step in range(10, 81)} == {1.0}
    assert factor(85, schedule) == pytest.approx(0.5)
    assert factor(100, schedule) == 0.0
    assert factor(85, preset("wsd", 100, decay_ratio=0.2, minimum=0.5)) == pytest.approx(0.75)


@given(
    kind=st.sampled_from(KINDS),
    total=st.integers(1, 200),
    warmup=st.integers(0, 250),
    minimum=st.floats(0, 1),
    step=st.integers(0, 400),
)
def test_factor_stays_within_zero_and_one_and_never_starts_at_zero(
    kind: str, total: int, warmup: int, minimum: float, step: int
) -> None:
    schedule = preset(kind, total, warmup, minimum, step_size=7, gamma=0.9, decay_ratio=0.3)  # type: ignore[arg-type]
    assert 0.0 <= factor(step, schedule) <= 1.0
    assert factor(0, schedule) > 0.0


@given(kind=st.sampled_from(KINDS), total=st.integers(2, 200), minimum=st.floats(0, 1))
def test_factor_never_rises_after_the_warm_up(kind: str, total: int, minimum: float) -> None:
    schedule = preset(kind, total, 0, minimum, step_size=7, gamma=0.9, decay_ratio=0.3)  # type: ignore[arg-type]
    found = values(schedule)
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(found))


def former_factor(step: int, kind: str, total: int, warmup: int, minimum: float, decay_ratio: float) -> float:
    """The factors as one formula per name, before they were segments: what existing recipes rely on."""

    def progress(done: int, steps: int) -> float:
        return min(1.0, max(0.0, done / steps)) if steps > 0 else 1.0

    def between(share: float) -> float:
        return minimum + (1 - minimum) * share

    if step < warmup:
        return (step + 1) / warmup
    after = step - warmup
    match kind:
        case "constant":
            return 1.0
        case "cosine":
            return between(0.5 * (1 + math.cos(math.pi * progress(after, total - warmup))))
        case "linear":
            return between(1 - progress(after, total - warmup))
        case "inverse_sqrt":
            return math.sqrt(50 / (50 + after))
        case "step":
            return float(0.9 ** (after // 7))
        case _:
            decay_steps = max(1, round(decay_ratio * total))
            return between(1 - math.sqrt(progress(step - (total - decay_steps), decay_steps)))


@pytest.mark.parametrize("kind", KINDS)
def test_names_give_the_factors_they_always_gave_to_the_bit(kind: str) -> None:
    """Warm-ups that reach into the decay or beyond the run's end are among them."""
    for total, warmup, minimum, ratio in itertools.product(
        (1, 2, 17, 100), (0, 1, 5, 60, 120), (0.0, 0.1, 1 / 3, 0.9, 1.0), (0.05, 0.3, 1.0)
    ):
        schedule = preset(
            kind,  # type: ignore[arg-type]
            total,
            warmup,
            minimum,
            timescale=50,
            step_size=7,
            gamma=0.9,
            decay_ratio=ratio,
        )
        for step in range(total + 30):
            expected = former_factor(step, kind, total, warmup, minimum, ratio)
            assert factor(step, schedule) == expected, (total, warmup, minimum, ratio, step)


def test_segments_follow_each_other_and_go_on_where_the_one_before_ended() -> None:
    schedule = compose(
        [Part("warmup", 2), Part("constant", 2), Part("linear", 4, end=0.2), Part("cosine", "rest", end=0.1)],
        10,
    )
    assert values(schedule) == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.15])
    assert factor(10, schedule) == pytest.approx(0.1)


def test_a_rate_can_be_warmed_up_again() -> None:
    """Crystal: one line over two phases, and a third that warms up again to a lower peak."""
    schedule = compose(
        [Part("linear", 4, end=0.5), Part("warmup", 2, start=0.0, end=0.25), Part("linear", 2)], 8
    )
    assert values(schedule) == [1.0, 0.875, 0.75, 0.625, 0.125, 0.25, 0.25, 0.125]


@given(
    shares=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    total=st.integers(30, 500),
)
def test_shares_that_add_up_to_one_cover_the_run_exactly(shares: list[int], total: int) -> None:
    parts = [Part("constant", share / sum(shares), start=float(n)) for n, share in enumerate(shares)]
    schedule = compose(parts, total)
    assert sum(segment.steps for segment in schedule.segments) == total
    counts = [values(schedule).count(float(n)) for n in range(len(shares))]
    for count, share in zip(counts, shares, strict=True):
        assert abs(count - total * share / sum(shares)) <= 1.0001


def test_one_segment_is_what_its_name_is() -> None:
    for kind in ("linear", "cosine", "constant"):
        assert values(compose([Part(kind, 1.0)], 9)) == values(preset(kind, 9))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "parts", [[Part("constant", 5)], [Part("constant", 11)], [Part("constant", 11), Part("linear", "rest")]]
)
def test_segments_that_do_not_cover_the_run_are_refused(parts: list[Part]) -> None:
    with pytest.raises(PunaError, match="do not cover the run") as error:
        compose(parts, 10)
    assert "10 steps" in str(error.value) and "rest" in str(error.value)
