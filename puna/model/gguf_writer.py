"""Writes a decoder as a GGUF file that llama.cpp opens: F16, Q8_0 or packed matrices, F32 vectors.

Kind "packed" writes a matrix that lies on a grid (``Llama.grids``) in the type whose blocks hold that grid,
level by level: Q4_0 (up to 4 bits, symmetric), Q4_1 (up to 4 bits) or Q8_0 (8 bits, symmetric). What lies on
none is F16.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy
import torch
from torch import Tensor

from puna.core.errors import PunaError, unknown_name
from puna.core.files import write_aside
from puna.model.gguf_header import STORAGE
from puna.model.gguf_layout import ROPE_FACTORS, gguf_name, metadata_from_spec, row_order
from puna.model.gguf_reader import import_gguf
from puna.model.hf import plain_parameters
from puna.model.llama import Llama
from puna.model.uniform_grid import UniformGrid
from puna.model.weights import progress

GgufKind = Literal["f16", "q8_0", "packed"]
# llama.cpp's number for "mostly this type", kept in general.file_type.
_FILE_TYPES = {"f16": 1, "q8_0": 7, "packed": 2}
_STORAGE = {storage.name: storage for storage in STORAGE.values()}
_CHUNK = 1 << 17  # weights encoded at a time
_LARGEST_UNSIGNED = 0xFFFFFFFF


def write_gguf(
    model: Llama, file: Path | str, *, kind: GgufKind = "f16", metadata: Mapping[str, Any]
) -> None:
    """Write ``file`` whole, or not at all.

    ``metadata`` holds the tokenizer and template under GGUF's keys (``tokenizer.*``, ``general.name``
    and the like), as plain values: text, truth values, numbers, lists. A matrix whose rows are no
    multiple of 32 stays F16 in a Q8_0 file, as llama.cpp does it. Raises :class:`PunaError` for a
    decoder llama.cpp cannot compute, and for weights beyond the range of float16.
    """
    if kind not in get_args(GgufKind):
        raise unknown_name("GGUF kind", kind, get_args(GgufKind))
    gguf = import_gguf("writing a GGUF file")
    architecture, described, factors = metadata_from_spec(model.spec, file)
    described |= {"general.file_type": _FILE_TYPES[kind], "general.quantization_version": 2}
    _check_metadata(metadata, {"general.architecture", *described}, model.spec.vocab_size, file)
    if kind == "packed" and not model.grids:
        raise PunaError(
            "no matrix of this model lies on a grid", where=file, fix="quantise it first, or choose q8_0"
        )
    tensors = {
        name: (parameter, _storage_for(parameter, kind, model.grids.get(name)))
        for name, parameter in plain_parameters(model, file).items()
    }
    if factors is not None:
        tensors = {ROPE_FACTORS: (torch.from_numpy(factors), "F32"), **tensors}
    with write_aside(file) as aside, contextlib.closing(gguf.GGUFWriter(aside, architecture)) as writer:
        for key, value in {**described, **metadata}.items():
            writer.add_key_value(key, value, _value_type(gguf, key, value))
        for name, (tensor, storage) in tensors.items():
            theirs = name if name == ROPE_FACTORS else gguf_name(name)
            size = tensor.numel() // _STORAGE[storage].block * _STORAGE[storage].size
            kind_number = gguf.GGMLQuantizationType[storage]
            writer.add_tensor_info(theirs, list(tensor.shape), numpy.dtype(numpy.float32), size, kind_number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with progress(f"writing {Path(file).name}", model.spec.parameter_count()) as advance:
            for name, (tensor, storage) in tensors.items():
                order = None if name == ROPE_FACTORS else row_order(architecture, model.spec, name)
                tensor = tensor.cpu()
                if kind == "packed" and storage != "F16" and tensor.dim() == 2:
                    writer.write_tensor_data(pack_blocks(tensor, model.grids[name], storage, order))
                else:
                    tensor = tensor if order is None else tensor[order]
                    writer.write_tensor_data(_encoded(gguf, name, storage, tensor.contiguous(), file))
                advance(tensor.numel())


def _check_metadata(metadata: Mapping[str, Any], reserved: set[str], vocab_size: int, where: object) -> None:
    clash = sorted(reserved & metadata.keys())
    if clash:
        raise PunaError(f"metadata {clash[0]!r} is written from the spec and cannot be given", where=where)
    tokens = metadata.get("tokenizer.ggml.tokens")
    if tokens is not None and len(tokens) != vocab_size:
        raise PunaError(
            "a GGUF needs exactly one token for each row of the embedding",
            where=where,
            found=f"{len(tokens):,} tokens",
            expected=f"{vocab_size:,}",
            fix="fill up with unused tokens, or shorten the embedding",
        )


def _value_type(gguf: Any, key: str, value: Any) -> Any:
    """The GGUF type of a plain value; whole numbers are unsigned unless negative, as llama.cpp expects."""
    types = gguf.GGUFValueType
    if isinstance(value, bool):
        return types.BOOL
    if isinstance(value, str):
        return types.STRING
    if isinstance(value, float):
        return types.FLOAT32
    if isinstance(value, int) and -(2**31) <= value <= _LARGEST_UNSIGNED:
        return types.UINT32 if value >= 0 else types.INT32
    if isinstance(value, (list, tuple)):
        return types.ARRAY
    raise PunaError(f"metadata {key!r} has no GGUF type", found=repr(value)[:80])


def _storage_for(parameter: Tensor, kind: GgufKind, grid: UniformGrid | None) -> str:
    if parameter.dim() == 1:
        return "F32"
    if kind == "packed":
        return _packed_storage(parameter, grid)
    return "Q8_0" if kind == "q8_0" and parameter.shape[-1] % _STORAGE["Q8_0"].block == 0 else "F16"


def _packed_storage(parameter: Tensor, grid: UniformGrid | None) -> str:
    """The type whose blocks hold the grid; F16 where none does, or the weights lie on none."""
    inputs = parameter.shape[-1]
    if grid is None or inputs % 32 or grid.packed(inputs) is None or grid.levels(parameter) is None:
        return "F16"
    if grid.bits <= 4:
        return "Q4_0" if bool((grid.zero == 8).all()) else "Q4_1"
    return "Q8_0" if grid.bits == 8 and grid.symmetric else "F16"


def pack_blocks(
    weight: Tensor, grid: UniformGrid, storage: str, order: Tensor | None = None
) -> numpy.ndarray[Any, Any]:
    """The bytes of a matrix on ``grid`` in blocks of 32: uint8 [outputs, bytes of a row], rows in ``order``.

    Q4_0: step, 16 bytes; Q4_1: step, smallest weight, 16 bytes; input i of a block in the low half of byte i,
    input i + 16 in the high half. Q8_0: step, 32 signed bytes. Steps and smallest weights in half precision.
    """
    levels, packed = grid.levels(weight), grid.packed(weight.shape[1])
    assert levels is not None and packed is not None
    step, low = packed  # [outputs, blocks]
    rows = torch.arange(len(weight)) if order is None else order
    levels, step, low = levels[rows], step[rows], low[rows]
    blocks = levels.view(len(levels), -1, 32)
    halves = [step] if storage != "Q4_1" else [step, low]
    heads = [half.half()[:, :, None].view(torch.uint8) for half in halves]
    if storage == "Q8_0":
        body = (blocks.int() - 128).to(torch.int8).view(torch.uint8)
    else:
        body = blocks[:, :, :16] | blocks[:, :, 16:] << 4
    found: numpy.ndarray[Any, Any] = torch.cat((*heads, body), dim=2).flatten(1).contiguous().numpy()
    return found


def _encoded(gguf: Any, name: str, storage: str, tensor: Tensor, where: object) -> numpy.ndarray[Any, Any]:
    """The bytes of one tensor as an array."""
    if storage == "F32":
        plain: numpy.ndarray[Any, Any] = tensor.float().numpy()
        return plain
    half = tensor.half()
    if not torch.isfinite(half.sum(dtype=torch.float32)) and not torch.isfinite(half).all():
        raise PunaError(
            f"tensor {name!r} holds numbers too large for a GGUF of float16 or Q8_0",
            where=where,
            found=f"{tensor.abs().max().item():g}",
            expected="at most 65504",
        )
    if storage == "F16":
        return half.numpy()
    step = max(1, _CHUNK // tensor.shape[-1])
    kind = gguf.GGMLQuantizationType[storage]
    # Each chunk as one long row, since blocks do not cross rows and the package loops over rows in Python.
    chunks = (tensor[start : start + step] for start in range(0, len(tensor), step))
    parts = [gguf.quantize(chunk.float().numpy().reshape(1, -1), kind).reshape(-1) for chunk in chunks]
    return numpy.concatenate(parts)
