"""Blocks handed out, shared and given back, against a model of plain lists."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from puna.core.errors import PunaError
from puna.model.paged import BLOCK, GONE, BlockPool, CachePolicy, OutOfBlocks, PagedSequence, blocks_of

POLICIES = (CachePolicy.full(), CachePolicy.sliding(20), CachePolicy.sink_window(3, 17))
CAPACITY = 24


class Texts(RuleBasedStateMachine):
    """Random texts that are written, cropped, forked, freed and begun from what others left.

    What a stepper would store is modelled by writing each token, with its place, into its block. Every
    text is compared with a list of its own tokens: no other text's token may ever show through.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stored = [[[None] * BLOCK for _ in range(CAPACITY)] for _ in POLICIES]
        self.pool = BlockPool(CAPACITY, self.copy, (100, 10, 1), POLICIES)
        self.texts: list[tuple[PagedSequence, list[int]]] = []

    def copy(self, source: int, target: int, group: int) -> None:
        self.stored[group][target] = list(self.stored[group][source])

    def write(self, sequence: PagedSequence, ids: list[int], new: list[int]) -> bool:
        before = [list(table) for table in sequence.tables]
        try:
            sequence.reserve(len(new))
        except OutOfBlocks:
            assert [list(table) for table in sequence.tables] == before
            return False
        for place, token in enumerate(new, start=len(ids)):
            for group, table in enumerate(sequence.tables):
                self.stored[group][table[place // BLOCK]][place % BLOCK] = (place, token)
        sequence.advance(len(new))
        ids += new
        self.pool.remember(sequence, ids)
        return True

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=70))
    def begin(self, tokens: list[int]) -> None:
        sequence = self.pool.match(tokens)
        assert sequence.length < len(tokens)
        assert sequence.length % BLOCK == 0
        ids = tokens[: sequence.length]
        self.texts.append((sequence, ids))
        if not self.write(sequence, ids, tokens[sequence.length :]):
            sequence.free()
            ids.clear()

    @rule(which=st.integers(0, 30), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=40))
    def go_on(self, which: int, tokens: list[int]) -> None:
        if self.texts:
            self.write(*self.texts[which % len(self.texts)], tokens)

    @rule(which=st.integers(0, 30), back=st.integers(0, 50))
    def crop(self, which: int, back: int) -> None:
        if self.texts:
            sequence, ids = self.texts[which % len(self.texts)]
            length = max(0, len(ids) - back)
            if sequence.can_crop(length):
                sequence.crop(length)
                del ids[length:]
            else:
                with pytest.raises(PunaError, match="let go"):
                    sequence.crop(length)

    @rule(which=st.integers(0, 30))
    def fork(self, which: int) -> None:
        if self.texts:
            sequence, ids = self.texts[which % len(self.texts)]
            self.texts.append((sequence.fork(), list(ids)))

    @rule(which=st.integers(0, 30))
    def free(self, which: int) -> None:
        if self.texts:
            self.texts.pop(which % len(self.texts))[0].free()

    @rule(which=st.integers(0, 30), tokens=st.integers(1, 40))
    def reserve(self, which: int, tokens: int) -> None:
        if self.texts:
            sequence, _ = self.texts[which % len(self.texts)]
            try:
                sequence.reserve(tokens)
            except OutOfBlocks:
                return

    @invariant()
    def every_text_holds_its_own_tokens(self) -> None:
        for sequence, ids in self.texts:
            assert sequence.length == len(ids)
            for group, policy in enumerate(POLICIES):
                sinks, first = policy.kept(len(ids))
                for place, token in enumerate(ids):
                    block = sequence.tables[group][place // BLOCK]
                    if place // BLOCK < sinks or place // BLOCK >= first:
                        assert self.stored[group][block][place % BLOCK] == (place, token)

    @invariant()
    def blocks_and_bytes_add_up(self) -> None:
        held = [
            {block for sequence, _ in self.texts for block in sequence.tables[group] if block != GONE}
            for group in range(len(POLICIES))
        ]
        assert self.pool.used == max(map(len, held))
        assert self.pool.bytes == 100 * len(held[0]) + 10 * len(held[1]) + len(held[2])
        for sequence, _ in self.texts:
            counts = [sum(block != GONE for block in table) for table in sequence.tables]
            assert sequence.bytes == 100 * counts[0] + 10 * counts[1] + counts[2]

    def teardown(self) -> None:
        for sequence, _ in self.texts:
            sequence.free()
        assert self.pool.free == CAPACITY
        assert self.pool.bytes == 0


def test_no_text_shows_in_another_whatever_is_done_with_them() -> None:
    run_state_machine_as_test(
        Texts, settings=settings(max_examples=60, stateful_step_count=25, deadline=None)
    )


def pool(blocks: int = 8, *policies: CachePolicy) -> BlockPool:
    chosen = policies or (CachePolicy(),)
    return BlockPool(blocks, lambda source, target, group: None, [7] * len(chosen), chosen)


def filled(of: BlockPool, ids: list[int]) -> PagedSequence:
    sequence = of.sequence()
    sequence.reserve(len(ids))
    sequence.advance(len(ids))
    of.remember(sequence, ids)
    return sequence


def test_room_is_found_by_letting_findable_blocks_go_the_longest_idle_first() -> None:
    shared = pool(4)
    first, second = list(range(32)), list(range(100, 132))
    filled(shared, first).free()
    filled(shared, second).free()
    assert shared.free == 4
    assert shared.match([*first, 1]).length == 32
    third = filled(shared, list(range(200, 217)))  # takes two blocks: of the first text's, the end goes first
    assert shared.match([*second, 1]).length + shared.match([*first, 1]).length == 32
    third.free()


def test_a_match_is_always_short_of_the_text() -> None:
    shared = pool()
    filled(shared, list(range(48)))
    assert [shared.match(list(range(length))).length for length in (1, 16, 17, 32, 33, 48, 49, 60)] == [
        0,
        0,
        16,
        16,
        32,
        32,
        48,
        48,
    ]


def test_equal_blocks_behind_different_beginnings_are_not_confused() -> None:
    shared = pool()
    filled(shared, [1] * 16 + [2] * 16)
    assert shared.match([3] * 16 + [2] * 16 + [5]).length == 0
    assert shared.match([1] * 16 + [3] * 16 + [5]).length == 16


def test_a_window_keeps_what_it_needs_and_its_bytes_stop_growing() -> None:
    shared = pool(100, CachePolicy.full(), CachePolicy.sink_window(5, 40))
    sequence = shared.sequence()
    held = []
    for _ in range(60):
        sequence.reserve(10)
        sequence.advance(10)
        held.append(sum(block != GONE for block in sequence.tables[1]))
    assert max(held) == max(held[-8:]) <= blocks_of(5) + blocks_of(40 + 32) + 1
    assert len(sequence.tables[0]) == blocks_of(600)
    assert sequence.tables[1][0] != GONE
    assert sequence.tables[1][1] == GONE


def test_retained_blocks_are_kept_by_name() -> None:
    shared = pool(8, CachePolicy.retained())
    sequence = filled(shared, list(range(70)))
    sequence.retain({0, 2})
    assert [block != GONE for block in sequence.blocks] == [True, False, True, False, True]
    assert sequence.bytes == 3 * 7
    assert not sequence.can_crop(20)
    assert sequence.can_crop(36)
    with pytest.raises(PunaError, match="'retained'"):
        pool().sequence().retain({0})


def test_what_a_fork_shares_is_copied_only_when_written() -> None:
    copies = []
    shared = BlockPool(8, lambda source, target, group: copies.append((source, target, group)), 7)
    first = filled(shared, list(range(20)))
    second = first.fork()
    assert (shared.used, shared.bytes, first.bytes + second.bytes) == (2, 14, 28)
    second.reserve(1)
    assert copies == [(first.blocks[1], second.blocks[1], 0)]
    assert first.blocks[0] == second.blocks[0]
    first.reserve(1)
    assert len(copies) == 1  # the first one's block is its own again


@pytest.mark.parametrize("made", [lambda: CachePolicy.sliding(0), lambda: CachePolicy.sink_window(-1, 4)])
def test_a_policy_out_of_range_is_refused(made: object) -> None:
    with pytest.raises(PunaError, match="out of range"):
        made()  # type: ignore[operator]


def test_a_crop_beyond_the_text_is_refused() -> None:
    with pytest.raises(PunaError, match="cropped to what it holds"):
        filled(pool(), [1, 2]).crop(3)
