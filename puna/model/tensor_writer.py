"""Writes safetensors a part at a time, so that what is written never stands in memory whole.

The form is that of the format's description: the length of the header in 8 bytes, the header in JSON with
each tensor's type, shape and place, padded to a multiple of 8 bytes, and the tensors one after another.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from puna.core.files import write_json
from puna.model.hf import INDEX, SINGLE, bytes_of
from puna.model.weights import check_finite

NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
SHARD_BYTES = 5_000_000_000


class TensorWriter:
    """Writes tensors of ``shapes`` in that order into ``folder``; :meth:`add` takes their parts in turn.

    Above ``shard_bytes`` they are cut into shards with an index; ``file`` gives a single file its name.
    Leaving the block before every tensor is whole is an error of the caller.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        file: str | None = None,
        *,
        shard_bytes: float = SHARD_BYTES,
    ) -> None:
        self.folder = folder
        self.dtype = dtype
        self._counts = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
        self._shapes = dict(shapes)
        self._shards = self._cut(float("inf") if file else shard_bytes)
        self._file_name = file
        self._pending = [name for shard in self._shards for name in shard]
        self._written = 0
        self._open: BinaryIO | None = None
        self._shard = -1

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is None:
            self._skip_empty()
            if self._pending or self._written:
                raise RuntimeError(f"tensors are not whole: {self._pending[:3]}")
            while self._shard < len(self._shards) - 1:
                self._next_shard()
            if len(self._shards) > 1:
                self._write_index()
        if self._open is not None:
            self._open.close()

    def add(self, name: str, part: Tensor) -> None:
        """Append a part, laid out flat, to the tensor ``name``: the first one that is not whole."""
        self._skip_empty()
        if not self._pending or self._pending[0] != name:
            raise RuntimeError(f"{name} is written out of turn")
        if not self._written and name in self._first_of_shards():
            self._next_shard()
        stored = part.detach().reshape(-1).to(self.dtype).contiguous()
        check_finite(name, stored, self.folder)
        assert self._open is not None
        self._open.write(bytes_of(stored))
        self._written += stored.numel()
        if self._written > self._counts[name]:
            raise RuntimeError(f"{name} is written twice")
        if self._written == self._counts[name]:
            self._pending.pop(0)
            self._written = 0

    def _skip_empty(self) -> None:
        while self._pending and not self._counts[self._pending[0]]:
            self._pending.pop(0)

    def _first_of_shards(self) -> set[str]:
        return {shard[0] for shard in self._shards[self._shard + 1 :] if shard}

    def _cut(self, shard_bytes: float) -> list[list[str]]:
        shards: list[list[str]] = [[]]
        filled = 0
        for name, count in self._counts.items():
            size = count * self.dtype.itemsize
            if shards[-1] and filled + size > shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += size
        return shards

    def _name(self, shard: int) -> str:
        if self._file_name is not None:
            return self._file_name
        count = len(self._shards)
        return SINGLE if count == 1 else f"model-{shard + 1:05d}-of-{count:05d}.safetensors"

    def _next_shard(self) -> None:
        """Close the file that is full and begin the next one with its header."""
        if self._open is not None:
            self._open.close()
        self._shard += 1
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in self._shards[self._shard]:
            begin, end = end, end + self._counts[name] * self.dtype.itemsize
            shape = list(self._shapes[name])
            header[name] = {"dtype": NAMES[self.dtype], "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._open = (self.folder / self._name(self._shard)).open("wb", buffering=0)
        self._open.write(len(text).to_bytes(8, "little") + text)

    def _write_index(self) -> None:
        places = {name: self._name(number) for number, shard in enumerate(self._shards) for name in shard}
        total = {"total_size": sum(self._counts.values()) * self.dtype.itemsize}
        write_json(self.folder / INDEX, {"metadata": total, "weight_map": places})
