"""Attention in tiles, for bfloat16 on a CPU.

There torch's fused attention spends most of its time outside matrix products, above all in its
backward pass. Here tokens of all rows lie in one line; a tile is a short stretch of queries with
the stretch of keys they may see, so that scores are small matrix products with a softmax in place.
Neighbouring short documents share a tile. Weights are computed again in the backward pass instead
of being kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

QUERIES_PER_TILE = 128


@dataclass(frozen=True)
class Tile:
    """Queries ``first`` to ``end`` see keys ``low`` to ``high`` (ends excluded).

    ``mask`` is added to the scores of the tile's last keys: [queries, 1, last keys], or None.
    """

    first: int
    end: int
    low: int
    high: int
    mask: Tensor | None


def make_tiles(documents: Iterable[tuple[int, int]], *, causal: bool, window: int | None) -> list[Tile]:
    """Tiles for documents, given in order as (start, end) in one line of tokens; a window only if causal."""
    tiles: list[Tile] = []
    short: list[tuple[int, int]] = []  # neighbouring documents that will share a tile
    for start, end in documents:
        if short and (short[-1][1] != start or end - short[0][0] > QUERIES_PER_TILE):
            tiles.append(_shared_tile(short, causal, window))
            short = []
        if end - start <= QUERIES_PER_TILE:
            short.append((start, end))
        else:
            tiles.extend(_document_tiles(start, end, causal, window))
    if short:
        tiles.append(_shared_tile(short, causal, window))
    return tiles


def _shared_tile(documents: list[tuple[int, int]], causal: bool, window: int | None) -> Tile:
    first, end = documents[0][0], documents[-1][1]
    lengths = torch.tensor([stop - start for start, stop in documents])
    owners = torch.arange(len(documents)).repeat_interleave(lengths)
    seen = owners[:, None] == owners
    if causal:
        seen = seen & _causal(end - first, end - first, window)
    return Tile(first, end, first, end, None if bool(seen.all()) else _additive(seen))


def _document_tiles(start: int, end: int, causal: bool, window: int | None) -> Iterable[Tile]:
    triangle = _additive(_causal(QUERIES_PER_TILE, QUERIES_PER_TILE, None))
    for first in range(start, end, QUERIES_PER_TILE):
        last = min(first + QUERIES_PER_TILE, end)
        if not causal:
            yield Tile(first, last, start, end, None)
        elif window is None or last - start <= window:
            yield Tile(first, last, start, last, triangle[: last - first, :, : last - first])
        else:
            low = max(start, first - window + 1)
            yield Tile(first, last, low, last, _additive(_causal(last - first, last - low, window)))


def _causal(queries: int, keys: int, window: int | None) -> Tensor:
    """Visibility [queries, keys] where the last query stands at the last key."""
    behind = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    return behind >= 0 if window is None else (behind >= 0) & (behind < window)


def _additive(seen: Tensor) -> Tensor:
    mask = torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill(~seen, float("-inf"))
    return mask[:, None]


def tiled_attention(queries: Tensor, keys: Tensor, values: Tensor, tiles: list[Tile], scale: float) -> Tensor:
    """Attention of ``queries`` [tokens, heads, head_dim] within tiles.

    ``keys`` and ``values`` are [tokens, kv_heads, head_dim], all in bfloat16 on the CPU. Tokens that
    no tile covers (padding) give zeros.
    """
    mixed: Tensor = _TiledAttention.apply(queries, keys, values, tiles, scale)  # type: ignore[no-untyped-call]
    return mixed


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, tiles: list[Tile], scale: float
    ) -> Tensor:
        group = queries.shape[1] // keys.shape[1]
        grouped = _by_kv_head(queries, keys.shape[1]).mul_(scale)  # [kv_heads, tokens * group, head_dim]
        keys, values = _by_kv_head(keys, keys.shape[1]), _by_kv_head(values, keys.shape[1])
        mixed = torch.zeros_like(grouped)
        for tile in tiles:
            weights = _weights(grouped, keys, tile, group)
            mixed[:, tile.first * group : tile.end * group] = weights @ values[:, tile.low : tile.high]
        ctx.save_for_backward(grouped, keys, values)
        ctx.tiles, ctx.scale = tiles, scale
        return _by_token(mixed, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values = ctx.saved_tensors
        group = queries.shape[1] // keys.shape[1]
        gradient = _by_kv_head(gradient, keys.shape[0])
        to_queries = torch.zeros_like(queries)
        # A key gathers from many tiles: in float32, so that the sum does not lose bits tile by tile.
        to_keys, to_values = (torch.zeros_like(tensor, dtype=torch.float32) for tensor in (keys, values))
        for tile in ctx.tiles:
            rows, seen = slice(tile.first * group, tile.end * group), slice(tile.low, tile.high)
            weights = _weights(queries, keys, tile, group)
            to_values[:, seen] += weights.transpose(1, 2) @ gradient[:, rows]
            to_weights = gradient[:, rows] @ values[:, seen].transpose(1, 2)
            to_scores = torch._softmax_backward_data(to_weights, weights, -1, weights.dtype)
            to_queries[:, rows] = to_scores @ keys[:, seen]
            to_keys[:, seen] += to_scores.transpose(1, 2) @ queries[:, rows]
        to_queries.mul_(ctx.scale)
        sums = (_by_token(tensor.to(queries.dtype), 1) for tensor in (to_keys, to_values))
        return _by_token(to_queries, group), *sums, None, None


def _weights(queries: Tensor, keys: Tensor, tile: Tile, group: int) -> Tensor:
    """Softmax weights of one tile, [kv_heads, queries * group, keys]."""
    scores = queries[:, tile.first * group : tile.end * group] @ keys[:, tile.low : tile.high].transpose(1, 2)
    if tile.mask is not None:
        masked = scores.view(scores.shape[0], -1, group, scores.shape[2])[..., -tile.mask.shape[2] :]
        masked += tile.mask
    return scores.softmax(dim=-1)


def _by_kv_head(tokens: Tensor, kv_heads: int) -> Tensor:
    """[tokens, heads, head_dim] to [kv_heads, tokens * group, head_dim]; a token's heads stay together."""
    grouped = tokens.view(tokens.shape[0], kv_heads, -1, tokens.shape[2]).permute(1, 0, 2, 3)
    return grouped.clone(memory_format=torch.contiguous_format).flatten(1, 2)


def _by_token(grouped: Tensor, group: int) -> Tensor:
    """The way back: [kv_heads, tokens * group, head_dim] to [tokens, heads, head_dim]."""
    kv_heads, rows, head_dim = grouped.shape
    return grouped.view(kv_heads, rows // group, group, head_dim).permute(1, 0, 2, 3).flatten(1, 2)
