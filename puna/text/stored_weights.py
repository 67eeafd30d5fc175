"""A model's weights as they lie on disk, read tensor by tensor and part by part, never whole, as float32."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from puna.model.adapter_files import ADAPTER_CONFIG, StoredAdapter, open_adapter
from puna.model.checkpoint import open_weights
from puna.model.hf import bytes_of
from puna.model.spec import LlamaSpec
from puna.model.weights import WeightSource
from puna.text import pretrained

PART = 1 << 17
"""Weights in a part, but at least one row of the tensor: 512 KB in float32, so that some fit in a cache."""


class Parts(Protocol):
    """Tensors by name that are read in parts, as float32."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each tensor."""

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """The weights from ``start`` to ``stop`` of the tensor laid out flat; they are the caller's own."""


def count_of(shape: tuple[int, ...]) -> int:
    """Weights in a tensor of this shape."""
    return torch.Size(shape).numel()


def parts_of(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Where the parts of a tensor begin and end, laid out flat: whole rows, about :data:`PART` weights."""
    count, width = count_of(shape), shape[-1] if shape else 1
    step = max(1, PART // max(1, width)) * width
    return [(start, min(start + step, count)) for start in range(0, count, step)]


@dataclass
class Weights:
    """A model's weights on disk; ``adapter``, if there is one, is added as they are read."""

    where: Path
    spec: LlamaSpec
    source: WeightSource
    adapter: StoredAdapter | None = None
    _last: tuple[tuple[str, int, int], Tensor] | None = None

    @classmethod
    def open(cls, source: str | Path, adapter: str | Path | None = None) -> Weights:
        """Open a checkpoint folder, GGUF file, asset or hub id; an adapter folder opens with its base."""
        path = pretrained.locate(source)
        if adapter is None and path.is_dir() and (path / ADAPTER_CONFIG).exists():
            path, adapter = pretrained.locate(pretrained.base_of(path)), path
        spec, weights = open_weights(path)
        opened = cls(path, spec, weights)
        if adapter is not None:
            opened.adapter = open_adapter(pretrained.locate(adapter), weights.shapes)
        return opened

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each tensor under the decoder's names."""
        return self.source.shapes

    @property
    def label(self) -> str:
        """What errors call it."""
        return f"{self.where}+{self.adapter.where}" if self.adapter else str(self.where)

    def dtype(self, name: str) -> torch.dtype:
        """The type that the tensor ``name`` is stored in."""
        return self.source.dtype(name)

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Part of a tensor laid out flat, float32."""
        found = self.source.part(name, start, stop).float()
        if self.adapter is not None:
            if name in self.adapter.full:
                return self.adapter.full_part(name, start, stop)
            low = self.adapter.low_rank_part(name, start, stop, self.shapes[name])
            if low is not None:
                found += low
        return found

    def seen_part(self, name: str, start: int, stop: int) -> Tensor:
        """:meth:`part`, not to be changed by the caller: the last one is kept, for the next delta."""
        if self._last is None or self._last[0] != (name, start, stop):
            self._last = None
            self._last = ((name, start, stop), self.part(name, start, stop))
        return self._last[1]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all names, shapes and weights, these as float32; reads all of them once."""
        digest = hashlib.sha256()
        for name in sorted(self.shapes):
            digest.update(json.dumps([name, list(self.shapes[name])]).encode())
            for start, stop in parts_of(self.shapes[name]):
                digest.update(bytes_of(self.part(name, start, stop)))
        return digest.hexdigest()
