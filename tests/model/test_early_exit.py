"""Tokens that leave the decoder early: what they get, what waits, and what the text is worth afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from puna.core.errors import PunaError
from puna.edit.shorten import shorten
from puna.model.early_exit import EarlyExit
from puna.model.feed_forward_skip import FeedForwardSkip
from puna.model.llama import Llama
from puna.model.native.stepper import NativeStepper
from puna.model.paged import BLOCK, PagedSequence
from puna.model.plain_stepper import PlainStepper
from puna.model.spec import BlockSpec, LlamaSpec
from puna.model.stepper import Read
from tests.model.native_models import BLOCK as LAYER
from tests.model.native_models import hidden_of, ids_of, little

LINEAR = BlockSpec(attention="linear", feed_forward="linear")
LAYERS = (LAYER, LAYER, BlockSpec(attention="none", width=30), LAYER, LINEAR, LAYER)
SPEC = LlamaSpec(320, 48, LAYERS, tied=True)
ALWAYS = EarlyExit((2, 4), (1.0, 0.0))  # every token that may leaves behind four layers


def steppers(**settings: Any) -> list[Any]:
    return [
        NativeStepper(little(SPEC), cache_tokens=1000, **settings),
        PlainStepper(little(SPEC).double(), cache_tokens=1000, **settings),
    ]


@pytest.fixture(scope="module", params=["native", "plain"])
def stepper(request: pytest.FixtureRequest) -> Any:
    return steppers()[("native", "plain").index(request.param)]


def same(stepper: Any, one: Tensor, other: Tensor) -> bool:
    """Native steppers give the same bits however a text is read, plain ones are equal to rounding.

    Their norms compute in float32, whatever the weights are in.
    """
    if stepper.name == "native":
        return torch.equal(one, other)
    return torch.allclose(one, other, atol=1e-5)


def read_on(stepper: Any, sequence: PagedSequence, ids: Sequence[int], exits: EarlyExit | None) -> Any:
    """The tokens one by one: their states [hidden] and depths."""
    states, depths = [], []
    for token in ids:
        (state,) = stepper.step([Read(sequence, [token], 1, exits=exits)])
        states.append(state[0])
        depths.append(stepper.depths[0])
    return states, depths


def model_of(stepper: Any) -> Llama:
    model = little(SPEC)
    return model if stepper.name == "native" else model.double()


def states_at(stepper: Any, ids: Sequence[int], depth: int) -> Tensor:
    """States [time, hidden] of the checkpoint that has the first ``depth`` layers alone."""
    short = shorten(model_of(stepper), range(depth)) if depth < len(LAYERS) else model_of(stepper)
    return hidden_of(type(stepper)(short, cache_tokens=200), ids, [len(ids)])


@given(st.lists(st.floats(0, 0.05), min_size=2, max_size=2), st.integers(0, 100))
def test_a_token_gets_the_state_of_the_checkpoint_that_ends_where_it_left(
    stepper: Any, thresholds: list[float], seed: int
) -> None:
    ids = ids_of(SPEC, 40, seed)
    sequence = stepper.sequence()
    stepper.step([Read(sequence, ids[:5], 0)])
    states, depths = read_on(stepper, sequence, ids[5:], EarlyExit((2, 4), tuple(thresholds)))
    wanted = {depth: states_at(stepper, ids, depth) for depth in set(depths)}
    for place, (state, depth) in enumerate(zip(states, depths, strict=True)):
        assert same(stepper, state, wanted[depth][5 + place])
    # and what follows is read as if all had gone through every layer
    (rest,) = stepper.step([Read(sequence, ids_of(SPEC, 7, seed + 1), 7)])
    full = states_at(stepper, [*ids, *ids_of(SPEC, 7, seed + 1)], len(LAYERS))
    assert same(stepper, rest, full[-7:])
    assert not sequence.waiting and sequence.settled == sequence.length == 47
    sequence.free()


def test_thresholds_decide_where_a_token_leaves(stepper: Any) -> None:
    ids = ids_of(SPEC, 12)
    depths = {}
    for name, thresholds in {"first": (0.0, 0.0), "second": (1.0, 0.0), "never": (1.0, 2.0)}.items():
        sequence = stepper.sequence()
        _, depths[name] = read_on(stepper, sequence, ids, EarlyExit((2, 4), thresholds))
        sequence.free()
    assert depths == {"first": [2] * 12, "second": [4] * 12, "never": [6] * 12}


def test_an_exit_asks_for_the_probability_of_the_likeliest_token(stepper: Any) -> None:
    ids = ids_of(SPEC, 12)
    states = states_at(stepper, ids, 4)
    certain = stepper.logits(states[-1:]).softmax(-1).amax().item()
    for threshold, depth in ((certain * 0.999, 4), (certain * 1.001, 6)):
        sequence = stepper.sequence()
        stepper.step([Read(sequence, ids[:-1], 0)])
        _, depths = read_on(stepper, sequence, ids[-1:], EarlyExit((4,), (threshold,)))
        assert depths == [depth]
        known = stepper.ready[0]
        assert (known is not None) == (depth == 4)
        if known is not None:
            assert same(stepper, known, stepper.logits(states[-1:]))
        sequence.free()


def test_never_more_than_fifteen_tokens_wait(stepper: Any) -> None:
    ids = ids_of(SPEC, 3 * BLOCK + 5)
    sequence = stepper.sequence()
    waiting = []
    for token in ids:
        stepper.step([Read(sequence, [token], 1, exits=ALWAYS)])
        waiting.append(sequence.length - sequence.settled)
    assert waiting == [(place + 1) % BLOCK for place in range(len(ids))]
    sequence.free()


def test_a_text_with_waiting_rows_is_cropped_and_forked_like_any_other(stepper: Any) -> None:
    ids = ids_of(SPEC, 30)
    full = states_at(stepper, [*ids[:27], 9], len(LAYERS))[-1]
    sequence = stepper.sequence()
    stepper.step([Read(sequence, ids[:20], 0)])
    for token in ids[20:24]:
        stepper.step([Read(sequence, [token], 1, exits=EarlyExit((2, 4), (1.0, 0.0)))])
    for token in ids[24:]:
        stepper.step([Read(sequence, [token], 1, exits=EarlyExit((2, 4), (0.0, 0.0)))])
    other = sequence.fork()
    sequence.crop(27)
    assert sorted((layer, len(rows)) for layer, rows in sequence.waiting.items()) == [(2, 3), (4, 4)]
    for one, length in ((other, 30), (sequence, 27)):
        assert one.settled == 20 and one.length == length
        one.crop(27)
        (state,) = stepper.step([Read(one, [9], 1)])
        assert same(stepper, state[0], full)
    sequence.crop(22)
    sequence.free(), other.free()
    assert stepper.pool.used == 0


def test_a_crop_below_what_waits_leaves_nothing_waiting(stepper: Any) -> None:
    sequence = stepper.sequence()
    stepper.step([Read(sequence, ids_of(SPEC, 5), 0)])
    read_on(stepper, sequence, ids_of(SPEC, 4), ALWAYS)
    sequence.crop(5)
    assert not sequence.waiting and sequence.settled == 5
    sequence.free()


def test_blocks_are_findable_only_once_every_layer_has_read_them(stepper: Any) -> None:
    ids = ids_of(SPEC, 2 * BLOCK)
    sequence = stepper.sequence()
    stepper.step([Read(sequence, ids[: BLOCK + 1], 0)])
    read_on(stepper, sequence, ids[BLOCK + 1 : -1], ALWAYS)
    stepper.pool.remember(sequence, ids)
    assert stepper.pool.match([*ids, 1]).length == BLOCK
    read_on(stepper, sequence, ids[-1:], ALWAYS)  # one that must climb
    stepper.pool.remember(sequence, ids)
    found = stepper.pool.match([*ids, 1])
    assert found.length == 2 * BLOCK
    found.free(), sequence.free()


def test_windows_hold_what_waiting_rows_still_need() -> None:
    spec = SPEC.replace(window=6)
    native = NativeStepper(little(spec), cache_tokens=1000)
    ids = ids_of(spec, 60)
    sequence = native.sequence()
    read_on(native, sequence, ids[:59], ALWAYS)
    (state,) = native.step([Read(sequence, ids[59:], 1)])
    full = hidden_of(NativeStepper(little(spec), cache_tokens=100), ids, [60])
    assert torch.equal(state[0], full[-1])
    sequence.free()


def test_texts_with_different_exits_share_a_step(stepper: Any) -> None:
    ids = ids_of(SPEC, 10)
    ways = [None, ALWAYS, EarlyExit((3,), (0.0,)), EarlyExit((2, 4), (0.0, 0.0))]
    alone = []
    for exits in ways:
        sequence = stepper.sequence()
        alone.append(read_on(stepper, sequence, ids, exits))
        sequence.free()
    sequences = [stepper.sequence() for _ in ways]
    for place, token in enumerate(ids):
        reads = [Read(text, [token], 1, exits=exits) for text, exits in zip(sequences, ways, strict=True)]
        for way, state in enumerate(stepper.step(reads)):
            assert same(stepper, state[0], alone[way][0][place])
            assert stepper.depths[way] == alone[way][1][place]
    for sequence in sequences:
        sequence.free()


@pytest.mark.parametrize(
    ("layers", "thresholds", "words"),
    [
        ((), (), "numbers of layers that rise"),
        ((4, 2), (0.5, 0.5), "numbers of layers that rise"),
        ((0, 2), (0.5, 0.5), "numbers of layers that rise"),
        ((2, 4), (0.5,), "expected 2 numbers"),
        ((2,), (-0.1,), "threshold of at least 0"),
        ((2,), (float("nan"),), "threshold of at least 0"),
    ],
)
def test_exits_out_of_range_are_refused(
    layers: tuple[int, ...], thresholds: tuple[float, ...], words: str
) -> None:
    with pytest.raises(PunaError) as error:
        EarlyExit(layers, thresholds)
    assert words in str(error.value).replace("expected: ", "expected ").replace("\n", " ")


def test_an_exit_beyond_the_model_or_beside_a_skip_is_refused(stepper: Any) -> None:
    sequence = stepper.sequence()
    with pytest.raises(PunaError, match="at most 5"):
        stepper.step([Read(sequence, [1], 1, exits=EarlyExit((6,), (0.5,)))])
    sequence.free()
    with pytest.raises(ValueError, match="not with both"):
        stepper.step([Read(sequence, [1], 1, FeedForwardSkip(0, 5, 0.5), exits=ALWAYS)])
    sequence.free()


def test_a_text_that_skips_feed_forwards_shares_a_step_with_one_that_leaves(stepper: Any) -> None:
    leaver, skipper = stepper.sequence(), stepper.sequence()
    stepper.step([Read(leaver, [1, 2], 1), Read(skipper, [3], 1)])
    reads = [Read(leaver, [5], 1, exits=ALWAYS), Read(skipper, [5], 1, FeedForwardSkip(0, 5, -2.0, budget=2))]
    stepper.step(reads)
    assert list(stepper.skipped) == [0, 2] and list(stepper.depths) == [4, 6]
    leaver.free(), skipper.free()
