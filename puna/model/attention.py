"""Who sees whom, and attention computed accordingly: a dense reference and faster paths equal to it.

A :class:`Layout` is made once per forward pass. Without a cache, tokens are taken document by
document (contiguous runs of one segment id), so that no work is spent across documents; with
tokens in a cache, few queries meet many stored keys.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional

from puna.core.errors import PunaError
from puna.model.cache import KeyValueCache
from puna.model.spec import BlockSpec
from puna.model.tiles import Tile, make_tiles, tiled_attention

PADDING = -1  # the segment id of padding
_SMALLEST_BAND = 128  # queries handled together where attention has a window
_FEW_QUERIES = 16  # up to here a grouped product over stored keys beats expanding them


def visible(
    query_segments: Tensor,
    key_segments: Tensor,
    first_query: int,
    *,
    causal: bool = True,
    window: int | None = None,
) -> Tensor:
    """Which keys each query may see, [batch, queries, keys] bool.

    From the documents of the queries [batch, queries] and of the keys [batch, keys]. Query i stands
    at key index ``first_query + i``. Padding sees nothing and is seen by nothing.
    """
    same = query_segments[:, :, None] == key_segments[:, None, :]
    same = same & (query_segments[:, :, None] != PADDING)
    if not causal:
        return same
    band = _band(query_segments.shape[1], key_segments.shape[1], first_query, window, query_segments.device)
    return same & band


def _band(queries: int, keys: int, first_query: int, window: int | None, device: torch.device) -> Tensor:
    """Causal visibility [queries, keys], at most ``window`` keys back, the query's own included."""
    ahead = torch.arange(first_query, first_query + queries, device=device)[:, None]
    ahead = ahead - torch.arange(keys, device=device)  # how far each key lies behind its query
    return ahead >= 0 if window is None else (ahead >= 0) & (ahead < window)


def dense_attention(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """The reference: every query against every key, softmax in float32.

    ``queries`` [batch, time, heads, head_dim]; ``keys``, ``values`` [batch, kv_heads, keys,
    head_dim]; ``mask`` [batch or 1, time, keys] is True where a key is seen. A query that sees
    nothing gives zeros. Key-value heads are not expanded: their group of queries is one product.
    """
    batch, time, heads, head_dim = queries.shape
    kv_heads, stored = keys.shape[1], keys.shape[2]
    grouped = queries.transpose(1, 2).reshape(
        batch, kv_heads, -1, head_dim
    )  # heads of a group follow one another
    scores = (grouped @ keys.transpose(2, 3)).float() * scale  # [batch, kv_heads, group * time, keys]
    if mask is not None:
        scores = scores.view(batch, heads, time, stored).masked_fill(
            ~mask[:, None], torch.finfo(torch.float32).min
        )
    weights = scores.softmax(dim=-1).to(values.dtype).view(batch, kv_heads, -1, stored)
    mixed = (weights @ values).view(batch, heads, time, head_dim).transpose(1, 2)
    return mixed if mask is None else mixed.masked_fill(~mask.any(dim=2)[:, :, None, None], 0)


class Layout:
    """Positions and documents of the tokens of one forward pass, and attention among them.

    ``positions`` is [batch or 1, time]. Made by :func:`lay_out`.
    """

    def __init__(
        self, batch: int, time: int, positions: Tensor, segments: Tensor | None, cache: KeyValueCache | None
    ) -> None:
        self.batch, self.time = batch, time
        self.positions = positions
        self._segments = segments
        self._past = 0 if cache is None else cache.length
        self._stored_segments: Tensor | None = None
        self._masks: dict[int | None, Tensor | None] = {}
        self._lengths, self._real = [time] * batch, [True] * batch
        if self._past:
            assert cache is not None
            earlier = cache.segments
            if segments is not None or earlier is not None:
                earlier = torch.zeros_like(cache.positions) if earlier is None else earlier
                now = (
                    torch.zeros(batch, time, dtype=torch.int64, device=positions.device)
                    if segments is None
                    else segments
                )
                self._segments, self._stored_segments = now, torch.cat((earlier, now), dim=1)
        elif segments is not None:
            self._lengths, self._real = _documents(segments)
        self._one_length = all(self._real) and len(set(self._lengths)) == 1
        self._tiles: dict[tuple[bool, int | None], list[Tile]] = {}

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, block: BlockSpec) -> Tensor:
        """Attention among the tokens of this pass alone.

        ``queries`` [batch, time, heads, head_dim], ``keys`` and ``values`` [batch, time, kv_heads,
        head_dim]; returns the shape of ``queries``.
        """
        if queries.dtype == torch.bfloat16 and queries.device.type == "cpu":
            lines = (queries.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1))
            return tiled_attention(*lines, self._tiles_for(block), block.scale).view(queries.shape)
        group = block.heads // block.kv_heads
        if group > 1:
            keys, values = (tensor.repeat_interleave(group, dim=2) for tensor in (keys, values))
        if self._one_length:
            shape = (-1, self._lengths[0], block.heads, block.head_dim)
            alike = (queries.reshape(shape), keys.reshape(shape), values.reshape(shape))
            return _document_attention(*alike, block).reshape(queries.shape)
        pieces = (torch.split(tensor.flatten(0, 1), self._lengths) for tensor in (queries, keys, values))
        mixed = []
        for real, query, key, value in zip(self._real, *pieces, strict=True):
            alone = (query[None], key[None], value[None])
            mixed.append(_document_attention(*alone, block)[0] if real else torch.zeros_like(query))
        return torch.cat(mixed).view(queries.shape)

    def _tiles_for(self, block: BlockSpec) -> list[Tile]:
        kind = (block.causal, block.window)
        if kind not in self._tiles:
            ends = list(itertools.accumulate(self._lengths))
            spans = zip(self._lengths, ends, self._real, strict=True)
            documents = [(end - length, end) for length, end, real in spans if real]
            self._tiles[kind] = make_tiles(documents, causal=block.causal, window=block.window)
        return self._tiles[kind]

    def attend_stored(self, queries: Tensor, keys: Tensor, values: Tensor, block: BlockSpec) -> Tensor:
        """Attention of ``queries`` [batch, time, heads, head_dim] on all stored tokens.

        ``keys`` and ``values`` are [batch, kv_heads, stored, head_dim].
        """
        if block.window not in self._masks:
            self._masks[block.window] = self._stored_mask(keys.shape[2], block.window, queries.device)
        mask = self._masks[block.window]
        if self.time <= _FEW_QUERIES:
            return dense_attention(queries, keys, values, mask, block.scale)
        assert mask is not None
        group = block.heads // block.kv_heads
        keys, values = (tensor.repeat_interleave(group, dim=1) for tensor in (keys, values))
        blind = ~mask.any(dim=2)  # padding: let it see all, then set its output to zero
        mixed = functional.scaled_dot_product_attention(
            queries.transpose(1, 2),
            keys,
            values,
            attn_mask=(mask | blind[:, :, None])[:, None],
            scale=block.scale,
        )
        return mixed.transpose(1, 2).masked_fill(blind[:, :, None, None], 0)

    def _stored_mask(self, keys: int, window: int | None, device: torch.device) -> Tensor | None:
        if self._stored_segments is not None:
            assert self._segments is not None
            return visible(self._segments, self._stored_segments, self._past, window=window)
        if self.time == 1 and (window is None or keys <= window):
            return None
        return _band(self.time, keys, self._past, window, device)[None]


