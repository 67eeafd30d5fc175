"""Random draws come from seed and purpose, and from nothing else."""

import random

import numpy
import torch
from hypothesis import given
from hypothesis import strategies as st

from puna.core.seeds import derive, numpy_generator, torch_generator

purposes = st.lists(st.text(alphabet="abc", min_size=1), min_size=1, max_size=3)


@given(st.integers(), purposes)
def test_a_derived_seed_is_the_same_each_time_and_fits_in_63_bits(seed: int, purpose: list[str]) -> None:
    assert derive(seed, *purpose) == derive(seed, *purpose)
    assert 0 <= derive(seed, *purpose) < 1 << 63


@given(st.integers(), purposes)
def test_seed_and_each_part_of_the_purpose_count(seed: int, purpose: list[str]) -> None:
    others = [derive(seed + 1, *purpose), derive(seed, *purpose, "more"), derive(seed, "z", *purpose)]
    assert derive(seed, *purpose) not in others


def test_a_derived_seed_is_known_so_that_old_runs_can_be_repeated() -> None:
    assert derive(0, "train", 3) == 9010243902811717215


def test_generators_agree_with_themselves_and_leave_global_state_alone() -> None:
    states = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]
    assert numpy_generator(1, "a").random() == numpy_generator(1, "a").random()
    assert numpy_generator(1, "a").random() != numpy_generator(1, "b").random()
    draws = [torch.rand(3, generator=torch_generator(1, purpose)).tolist() for purpose in ("a", "a", "b")]
    assert draws[0] == draws[1] != draws[2]
    now = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]
    assert now == states
