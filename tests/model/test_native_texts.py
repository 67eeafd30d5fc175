"""The native kernels give a text the same bits whatever stands beside it and however it is cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.model.native.stepper import NativeStepper
from puna.model.paged import CachePolicy
from puna.model.plain_stepper import PlainStepper
from puna.model.spec import BlockSpec, LlamaSpec
from puna.model.stepper import Read
from tests.model.native_models import SPECS, cut, hidden_of, ids_of, little

FORMATS = [(torch.float32, None), (torch.bfloat16, None), (torch.float32, "int8"), (torch.float32, "int4")]
SPEC = SPECS["every layer different"]


def stepper_of(dtype: torch.dtype, quantize: Any, spec: LlamaSpec = SPEC, **settings: Any) -> NativeStepper:
    return NativeStepper(little(spec, dtype), quantize=quantize, **{"cache_tokens": 4000, **settings})


@pytest.mark.parametrize(("dtype", "quantize"), FORMATS)
@pytest.mark.parametrize("name", SPECS)
def test_a_text_is_the_same_bits_in_any_cutting(name: str, dtype: torch.dtype, quantize: Any) -> None:
    stepper = stepper_of(dtype, quantize, SPECS[name])
    ids = ids_of(stepper.spec, 330)
    whole = hidden_of(stepper, ids, [330])
    every = list(range(1, 26))  # each number of rows that a kernel may have left over
    for parts in ([1] * 330, cut(330, 7), [16, 250, 1, 2, 3, 58], [300, 30], [*every, 5]):
        assert torch.equal(hidden_of(stepper, ids, parts), whole)


@pytest.mark.parametrize(("dtype", "quantize"), FORMATS)
def test_a_text_is_the_same_bits_alone_and_beside_any_others(dtype: torch.dtype, quantize: Any) -> None:
    stepper = stepper_of(dtype, quantize)
    lengths = [1, 2, 3, 5, 9, 17, 40, 290, 1, 30]
    texts = [ids_of(SPEC, length, seed) for seed, length in enumerate(lengths)]
    alone = [hidden_of(stepper, ids, [len(ids)]) for ids in texts]
    for count in range(1, len(texts) + 1):
        reads = [Read(stepper.sequence(), ids, min(len(ids), 4)) for ids in texts[:count]]
        for read, found, expected in zip(reads, stepper.step(reads), alone, strict=False):
            assert torch.equal(found, expected[-read.outputs :])
            read.sequence.free()
    logits = stepper.logits(torch.cat(alone))
    for start, size in ((0, 1), (3, 2), (11, 5), (100, 13)):
        assert torch.equal(
            stepper.logits(torch.cat(alone)[start : start + size]), logits[start : start + size]
        )


@pytest.mark.parametrize(("dtype", "quantize"), FORMATS)
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype, quantize: Any) -> None:
    ids = ids_of(SPEC, 300)
    found = [
        hidden_of(stepper_of(dtype, quantize, threads=threads), ids, [280, *[1] * 20])
        for threads in (1, 2, 3)
    ]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_more_tokens_than_one_pass_takes_are_read_all_the_same() -> None:
    stepper = stepper_of(torch.float32, None)
    ids = ids_of(SPEC, 1300)
    read = Read(stepper.sequence(), ids, 700)
    other = Read(stepper.sequence(), ids[:20], 20)
    found, beside = stepper.step([read, other])
    pieces = hidden_of(stepper, ids, cut(1300, 100))
    assert torch.equal(found, pieces[-700:]) and torch.equal(beside, pieces[:20])


def test_a_fork_goes_its_own_way_and_a_crop_goes_back() -> None:
    stepper = stepper_of(torch.bfloat16, "int4")
    ids, other = ids_of(SPEC, 60), ids_of(SPEC, 60, seed=1)
    expected = hidden_of(stepper, ids, [60])
    turned = hidden_of(stepper, [*ids[:37], *other[37:]], [60])
    sequence = stepper.sequence()
    stepper.step([Read(sequence, ids[:37], 0)])
    branch = sequence.fork()
    first, second = stepper.step([Read(sequence, ids[37:], 23), Read(branch, other[37:], 23)])
    assert torch.equal(first, expected[37:]) and torch.equal(second, turned[37:])
    sequence.crop(41)
    assert torch.equal(stepper.step([Read(sequence, ids[41:], 19)])[0], expected[41:])
    branch.crop(33)
    assert torch.equal(stepper.step([Read(branch, ids[33:], 27)])[0], expected[33:])


def test_what_another_text_left_in_a_block_is_never_seen() -> None:
    """Not even numbers that are none: weights of zero would not silence them."""
    model = little(SPECS["grouped, tied"])
    stepper = NativeStepper(model, cache_tokens=64)
    stepper.pool.sharing = False
    ids = ids_of(model.spec, 21)
    expected = hidden_of(stepper, ids, [21])
    broken = NativeStepper(model, cache_tokens=64)
    broken.pool.sharing = False
    broken._library.call("norm", broken._handle, 0, 0, torch.full((48,), torch.nan).data_ptr())
    assert hidden_of(broken, ids_of(model.spec, 60), [60]).isnan().all()
    healthy = model.model.layers[0].input_layernorm.weight.detach().contiguous()
    broken._library.call("norm", broken._handle, 0, 0, healthy.data_ptr())
    assert torch.equal(hidden_of(broken, ids, [5, 1, 14, 1]), expected)


POLICIES = {
    "sliding": CachePolicy.sliding(9),
    "sink": CachePolicy.sink_window(3, 8),
    "wide sink": CachePolicy.sink_window(20, 300),
    "long": CachePolicy.sliding(290),
}


@pytest.mark.parametrize("name", POLICIES)
def test_policies_show_and_keep_what_they_do_in_the_plain_stepper(name: str) -> None:
    model = little(SPECS["grouped, tied"])
    policies = [CachePolicy.full(), POLICIES[name]]
    native = NativeStepper(model, cache_tokens=700, policies=policies)
    plain = PlainStepper(model, cache_tokens=700, policies=policies)
    ids = ids_of(model.spec, 660)
    expected = plain.logits(hidden_of(plain, ids, [20, 1, 1, 280, 358]))
    whole = hidden_of(native, ids, [660])
    assert (native.logits(whole) - expected).abs().max() < 1e-4
    assert torch.equal(hidden_of(native, ids, [20, 1, 1, *[6] * 100, 38]), whole)
    sequences = [stepper.sequence() for stepper in (native, plain)]
    for stepper, sequence in zip((native, plain), sequences, strict=True):
        stepper.step([Read(sequence, ids)])
    assert [table.count(-1) for table in sequences[0].tables] == [
        table.count(-1) for table in sequences[1].tables
    ]


def test_blocks_let_go_by_name_are_seen_no_more() -> None:
    model = little(SPECS["grouped, tied"])
    ids = ids_of(model.spec, 340)
    found = []
    for kind in (NativeStepper, PlainStepper):
        stepper = kind(model, cache_tokens=400, policies=[CachePolicy.retained()] * 2)
        sequence = stepper.sequence()
        stepper.step([Read(sequence, ids[:300], 0)])
        sequence.retain([0, 3, 17])
        found.append(stepper.logits(stepper.step([Read(sequence, ids[300:], 40)])[0]))
    assert (found[0] - found[1]).abs().max() < 1e-4


@st.composite
def decoders(draw: Any) -> LlamaSpec:
    def block() -> BlockSpec:
        kv_heads = draw(st.integers(1, 3))
        return BlockSpec(
            attention=draw(st.sampled_from(["full", "full", "linear", "none"])),
            heads=kv_heads * draw(st.integers(1, 8)),
            kv_heads=kv_heads,
            head_dim=2 * draw(st.integers(1, 40)),
            window=draw(st.none() | st.integers(1, 70)),
            feed_forward=draw(st.sampled_from(["swiglu", "swiglu", "linear", "none"])),
            width=draw(st.integers(1, 100)),
        )

    return LlamaSpec(
        draw(st.integers(2, 100)),
        draw(st.integers(1, 100)),
        (block(), block()),
        tied=draw(st.booleans()),
        attention_bias=draw(st.sampled_from(["none", "qkv", "all"])),
        mlp_bias=draw(st.booleans()),
    )


@settings(max_examples=40, deadline=None)
@given(
    decoders(),
    st.sampled_from(FORMATS),
    st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=5), min_size=1, max_size=4),
)
def test_any_decoder_and_any_mixture(spec: LlamaSpec, form: Any, cuts: Sequence[Sequence[int]]) -> None:
    dtype, quantize = form
    model = little(spec, dtype)
    stepper = NativeStepper(model, cache_tokens=1000, quantize=quantize)
    texts = [ids_of(spec, sum(parts), seed) for seed, parts in enumerate(cuts)]
    sequences = [stepper.sequence() for _ in texts]
    found: list[list[torch.Tensor]] = [[] for _ in texts]
    for step in range(max(map(len, cuts))):
        reading = [text for text, parts in enumerate(cuts) if step < len(parts)]
        reads = []
        for text in reading:
            start, count = sum(cuts[text][:step]), cuts[text][step]
            reads.append(Read(sequences[text], texts[text][start : start + count], count))
        for text, hidden in zip(reading, stepper.step(reads), strict=True):
            found[text].append(hidden)
    for ids, hidden in zip(texts, found, strict=True):
        assert torch.equal(torch.cat(hidden), hidden_of(stepper, ids, [len(ids)]))
        if form == (torch.float32, None):
            with torch.no_grad():
                expected = model.hidden(torch.tensor([ids]))[0]
            torch.testing.assert_close(torch.cat(hidden), expected, atol=2e-4, rtol=2e-4)
