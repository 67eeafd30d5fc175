"""Every fast path of attention equals the dense reference, values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from puna.core.errors import PunaError
from puna.model.attention import PADDING, dense_attention, lay_out, visible
from puna.model.cache import KeyValueCache
from puna.model.spec import BlockSpec, LlamaSpec

DEVICE = torch.device("cpu")


def tensors(batch: int, time: int, block: BlockSpec, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    heads = (block.heads, block.kv_heads, block.kv_heads)
    return tuple(torch.randn(batch, time, count, block.head_dim, generator=generator) for count in heads)


def reference(queries: Tensor, keys: Tensor, values: Tensor, segments: Tensor, block: BlockSpec) -> Tensor:
    mask = visible(segments, segments, 0, causal=block.causal, window=block.window)
    return dense_attention(queries, keys.transpose(1, 2), values.transpose(1, 2), mask, block.scale)


def textbook(queries: Tensor, keys: Tensor, values: Tensor, segments: Tensor, block: BlockSpec) -> Tensor:
    """Attention by loops, from the definition."""
    result = torch.zeros_like(queries)
    for row in range(queries.shape[0]):
        for head in range(block.heads):
            shared = head // (block.heads // block.kv_heads)
            for i in range(queries.shape[1]):
                seen = [
                    j
                    for j in range(queries.shape[1])
                    if segments[row, i] == segments[row, j] != PADDING
                    and (j <= i or not block.causal)
                    and (block.window is None or i - j < block.window)
                ]
                if seen:
                    scores = keys[row, seen, shared] @ queries[row, i, head] * block.scale
                    result[row, i, head] = scores.softmax(0) @ values[row, seen, shared]
    return result


@st.composite
def cases(draw: st.DrawFn, longest: int = 40) -> tuple[BlockSpec, Tensor, int]:
    """A block and document ids: rows of documents and padding in any order, of any length."""
    causal = draw(st.booleans())
    block = BlockSpec(
        heads=4,
        kv_heads=draw(st.sampled_from([1, 2, 4])),
        head_dim=8,
        window=draw(st.none() | st.integers(1, longest)) if causal else None,
        causal=causal,
        logit_scale=draw(st.none() | st.just(0.2)),
        width=8,
    )
    time = draw(st.integers(1, longest))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        row: list[int] = []
        while len(row) < time:
            padding = draw(st.integers(0, 3)) == 0
            row += [PADDING if padding else len(row)] * draw(st.integers(1, longest))
        rows.append(row[:time])
    return block, torch.tensor(rows), draw(st.integers(0, 1000))


@settings(max_examples=25, deadline=None)
@given(cases(longest=9))
def test_the_reference_is_the_definition(case: tuple[BlockSpec, Tensor, int]) -> None:
    block, segments, seed = case
    inputs = tensors(*segments.shape, block, seed)
    got = reference(*inputs, segments, block)
    torch.testing.assert_close(got, textbook(*inputs, segments, block), atol=1e-6, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(cases())
def test_documents_one_by_one_equal_the_reference(case: tuple[BlockSpec, Tensor, int]) -> None:
    block, segments, seed = case
    inputs = [tensor.requires_grad_() for tensor in tensors(*segments.shape, block, seed)]
    layout = lay_out(*segments.shape, DEVICE, None, segments, None)
    got, expected = layout.attend(*inputs, block), reference(*inputs, segments, block)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    if (segments == PADDING).all():
        return
    weight = torch.randn_like(got)
    theirs = torch.autograd.grad((expected * weight).sum(), inputs)
    for ours, other in zip(torch.autograd.grad((got * weight).sum(), inputs), theirs, strict=True):
        torch.testing.assert_close(ours, other, atol=1e-5, rtol=1e-4)


@settings(max_examples=30, deadline=None)
@given(cases(longest=280))
def test_tiles_in_bfloat16_equal_the_reference_in_float32(case: tuple[BlockSpec, Tensor, int]) -> None:
    block, segments, seed = case
    low = [tensor.bfloat16().requires_grad_() for tensor in tensors(*segments.shape, block, seed)]
    exact = [tensor.detach().float().requires_grad_() for tensor in low]
    layout = lay_out(*segments.shape, DEVICE, None, segments, None)
    got, expected = layout.attend(*low, block), reference(*exact, segments, block)
    torch.testing.assert_close(got.float(), expected, atol=0.04, rtol=0.02)
    weight = torch.randn_like(expected)
    theirs = torch.autograd.grad((expected * weight).sum(), exact)
    for ours, other in zip(torch.autograd.grad((got * weight).sum(), low), theirs, strict=True):
        assert (ours.float() - other).norm() <= 0.02 * other.norm() + 1e-3
    assert (got[segments == PADDING] == 0).all()


@settings(max_examples=30, deadline=None)
@given(cases(), st.data())
def test_stored_keys_equal_the_reference(case: tuple[BlockSpec, Tensor, int], data: st.DataObject) -> None:
    block, segments, seed = case
    if not block.causal or segments.shape[1] < 2:
        return
    batch, time = segments.shape
    past = data.draw(st.integers(1, time - 1))
    queries, keys, values = tensors(batch, time, block, seed)
    cache = KeyValueCache(LlamaSpec(10, 32, (block,)), batch, time)
    lay_out(batch, past, DEVICE, None, segments[:, :past], cache)
    cache.append(0, keys[:, :past], values[:, :past])
    cache.advance(past)
    layout = lay_out(batch, time - past, DEVICE, None, segments[:, past:], cache)
    stored = cache.append(0, keys[:, past:], values[:, past:])
    got = layout.attend_stored(queries[:, past:], *stored, block)
    expected = reference(queries, keys, values, segments, block)[:, past:]
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("time", [1, 5, 40])
@pytest.mark.parametrize("window", [None, 6, 60])
def test_stored_keys_without_documents_equal_the_reference(time: int, window: int | None) -> None:
    block = BlockSpec(heads=4, kv_heads=2, head_dim=8, window=window, width=8)
    queries, keys, values = tensors(2, 10 + time, block, 0)
    cache = KeyValueCache(LlamaSpec(10, 32, (block,)), 2, 10 + time)
    lay_out(2, 10, DEVICE, None, None, cache)
    cache.append(0, keys[:, :10], values[:, :10])
    cache.advance(10)
    layout = lay_out(2, time, DEVICE, None, None, cache)
    got = layout.attend_stored(queries[:, 10:], *cache.append(0, keys[:, 10:], values[:, 10:]), block)
    expected = reference(queries, keys, values, torch.zeros(2, 10 + time, dtype=torch.int64), block)[:, 10:]
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def test_positions_restart_at_each_document_and_are_zero_at_padding() -> None:
    segments = torch.tensor([[-1, -1, 4, 4, 4, 7, 7, -1], [0, 0, 0, 0, 0, 0, 0, 0]])
    layout = lay_out(2, 8, DEVICE, None, segments, None)
    assert layout.positions.tolist() == [[0, 0, 0, 1, 2, 0, 1, 0], list(range(8))]


def test_only_the_first_document_of_a_row_goes_on_from_the_cache() -> None:
    spec = LlamaSpec(10, 32, (BlockSpec(heads=4, kv_heads=2, head_dim=8, width=8),))
    cache = KeyValueCache(spec, 2, 10)
    lay_out(2, 4, DEVICE, None, torch.tensor([[0, 0, 0, 1], [-1, 2, 2, 2]]), cache)
    cache.advance(4)
    layout = lay_out(2, 4, DEVICE, None, torch.tensor([[1, 1, 2, 2], [3, 3, -1, -1]]), cache)
    assert layout.positions.tolist() == [[1, 2, 0, 1], [0, 1, 0, 0]]


def test_a_document_that_comes_back_is_refused() -> None:
    with pytest.raises(PunaError, match="contiguous"):
        lay_out(1, 5, DEVICE, None, torch.tensor([[0, 0, 1, 1, 0]]), None)


def test_positions_or_documents_of_another_shape_are_refused() -> None:
    with pytest.raises(PunaError, match="positions must have the shape of input_ids"):
        lay_out(2, 5, DEVICE, torch.zeros(1, 5, dtype=torch.int64), None, None)
    with pytest.raises(PunaError, match="segments must have the shape of input_ids"):
        lay_out(2, 5, DEVICE, None, torch.zeros(2, 4, dtype=torch.int64), None)
