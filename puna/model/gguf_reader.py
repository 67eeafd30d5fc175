"""Reads a GGUF file into a decoder: every weight dequantised once, straight into its parameter.

The ``gguf`` package turns quantised blocks into float32; it is needed for quantised files only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from puna.core.errors import PunaError
from puna.model.gguf_header import GgufFile, GgufTensor, open_gguf
from puna.model.gguf_layout import ROPE_FACTORS, architecture_of, gguf_name, row_order, spec_from_metadata
from puna.model.llama import Llama
from puna.model.spec import LlamaSpec
from puna.model.weights import WeightSource, expected_shapes, fill_llama

# Weights dequantised at a time: small enough for the processor's cache, large enough for numpy.
_CHUNK = 1 << 17
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def import_gguf(purpose: str) -> Any:
    """The ``gguf`` package, or the error that tells how to install it."""
    try:
        import gguf
    except ImportError:
        raise PunaError(f"{purpose} needs the package gguf", fix="pip install puna[gguf]") from None
    return gguf


def read_gguf(
    path: Path | str,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    adjust: Callable[[LlamaSpec], LlamaSpec] = lambda spec: spec,
) -> Llama:
    """Open a GGUF file of architecture llama or qwen2; ``adjust`` may change the spec first.

    Types read: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K to Q6_K.
    """
    spec, source = open_gguf_weights(path)
    return fill_llama(adjust(spec), source, dtype=dtype, device=device)


def open_gguf_weights(path: Path | str) -> tuple[LlamaSpec, WeightSource]:
    """The spec of a GGUF file and where its weights lie; none is read yet."""
    source = _GgufSource(open_gguf(path))
    return source.spec, source


class _GgufSource:
    """A GGUF file under the decoder's parameter names."""

    def __init__(self, file: GgufFile) -> None:
        self.where = file.path
        self._file = file
        self._architecture = architecture_of(file.metadata, file.path)
        factors = file.tensors.get(ROPE_FACTORS)
        shapes = {name: tensor.shape for name, tensor in file.tensors.items() if name != ROPE_FACTORS}
        read = None if factors is None else self._chunk(factors, self._rows(factors)).numpy()
        self.spec = spec_from_metadata(file.metadata, shapes, read, file.path)
        theirs = {gguf_name(name): name for name in expected_shapes(self.spec, file.path)}
        # What the spec does not know keeps its own name, and is refused under it.
        self._tensors = {theirs.get(name, name): file.tensors[name] for name in shapes}
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: tensor.shape for name, tensor in self._tensors.items()
        }

    def read_into(self, name: str, target: Tensor) -> None:
        """Dequantise chunk by chunk; rows go where the decoder expects them."""
        tensor = self._tensors[name]
        rows = self._rows(tensor)
        order = row_order(self._architecture, self.spec, name)
        if order is None:
            flat = target.view(-1)
            step = max(1, _CHUNK // tensor.shape[-1])
            width = tensor.shape[-1]
            for start in range(0, len(rows), step):
                chunk = self._chunk(tensor, rows[start : start + step])
                flat[start * width : start * width + chunk.numel()] = chunk.to(target.device)
        else:
            whole = self._chunk(tensor, rows).view(target.shape)
            target[order.to(target.device)] = whole.to(target.device, target.dtype)

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Rows that the part cuts are dequantised whole; a tensor whose rows are reordered always is."""
        tensor = self._tensors[name]
        if row_order(self._architecture, self.spec, name) is not None:
            whole = torch.empty(tensor.shape, dtype=self.dtype(name))
            self.read_into(name, whole)
            return whole.view(-1)[start:stop].clone()
        width = tensor.shape[-1]
        first, last = start // width, -(-stop // width)
        found = self._chunk(tensor, self._rows(tensor)[first:last])
        return found[start - first * width : stop - first * width]

    def dtype(self, name: str) -> torch.dtype:
        return _PLAIN.get(self._tensors[name].storage.name, torch.float32)

    def _rows(self, tensor: GgufTensor) -> numpy.ndarray[Any, numpy.dtype[numpy.uint8]]:
        """Stored bytes, [rows, bytes per row]."""
        return self._file.bytes_of(tensor)

    @staticmethod
    def _chunk(tensor: GgufTensor, rows: numpy.ndarray[Any, numpy.dtype[numpy.uint8]]) -> Tensor:
        """The weights in ``rows`` as a flat tensor, float32 or the plain type they are stored in."""
        name = tensor.storage.name
        if name in _PLAIN:
            return torch.from_numpy(rows.copy().reshape(-1)).view(_PLAIN[name])
        gguf = import_gguf(f"reading {name} weights")
        # As one long row: the package loops in Python over groups of rows, and blocks do not cross rows.
        flat = gguf.dequantize(rows.reshape(1, -1), gguf.GGMLQuantizationType[name])
        return torch.from_numpy(flat.reshape(-1))
