"""The key-value cache: exact bytes, cropping, room, padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from puna.core.errors import PunaError
from puna.model.cache import KeyValueCache
from puna.model.spec import BlockSpec, LlamaSpec

FULL = BlockSpec(heads=4, kv_heads=2, head_dim=8, width=16)
SPEC = LlamaSpec(50, 32, (FULL, BlockSpec(attention="none", width=16), FULL))


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_bytes_are_exact_and_layers_without_attention_take_none(dtype: torch.dtype, size: int) -> None:
    cache = KeyValueCache(SPEC, batch=3, capacity=11, dtype=dtype)
    keys_and_values = 2 * 2 * 3 * 2 * 11 * 8 * size  # layers, both, rows, kv heads, places, head_dim
    documents_and_positions = 2 * 3 * 11 * 8
    assert cache.bytes == keys_and_values + documents_and_positions


def test_too_many_tokens_are_refused_and_change_nothing(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    cache = KeyValueCache(model.spec, 1, 5)
    with torch.no_grad():
        model(torch.arange(4)[None], cache=cache)
        with pytest.raises(PunaError, match="the cache is full"):
            model(torch.arange(2)[None], cache=cache)
        assert cache.length == 4
        model(torch.arange(1)[None], cache=cache)
    assert cache.length == 5


def test_another_batch_is_refused(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    with pytest.raises(PunaError, match="batch"):
        model(torch.zeros(2, 3, dtype=torch.int64), cache=KeyValueCache(model.spec, 1, 5))


def test_another_type_is_refused(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    with pytest.raises(PunaError, match="type"):
        model(
            torch.zeros(1, 3, dtype=torch.int64), cache=KeyValueCache(model.spec, 1, 5, dtype=torch.bfloat16)
        )


def test_layers_that_attend_both_ways_are_refused() -> None:
    with pytest.raises(PunaError, match="layers 0, 2 are not causal"):
        KeyValueCache(SPEC.replace(causal=False), 1, 5)


@pytest.mark.parametrize(("batch", "capacity"), [(0, 4), (1, 0)])
def test_an_empty_cache_is_refused(batch: int, capacity: int) -> None:
    with pytest.raises(PunaError, match="at least one"):
        KeyValueCache(SPEC, batch, capacity)


@pytest.mark.parametrize("padded", [False, True])
def test_a_cropped_cache_is_as_if_the_tokens_had_never_come(
    padded: bool, tiny_llama: Callable[..., Any]
) -> None:
    model = tiny_llama()
    ids = torch.randint(0, 320, (2, 20), generator=torch.Generator().manual_seed(0))
    segments = torch.zeros(2, 8, dtype=torch.int64)
    if padded:
        segments[1, :5] = -1
    cache, other = KeyValueCache(model.spec, 2, 20), KeyValueCache(model.spec, 2, 20)
    with torch.no_grad():
        for store in (cache, other):
            model(ids[:, :8], segments=segments, cache=store)
        model(ids[:, 8:13], cache=cache)
        cache.crop(8)
        got, expected = model(ids[:, 14:], cache=cache), model(ids[:, 14:], cache=other)
    assert torch.equal(got, expected)
    assert torch.equal(cache.positions, other.positions)
    for wrong in (-1, cache.length + 1):
        with pytest.raises(PunaError, match="cropped"):
            cache.crop(wrong)


def test_cropping_away_all_padding_leaves_a_cache_without_documents(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    cache = KeyValueCache(model.spec, 1, 9)
    with torch.no_grad():
        model(torch.arange(4)[None], segments=torch.tensor([[0, 0, 1, 1]]), cache=cache)
    assert cache.segments is not None
    cache.crop(2)
    assert cache.segments is None


def test_the_last_token_that_is_not_padding_is_found() -> None:
    cache = KeyValueCache(SPEC, 3, 6)
    assert [tensor.flatten().tolist() for tensor in cache.last()] == [[0, 0, 0], [-1, -1, -1]]
    segments = torch.tensor([[0, 0, 3, -1], [-1, -1, -1, -1], [-1, 2, 2, 2]])
    cache.place(torch.tensor([[0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 2]]), segments)
    cache.advance(4)
    assert [tensor.flatten().tolist() for tensor in cache.last()] == [[3, 0, 2], [0, -1, 2]]


def test_right_padding_in_the_cache_is_passed_over(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    ids = torch.randint(0, 320, (2, 10), generator=torch.Generator().manual_seed(0))
    segments = torch.zeros(2, 6, dtype=torch.int64)
    segments[1, 4:] = -1
    cache = KeyValueCache(model.spec, 2, 10)
    with torch.no_grad():
        model(ids[:, :6], segments=segments, cache=cache)
        got = model(ids[:, 6:], cache=cache)[1]
        expected = model(torch.cat((ids[1:, :4], ids[1:, 6:]), dim=1))[0, 4:]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_gradients_do_not_flow_into_what_is_stored(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    cache = KeyValueCache(model.spec, 1, 6)
    model(torch.arange(3)[None], cache=cache)
    model(torch.arange(3)[None], cache=cache).sum().backward()
    keys, values = cache.append(0, torch.zeros(1, 0, 2, 12), torch.zeros(1, 0, 2, 12))
    assert not keys.requires_grad and not values.requires_grad
