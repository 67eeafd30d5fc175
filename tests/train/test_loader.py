"""The order of rows: a function of the seed, the same for any number of processes."""

from __future__ import annotations

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from little_rows import MIXED, rows

from puna.core.errors import PunaError
from puna.text.encode import Encoded
from puna.text.packing import pack
from puna.train.loader import Feed


def feed(packed: object = None, **changes: int) -> Feed:
    settings = {"batch_tokens": 64, "micro_batch_tokens": 40, "seed": 3, **changes}
    return Feed(packed or rows(MIXED), **settings)  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 32), min_size=1, max_size=40),
    batch_tokens=st.integers(32, 200),
    micro=st.integers(32, 100),
    epoch=st.integers(0, 3),
    size=st.integers(1, 4),
)
def test_every_row_is_fed_once_an_epoch_whatever_the_shares(
    lengths: list[int], batch_tokens: int, micro: int, epoch: int, size: int
) -> None:
    packed = rows(lengths)
    ranks = [
        Feed(packed, batch_tokens=batch_tokens, micro_batch_tokens=micro, seed=1, rank=rank, size=size)
        for rank in range(size)
    ]
    steps = ranks[0].steps(epoch)
    fed: list[int] = []
    for step in steps:
        assert step.tokens <= batch_tokens
        in_step = []
        for rank in ranks:
            for micro_batch in rank.micro_batches(step):
                assert micro_batch.batch.input_ids.numel() <= micro
                in_step += micro_batch.rows.tolist()
        assert sorted(in_step) == sorted(step.rows.tolist())
        assert step.targets == sum(packed[row].targets for row in in_step)
        fed += in_step
    assert sorted(fed) == list(range(len(packed)))


def test_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return numpy.concatenate([step.rows for step in feed(seed=seed).steps(epoch)]).tolist()

    assert order(3, 1) == order(3, 1)
    assert order(3, 1) != order(4, 1)
    assert order(3, 1) != order(3, 2)
    one = feed()
    one.steps(2)
    assert numpy.concatenate([step.rows for step in one.steps(1)]).tolist() == order(3, 1)


def test_longest_micro_batch_of_the_run_comes_first() -> None:
    one = feed(rows([4] * 30 + [31] + [6] * 30), micro_batch_tokens=31)
    first = next(iter(one.micro_batches(one.steps(0)[0])))
    assert first.batch.input_ids.shape == (1, 31)
    for step in one.steps(0):
        widths = [micro.batch.input_ids.shape[1] for micro in one.micro_batches(step)]
        assert widths == sorted(widths, reverse=True)


def test_a_step_without_targets_is_refused_by_name() -> None:
    """One long document with its only targets at the end: wrapped, most rows have none."""
    document = Encoded([5] * 64, [False] * 60 + [True] * 4, "row of a long prompt")
    with pytest.raises(PunaError, match="batch without targets") as error:
        feed(pack([document], 16, mode="wrap"), batch_tokens=16, micro_batch_tokens=16).steps(0)
    assert "row of a long prompt" in str(error.value)


@pytest.mark.parametrize("name", ["batch_tokens", "micro_batch_tokens"])
def test_a_row_that_does_not_fit_is_refused(name: str) -> None:
    with pytest.raises(PunaError, match=name) as error:
        feed(**{name: 20})
    assert "at least 32" in str(error.value)


def test_count_ends_at_each_limit() -> None:
    one = feed()
    epoch = len(one.steps(0))
    assert one.count(epochs=1) == (epoch, sum(MIXED))
    assert one.count(epochs=3)[1] == 3 * sum(MIXED)
    assert one.count(max_steps=epoch + 2)[0] == epoch + 2
    steps, tokens = one.count(max_tokens=300)
    assert tokens >= 300 > tokens - 64
    assert one.count(max_steps=steps)[1] == tokens


# Recorded when an epoch was a permutation and there were no mixtures.
FORMER = {
    "off": [
        [[13, 3, 11], [9, 15, 8, 6, 14], [7, 0, 12, 5], [4, 10, 1], [2]],
        [[4, 7, 9], [15, 6, 3, 8, 2], [5, 12, 11], [10, 0, 1, 14], [13]],
    ],
    "wrap": [[[4, 1], [3, 6], [5, 0], [7, 2]], [[5, 3], [0, 1], [7, 2], [6, 4]]],
}


@pytest.mark.parametrize(("mode", "seed"), [("off", 3), ("wrap", 1)])
def test_without_a_mixture_the_steps_are_those_of_before(mode: str, seed: int) -> None:
    one = feed(rows(MIXED, mode=mode), seed=seed)
    assert [[step.rows.tolist() for step in one.steps(epoch)] for epoch in (0, 1)] == FORMER[mode]


def test_sorted_rows_come_as_they_are_in_every_epoch() -> None:
    one = feed(shuffled=False)
    for epoch in (0, 1):
        assert numpy.concatenate([step.rows for step in one.steps(epoch)]).tolist() == list(range(16))


def test_uses_count_up_to_the_middle_of_an_epoch() -> None:
    one = feed()
    assert one.uses(0, 0).tolist() == [0] * 16
    assert one.uses(2, 0).tolist() == [2] * 16
    found = one.uses(1, 2)
    assert sorted(numpy.flatnonzero(found == 2)) == sorted(
        int(row) for step in one.steps(1)[:2] for row in step.rows
    )
