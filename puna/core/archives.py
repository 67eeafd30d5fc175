"""Reading zip and tar archives made by others: no path leaves its folder, nothing outgrows its bound."""

from __future__ import annotations

import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from puna.core.errors import PunaError

_PIECE = 1 << 20
UNREADABLE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    NotImplementedError,  # zipfile's, of a compression it lacks
    RuntimeError,  # zipfile's, of an encrypted member
    ValueError,  # zipfile's and tarfile's, of places and numbers that make no sense
    struct.error,
)
"""What reading a broken or foreign archive raises."""


def refuse_unsafe(member: str, *, where: object = None) -> str:
    """``member`` if it names a file below the archive's root, else a :class:`PunaError`."""
    path = PurePosixPath(member)
    unsafe = (
        path.is_absolute() or ".." in path.parts or "\\" in member or "\0" in member or member[1:2] == ":"
    )
    if unsafe or not path.parts:
        raise PunaError(
            "the archive holds a member with an unsafe path",
            where=where,
            found=repr(member),
            expected="a relative path without '..'",
            fix="do not use this archive: it was not made by an honest packer",
        )
    return member


@contextmanager
def open_zip(path: Path | str) -> Iterator[zipfile.ZipFile]:
    """Open a zip file or wheel; a broken one, or one with unsafe member names, is a :class:`PunaError`."""
    try:
        archive = zipfile.ZipFile(path)
    except FileNotFoundError:
        raise PunaError("file not found", where=path) from None
    except UNREADABLE as error:
        raise PunaError("not a readable zip archive or wheel", where=path, found=error) from None
    with archive:
        for name in archive.namelist():
            refuse_unsafe(name, where=path)
        yield archive


def pieces(archive: zipfile.ZipFile, member: str, *, limit: int) -> Iterator[bytes]:
    """The bytes of ``member`` piece by piece; more than ``limit`` bytes is a :class:`PunaError`.

    The bound holds for what is really unpacked, whatever the archive's directory claims.
    """
    where = f"{archive.filename}:{member}"
    total = 0
    try:
        with archive.open(member) as stream:
            for piece in iter(lambda: stream.read(_PIECE), b""):
                total += len(piece)
                if total > limit:
                    raise PunaError(
                        "the member unpacks to more than it may",
                        where=where,
                        found=f"over {limit:,} bytes",
                        expected=f"at most {limit:,} bytes",
                    )
                yield piece
    except KeyError:
        raise PunaError("no such member in the archive", where=where) from None
    except UNREADABLE as error:
        raise PunaError("the member cannot be unpacked", where=where, found=error) from None


def read_member(archive: zipfile.ZipFile, member: str, *, limit: int) -> bytes:
    """All bytes of ``member``, at most ``limit``."""
    return b"".join(pieces(archive, member, limit=limit))


def copy_member(archive: zipfile.ZipFile, member: str, target: IO[bytes], *, limit: int) -> int:
    """Unpack ``member`` into ``target``; returns its size in bytes, at most ``limit``."""
    return sum(target.write(piece) for piece in pieces(archive, member, limit=limit))


def tar_pieces(path: Path | str, member: str, *, limit: int) -> Iterator[bytes]:
    """The bytes of the file ``member`` of a tar archive, packed or not; over ``limit`` is an error.

    The archive is read up to that member and nothing is unpacked on the way, so that links and names
    inside it do no harm. A tar archive has no directory: time grows with what stands before the member.
    """
    where = f"{path}:{member}"
    try:
        with tarfile.open(path, "r|*") as archive:
            for entry in archive:
                if entry.name == member and entry.isfile():
                    yield from _of_entry(archive, entry, where, limit)
                    return
    except FileNotFoundError:
        raise PunaError("file not found", where=path) from None
    except UNREADABLE as error:
        raise PunaError("not a readable tar archive", where=path, found=error) from None
    raise PunaError("no such file in the archive", where=where)


def _of_entry(archive: tarfile.TarFile, entry: tarfile.TarInfo, where: str, limit: int) -> Iterator[bytes]:
    if entry.size > limit:
        raise PunaError(
            "the member unpacks to more than it may",
            where=where,
            found=f"{entry.size:,} bytes",
            expected=f"at most {limit:,} bytes",
        )
    stream = archive.extractfile(entry)
    assert stream is not None  # a plain file
    yield from iter(lambda: stream.read(_PIECE), b"")


def unpack_tar_folder(path: Path | str, folder: str, target: Path, *, limit: int) -> None:
    """Write the plain files below ``folder`` of a tar archive below ``target``; links are left out.

    More than ``limit`` bytes in all, a name that leads out of the folder, or no file is a :class:`PunaError`.
    """
    root, left, count = PurePosixPath(folder), limit, 0
    try:
        with tarfile.open(path, "r|*") as archive:
            for entry in archive:
                if not entry.isfile() or not PurePosixPath(entry.name).is_relative_to(root):
                    continue
                refuse_unsafe(entry.name, where=path)
                file = target / PurePosixPath(entry.name).relative_to(root)
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("wb") as unpacked:
                    for piece in _of_entry(archive, entry, f"{path}:{entry.name}", left):
                        left -= unpacked.write(piece)
                count += 1
    except FileNotFoundError:
        raise PunaError("file not found", where=path) from None
    except UNREADABLE as error:
        raise PunaError("not a readable tar archive", where=path, found=error) from None
    if not count:
        raise PunaError("the archive has no file in this folder", where=path, expected=folder)


def read_tar_member(path: Path | str, member: str, *, limit: int) -> bytes:
    """All bytes of the file ``member`` of a tar archive, at most ``limit``."""
    return b"".join(tar_pieces(path, member, limit=limit))
