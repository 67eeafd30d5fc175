"""The kit's checks, run on every registered decoder and neutral setting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.model.cache import KeyValueCache
from puna.model.spec import BlockSpec
from tests.invariants import kit


@pytest.mark.parametrize("name", [*kit.NEUTRAL])
def test_a_neutral_setting_changes_no_bit(name: str) -> None:
    plain, changed = kit.NEUTRAL[name]()
    for batch, time in ((2, 48), (1, 1), (3, 17)):
        kit.assert_same_bits(plain, changed, kit.random_ids(batch, time))


@pytest.mark.parametrize("name", [*kit.DECODERS])
def test_no_place_sees_a_later_one(name: str) -> None:
    kit.assert_causal(kit.DECODERS[name]())


@pytest.mark.parametrize("name", [*kit.DECODERS])
@pytest.mark.parametrize("parts", [(1,) * 12, (7, 1, 1, 20, 3), (30,)])
def test_cached_is_uncached(name: str, parts: tuple[int, ...]) -> None:
    kit.assert_cached_is_uncached(kit.DECODERS[name](), parts)


@pytest.mark.parametrize("name", [*kit.DECODERS])
def test_cached_is_uncached_after_padding(name: str) -> None:
    kit.assert_cached_is_uncached(kit.DECODERS[name](), (9, 1, 1, 20, 2), padding=(0, 4, 8))


@pytest.mark.parametrize("name", [*kit.DECODERS])
@pytest.mark.parametrize("side", ["left", "right"])
def test_batched_is_alone(name: str, side: str) -> None:
    kit.assert_batched_is_alone(kit.DECODERS[name](), (19, 3, 1, 12), side)


@pytest.mark.parametrize("name", [*kit.DECODERS])
def test_packed_is_separate(name: str) -> None:
    kit.assert_packed_is_separate(kit.DECODERS[name](), ((9, 1, 5), (15,), (2, 8), (5, 5, 5)))


@settings(max_examples=12, deadline=None)
@given(st.lists(st.lists(st.integers(1, 14), min_size=1, max_size=4), min_size=1, max_size=3))
def test_packed_is_separate_however_packed(rows: list[list[int]]) -> None:
    kit.assert_packed_is_separate(kit.DECODERS["window"](), rows)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=5))
def test_cached_is_uncached_however_parted(parts: list[int]) -> None:
    kit.assert_cached_is_uncached(kit.DECODERS["every-block-different"](), parts)


def test_packed_documents_leak_nothing_in_bfloat16() -> None:
    model = kit.DECODERS["grouped"]().bfloat16()
    ids = kit.random_ids(1, 150)
    segments = torch.arange(5).repeat_interleave(torch.tensor([10, 30, 3, 100, 7]))[None]
    gradient = kit.embedding_gradients(model, ids, lambda logits: logits[0, 40:43].square().sum(), segments)
    kit.assert_only_within(gradient, 0, slice(40, 43))


@pytest.mark.parametrize("parts", [(8, *(1,) * 8, 40), (2, 14, 40)])
def test_cached_is_uncached_in_bfloat16_but_for_rounding(parts: tuple[int, ...]) -> None:
    exact = kit.DECODERS["window"]()
    low = kit.DECODERS["window"]().bfloat16()
    ids = kit.random_ids(2, sum(parts))
    cache = KeyValueCache(low.spec, 2, sum(parts), dtype=torch.bfloat16)
    with torch.no_grad():
        expected, at_once = exact(ids), low(ids)
        cached = torch.cat([low(part, cache=cache) for part in ids.split(list(parts), dim=1)], dim=1)
    assert (cached - at_once).abs().mean() < 1.5 * (at_once - expected).abs().mean()


def test_the_checks_find_a_leak() -> None:
    """A decoder that attends both ways fails the causal check: the kit can fail."""
    model = kit.decoder(
        kit.spec_of(kit.BLOCK, BlockSpec(heads=4, kv_heads=2, head_dim=8, causal=False, width=8))
    )
    with pytest.raises(AssertionError, match="sees later tokens"):
        kit.assert_causal(model)


def test_both_ways_attention_stays_within_documents() -> None:
    model = kit.decoder(kit.spec_of().replace(causal=False))
    kit.assert_packed_is_separate(model, ((9, 1, 5), (15,), (2, 8)))
    kit.assert_batched_is_alone(model, (9, 4), "left")


def test_rows_of_a_padded_batch_decode_as_alone() -> None:
    """Greedy continuation of unequal prompts, batched with left padding, against each alone."""
    model = kit.DECODERS["grouped"]()
    prompts = [kit.random_ids(1, length, seed=length) for length in (11, 4, 7)]
    segments = torch.full((3, 11), -1)
    ids = torch.zeros(3, 11, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, 11 - prompt.shape[1] :] = prompt
        segments[row, 11 - prompt.shape[1] :] = 0
    cache = KeyValueCache(model.spec, 3, 30)
    batched = []
    with torch.no_grad():
        step = model(ids, segments=segments, cache=cache)[:, -1:].argmax(-1)
        for _ in range(12):
            batched.append(step)
            step = model(step, cache=cache)[:, -1:].argmax(-1)
        for row, prompt in enumerate(prompts):
            text = prompt
            for _ in range(12):
                text = torch.cat((text, model(text)[:, -1:].argmax(-1)), dim=1)
            assert torch.equal(torch.cat(batched, dim=1)[row], text[0, prompt.shape[1] :])