def _document_attention(queries: Tensor, keys: Tensor, values: Tensor, block: BlockSpec) -> Tensor:
    """Attention within whole documents of one length, [documents, time, heads, head_dim] each."""
    length = queries.shape[1]
    query, key, value = (tensor.transpose(1, 2) for tensor in (queries, keys, values))
    if block.causal and block.window is not None and length > block.window:
        return _window_attention(query, key, value, block.window, block.scale).transpose(1, 2)
    mixed = functional.scaled_dot_product_attention(
        query, key, value, is_causal=block.causal, scale=block.scale
    )
    return mixed.transpose(1, 2)


def _window_attention(query: Tensor, key: Tensor, value: Tensor, window: int, scale: float) -> Tensor:
    """Causal attention over the last ``window`` keys, band by band: [documents, heads, time, head_dim]."""
    length, step = query.shape[2], max(window, _SMALLEST_BAND)
    mixed = []
    for start in range(0, length, step):
        end, low = min(start + step, length), max(0, start - window + 1)
        mask = _band(end - start, end - low, start - low, window, query.device)
        mixed.append(
            functional.scaled_dot_product_attention(
                query[:, :, start:end], key[:, :, low:end], value[:, :, low:end], attn_mask=mask, scale=scale
            )
        )
    return torch.cat(mixed, dim=2)


def lay_out(
    batch: int,
    time: int,
    device: torch.device,
    positions: Tensor | None,
    segments: Tensor | None,
    cache: KeyValueCache | None,
) -> Layout:
    """Settle what the caller left open, and note the tokens in the cache if there is one.

    Without ``segments``, each row goes on with the last document of its cached tokens, or is one
    document. Without ``positions``, each document counts from 0, or from where the cache left it.
    """
    for name, tensor in (("positions", positions), ("segments", segments)):
        if tensor is not None and tuple(tensor.shape) != (batch, time):
            raise PunaError(
                f"{name} must have the shape of input_ids", found=tuple(tensor.shape), expected=(batch, time)
            )
    continued = cache is not None and cache.length > 0
    steps = torch.arange(time, device=device)[None]
    last_position: Tensor | None = None
    if cache is not None and continued and (positions is None or segments is None):
        last_document, last_position = cache.last()
        if segments is None and cache.segments is not None:
            segments = last_document.expand(batch, time)
            steps = steps.expand(batch, time)
        elif segments is not None:
            # Only the first document of a row can go on from the cache.
            goes_on = (segments == segments[:, :1]).cumprod(dim=1) * (segments[:, :1] == last_document)
            last_position = torch.where(goes_on.bool(), last_position, -1)
    if positions is None:
        counted = steps if segments is None else _count_in_documents(segments)
        positions = counted if last_position is None else counted + last_position + 1
    layout = Layout(batch, time, positions, segments, cache)
    if cache is not None:
        cache.place(positions, segments)
    return layout


def _count_in_documents(segments: Tensor) -> Tensor:
    """Positions [batch, time] that start at 0 with each run of one document; 0 at padding."""
    steps = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    counted = steps - torch.where(starts, steps, 0).cummax(dim=1).values
    return counted.masked_fill(segments == PADDING, 0)


def _documents(segments: Tensor) -> tuple[list[int], list[bool]]:
    """Lengths of the runs of one document, rows one after another, and whether each is not padding."""
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    places = starts.flatten().nonzero().flatten()
    documents = segments.flatten()[places]
    rows = places // segments.shape[1]
    ids: list[int] = documents.tolist()
    pairs = [pair for pair in zip(rows.tolist(), ids, strict=True) if pair[1] != PADDING]
    if len(set(pairs)) < len(pairs):
        raise PunaError(
            "the tokens of a document must be contiguous",
            found="a segment id that comes back later in the same row",
            fix="give each document of a row its own id",
        )
    ends = torch.cat((places[1:], places.new_tensor([segments.numel()])))
    return (ends - places).tolist(), [document != PADDING for document in ids]
