"""Keys and values of tokens already read, with the document and position of each."""

from __future__ import annotations

import torch
from torch import Tensor

from puna.core.errors import PunaError
from puna.model.spec import LlamaSpec


class KeyValueCache:
    """Room for ``capacity`` tokens of ``batch`` rows; keys are stored rotated.

    Layers without attention take no room, expanded ones twice as much. Documents and positions are stored
    with the keys, so rows may be padded on either side and later tokens still find their own document and
    their own position. The cache is for inference: no gradient flows through it.
    """

    def __init__(
        self,
        spec: LlamaSpec,
        batch: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch < 1 or capacity < 1:
            raise PunaError(
                "a cache needs at least one row and one place", found=f"{batch} rows, {capacity} places"
            )
        both_ways = spec.layers_both_ways
        if both_ways:
            raise PunaError(
                "layers that attend both ways cannot be decoded with a cache",
                found=f"layers {', '.join(map(str, both_ways))} are not causal",
                fix="run the whole sequence without a cache",
            )
        self.batch, self.capacity, self.dtype = batch, capacity, dtype
        self.length = 0
        self._padded = False  # whether any stored token is of another document than 0
        self._segments = torch.zeros(batch, capacity, dtype=torch.int64, device=device)
        self._positions = torch.zeros(batch, capacity, dtype=torch.int64, device=device)
        self._stores: list[
            tuple[Tensor, Tensor] | None
        ] = []  # keys and values [batch, kv_heads, capacity, head_dim]
        for block in (slot.block for slot in spec.slots):
            shape = (batch, block.kv_heads, capacity, block.head_dim)
            pair = (
                torch.zeros(shape, dtype=dtype, device=device),
                torch.zeros(shape, dtype=dtype, device=device),
            )
            self._stores.append(pair if block.attention == "full" else None)

    @property
    def key_bytes(self) -> int:
        """Bytes of keys and values alone."""
        return sum(tensor.nbytes for pair in self._stores if pair is not None for tensor in pair)

    @property
    def bytes(self) -> int:
        """Bytes of everything stored: keys, values, documents and positions."""
        return self.key_bytes + self._segments.nbytes + self._positions.nbytes

    @property
    def segments(self) -> Tensor | None:
        """Documents of the stored tokens [batch, length], or None if all are of document 0."""
        return self._segments[:, : self.length] if self._padded else None

    @property
    def positions(self) -> Tensor:
        """Positions of the stored tokens [batch, length]; what stands at padding means nothing."""
        return self._positions[:, : self.length]

    def crop(self, length: int) -> None:
        """Forget every token after the first ``length``."""
        if not 0 <= length <= self.length:
            raise PunaError(
                "a cache can only be cropped to what it holds", found=length, expected=f"0 to {self.length}"
            )
        self.length = length
        self._padded = bool(self._segments[:, :length].any())

    def check_room(self, batch: int, time: int, dtype: torch.dtype) -> None:
        """Raise if ``time`` more tokens of ``batch`` rows, as keys and values of ``dtype``, do not fit."""
        if dtype != self.dtype:
            raise PunaError("the model's type is not the cache's", found=dtype, expected=self.dtype)
        if batch != self.batch:
            raise PunaError(
                "the batch does not match the cache", found=f"{batch} rows", expected=f"{self.batch} rows"
            )
        if self.length + time > self.capacity:
            raise PunaError(
                "the cache is full",
                found=f"{self.length} tokens stored and {time} more",
                expected=f"at most {self.capacity}",
                fix="make the cache with a larger capacity",
            )

    def last(self) -> tuple[Tensor, Tensor]:
        """Document and position [batch, 1] of each row's last token that is not padding.

        A row that holds none gives document 0 and position -1.
        """
        if self.length == 0:
            document = torch.zeros(self.batch, 1, dtype=torch.int64, device=self._segments.device)
            return document, document - 1
        if not self._padded:
            end = slice(self.length - 1, self.length)
            return self._segments[:, end], self._positions[:, end]
        places = torch.arange(1, self.length + 1, device=self._segments.device)
        place = ((self._segments[:, : self.length] >= 0) * places).amax(dim=1, keepdim=True) - 1  # -1: none
        found = place >= 0
        document = torch.where(found, self._segments.gather(1, place.clamp(min=0)), 0)
        return document, torch.where(found, self._positions.gather(1, place.clamp(min=0)), -1)

    def place(self, positions: Tensor, segments: Tensor | None) -> None:
        """Note the positions [batch or 1, time] and documents of tokens about to be appended."""
        new = slice(self.length, self.length + positions.shape[1])
        self._positions[:, new] = positions
        self._segments[:, new] = 0 if segments is None else segments
        self._padded = self._padded or segments is not None

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's keys and values, [batch, time, kv_heads, head_dim] each.

        Returns all that is stored for the layer, [batch, kv_heads, length, head_dim] each.
        """
        pair = self._stores[layer]
        if pair is None:
            raise PunaError("this layer has no attention and stores nothing", where=f"layer {layer}")
        end = self.length + keys.shape[1]
        for store, fresh in zip(pair, (keys, values), strict=True):
            store[:, :, self.length : end] = fresh.detach().transpose(1, 2)
        return pair[0][:, :, :end], pair[1][:, :, :end]

    def advance(self, time: int) -> None:
        """Count ``time`` tokens as stored; called once after all layers have appended."""
        self.length += time
