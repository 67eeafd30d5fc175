"""The header of a GGUF file: metadata and the table of tensors, every count and offset checked.

The layout is that of the GGUF specification, versions 2 and 3, little-endian:
magic, version, tensor count, metadata count, metadata, tensor table, padding, tensor data.
A file is data from somewhere else: nothing it says is believed before it is compared with its size.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from puna.core.errors import PunaError

MAGIC = b"GGUF"
_ARRAY = 9
_STRING = 8
# Value type number -> numpy type, for everything of a fixed size.
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRUCTS = {
    number: struct.Struct("<" + numpy.dtype(name).char) for number, name in _SCALARS.items() if number < 10
}
_STRUCTS |= {10: struct.Struct("<Q"), 11: struct.Struct("<q"), 12: struct.Struct("<d")}
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


@dataclass(frozen=True)
class Storage:
    """How a tensor type is stored: ``block`` weights take ``size`` bytes."""

    name: str
    block: int
    size: int


STORAGE = {
    0: Storage("F32", 1, 4),
    1: Storage("F16", 1, 2),
    2: Storage("Q4_0", 32, 18),
    3: Storage("Q4_1", 32, 20),
    6: Storage("Q5_0", 32, 22),
    7: Storage("Q5_1", 32, 24),
    8: Storage("Q8_0", 32, 34),
    10: Storage("Q2_K", 256, 84),
    11: Storage("Q3_K", 256, 110),
    12: Storage("Q4_K", 256, 144),
    13: Storage("Q5_K", 256, 176),
    14: Storage("Q6_K", 256, 210),
    30: Storage("BF16", 1, 2),
}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the table: its shape in torch's order, its storage, and where its bytes are."""

    name: str
    shape: tuple[int, ...]
    storage: Storage
    offset: int
    size: int


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file, mapped into memory: its metadata and tensor table. Bytes are read when asked for."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    data: mmap.mmap

    def bytes_of(self, tensor: GgufTensor) -> numpy.ndarray[Any, numpy.dtype[numpy.uint8]]:
        """The stored bytes of one tensor, [rows, bytes per row], read-only and not copied."""
        flat = numpy.frombuffer(self.data, dtype=numpy.uint8, count=tensor.size, offset=tensor.offset)
        return flat.reshape(math.prod(tensor.shape[:-1]), -1)


class _Cursor:
    """Reads values one after the other and never past the end of the file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data = data
        self.path = path
        self.size = len(data)
        self.offset = 0

    def fail(self, message: str, **parts: Any) -> PunaError:
        fix = "the file is damaged or cut short: fetch or write it again"
        return PunaError(f"not a readable GGUF: {message}", where=self.path, **{"fix": fix, **parts})

    def take(self, count: int, what: str) -> int:
        """Move over ``count`` bytes and give their start."""
        start = self.offset
        if count > self.size - start:
            raise self.fail(
                f"{what} runs past the end of the file",
                found=f"{count} bytes at offset {start}, file of {self.size} bytes",
            )
        self.offset = start + count
        return start

    def number(self, layout: struct.Struct, what: str) -> Any:
        return layout.unpack_from(self.data, self.take(layout.size, what))[0]

    def string(self, what: str) -> str:
        start = self.take(self.number(_U64, what), what)
        try:
            return self.data[start : self.offset].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8", found=error) from None

    def value(self, what: str) -> Any:
        kind = self.number(_U32, what)
        if kind == _STRING:
            return self.string(what)
        if kind in _STRUCTS:
            return self.number(_STRUCTS[kind], what)
        if kind != _ARRAY:
            raise self.fail(f"{what} has an unknown type", found=kind)
        element = self.number(_U32, what)
        count = self.number(_U64, what)
        if element == _STRING:
            if count * 8 > self.size - self.offset:  # each string has a length of 8 bytes
                self.take(count * 8, what)
            return [self.string(what) for _ in range(count)]
        if element not in _SCALARS:
            raise self.fail(f"{what} is an array of an unknown type", found=element)
        kind_of_element = numpy.dtype(_SCALARS[element])
        start = self.take(count * kind_of_element.itemsize, what)
        return numpy.frombuffer(self.data, dtype=kind_of_element, count=count, offset=start).tolist()


def open_gguf(path: Path | str) -> GgufFile:
    """Map a GGUF file and read its header (about 0.2 s for a vocabulary of 50k); no tensor is touched.

    Raises :class:`PunaError` for anything that is not a whole, little-endian GGUF of version 2 or 3
    with tensors inside the file.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise PunaError("not a GGUF file", where=path, expected="a file that starts with 'GGUF'")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise PunaError("file not found", where=path) from None
    except OSError as error:
        raise PunaError("the file cannot be read", where=path, found=error.strerror) from None
    cursor = _Cursor(data, path)
    cursor.take(4, "the magic")
    version = cursor.number(_U32, "the version")
    if version not in (2, 3):
        big_endian = version & 0xFFFF == 0
        raise PunaError(
            "this GGUF version cannot be read",
            where=path,
            found="a big-endian file" if big_endian else f"version {version}",
            expected="version 2 or 3, little-endian",
        )
    tensor_count = cursor.number(_U64, "the tensor count")
    value_count = cursor.number(_U64, "the metadata count")
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key = cursor.string("a metadata key")
        if key in metadata:
            raise cursor.fail(f"metadata key {key!r} appears twice")
        metadata[key] = cursor.value(f"metadata {key!r}")
    if metadata.get("split.count", 1) not in (0, 1):
        raise PunaError(
            "this GGUF is one part of several",
            where=path,
            fix="join the parts first: llama-gguf-split --merge FIRST_PART OUT",
        )
    return GgufFile(path, metadata, _tensor_table(cursor, tensor_count, metadata), data)


