"""What readers give: records, in parts that are read independently of one another, each with bounds.

A reader cuts a source into parts (a file, or a range of one) that different workers read. A record that
cannot be read fails alone: it keeps its place and says why.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import pydantic

from puna.core.errors import PunaError
from puna.core.stage import Parameters
from puna.data.sources.common import SourceSettings

PIECE = 1 << 20  # bytes read at once
_UNPACKED = 1 << 16  # bytes unpacked at once: what is lost where a packed file breaks off
_FREE_BYTES = 256 << 20  # unpacked bytes of a file that are never too many


class Limits(Parameters):
    """Bounds of what one document or file may cost."""

    document_bytes: pydantic.PositiveInt = 16 << 20
    """Most bytes of one document (UTF-8) or raw page; a larger one fails."""
    unpacking: pydantic.PositiveFloat = 250.0
    """Most bytes that a byte of a compressed file may unpack to, once 256 MiB were unpacked; the rest of
    such a file fails."""


@dataclass(frozen=True)
class Part:
    """A part of a source: a file, or the records of it that begin from byte or row ``start`` to ``stop``."""

    file: str
    name: str
    start: int = 0
    stop: int | None = None

    @property
    def size(self) -> int:
        """Bytes of the file; 0 if it is none."""
        try:
            return Path(self.file).stat().st_size if self.file else 0
        except OSError:
            return 0


@dataclass
class Record:
    """One document as it was read: text, or the raw ``content`` of a page; or why it ``failed``."""

    key: str
    text: str | None = None
    content: bytes | None = None
    media: str = ""
    url: str = ""
    language: str = ""
    meta: str = ""
    failed: str = ""


Cut = Callable[[Any], list[Part]]
Read = Callable[[Any, Part, Limits], Iterator[Record]]
Settings = TypeVar("Settings", bound=SourceSettings)


@dataclass(frozen=True)
class Reader:
    """How a source is cut into parts, and how one of them is read."""

    parts: Cut
    read: Read


READERS: dict[type[SourceSettings], Reader] = {}
"""Readers by the class of their settings."""


def reader(settings: type[Settings], parts: Callable[[Settings], list[Part]]) -> Callable[[Read], Read]:
    """Register a function as what reads the parts of sources with these ``settings``."""

    def register(function: Read) -> Read:
        READERS[settings] = Reader(parts, function)
        return function

    return register


def too_large(limits: Limits) -> str:
    """Why a document that is over the bound failed."""
    return f"larger than {limits.document_bytes:,} bytes"


def readable(text: str, limits: Limits) -> str:
    """Why a text cannot be kept: too large, or not to be written as UTF-8; "" if it can."""
    if len(text) > limits.document_bytes:
        return too_large(limits)
    try:
        size = len(text) if text.isascii() else len(text.encode("utf-8"))
    except UnicodeEncodeError:
        return "the text holds half a surrogate pair"
    return too_large(limits) if size > limits.document_bytes else ""


@dataclass
class Bomb(Exception):  # noqa: N818  (what it is called)
    """A compressed file unpacks to more than it may."""

    unpacked: int

    def __str__(self) -> str:
        return f"the file unpacks to more than {self.unpacked:,} bytes"


class Unpacked(io.RawIOBase):
    """The bytes of a compressed file, with the bound on how much they may become."""

    def __init__(self, stream: IO[bytes], packed: int, limits: Limits) -> None:
        self.stream = stream
        self.most = max(_FREE_BYTES, int(packed * limits.unpacking))
        self.total = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer``; raises :class:`Bomb` past the bound."""
        piece = self.stream.read(min(len(buffer), _UNPACKED))
        self.total += len(piece)
        if self.total > self.most:
            raise Bomb(self.most)
        buffer[: len(piece)] = piece
        return len(piece)


def opened(path: str, limits: Limits) -> IO[bytes]:
    """A file's bytes, unpacked if its name ends in .gz, .zst, .bz2 or .lz4."""
    import pyarrow

    packing = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}.get(Path(path).suffix)
    try:
        raw = open(path, "rb")  # noqa: SIM115  (closed with what wraps it)
    except OSError as error:
        raise PunaError("the file cannot be opened", where=path, found=error) from None
    if packing is None:
        return io.BufferedReader(raw, PIECE)
    size = Path(path).stat().st_size
    stream = pyarrow.CompressedInputStream(raw, packing)
    return io.BufferedReader(Unpacked(stream, size, limits), PIECE)


def lines_of(
    stream: IO[bytes], limits: Limits, stop: int | None = None
) -> Iterator[tuple[int, bytes | None]]:
    """Lines with the place of their first byte; None for one over the bound, which is passed over.

    A line is read if it begins before ``stop``.
    """
    place = stream.tell() if stop is not None else 0
    most = limits.document_bytes * 2 + PIECE  # JSON's escapes and other columns may take room too
    while stop is None or place < stop:
        line = stream.readline(most + 1)
        if not line:
            return
        size = len(line)
        if size > most and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = stream.readline(PIECE)
                size += len(line)
            yield place, None
        else:
            yield place, line
        place += size