def _tensor_table(cursor: _Cursor, count: int, metadata: dict[str, Any]) -> dict[str, GgufTensor]:
    entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name = cursor.string("a tensor name")
        if name in entries:
            raise cursor.fail(f"tensor {name!r} appears twice")
        rank = cursor.number(_U32, f"tensor {name!r}")
        if not 1 <= rank <= 4:
            raise cursor.fail(f"tensor {name!r} has {rank} dimensions", expected="1 to 4")
        # GGUF names the fastest dimension first, torch last.
        shape = tuple(cursor.number(_U64, f"tensor {name!r}") for _ in range(rank))[::-1]
        kind = cursor.number(_U32, f"tensor {name!r}")
        entries[name] = shape, kind, cursor.number(_U64, f"tensor {name!r}")

    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise cursor.fail("general.alignment", found=alignment, expected="a power of two")
    start = -(-cursor.offset // alignment) * alignment
    return {name: _placed(cursor, name, start, *entry) for name, entry in entries.items()}


def _placed(
    cursor: _Cursor, name: str, start: int, shape: tuple[int, ...], kind: int, offset: int
) -> GgufTensor:
    """A tensor whose bytes are known to lie inside the file."""
    if kind not in STORAGE:
        raise PunaError(
            f"tensor {name!r} is stored in a type puna cannot read",
            where=cursor.path,
            found=f"GGML type {kind}",
            expected=f"one of {', '.join(storage.name for storage in STORAGE.values())}",
            fix="use a file quantised to one of these types",
        )
    storage = STORAGE[kind]
    if 0 in shape or shape[-1] % storage.block:
        raise cursor.fail(
            f"tensor {name!r} of type {storage.name} has an impossible shape",
            found=list(shape),
            expected=f"a last dimension that {storage.block} divides",
        )
    size = math.prod(shape) // storage.block * storage.size
    if start + offset + size > cursor.size:
        raise cursor.fail(
            f"tensor {name!r} runs past the end of the file",
            found=f"{size} bytes at offset {start + offset}, file of {cursor.size} bytes",
        )
    return GgufTensor(name, shape, storage, start + offset, size)


def read_gguf_metadata(path: Path | str) -> dict[str, Any]:
    """The metadata of a GGUF file as plain Python values (numbers, strings, lists); no tensor is read."""
    return open_gguf(path).metadata
