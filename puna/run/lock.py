"""One process at a time: a lock that the system drops with the process that holds it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from puna.core.errors import PunaError


class BusyError(PunaError):
    """Another process holds the lock."""


@contextlib.contextmanager
def locked(folder: Path, lock: Path, *, wait: bool = False) -> Iterator[None]:
    """Keep every other run out of ``folder`` for the length of the block, by a lock on the file ``lock``.

    Raises :class:`BusyError` where another process holds it, unless told to ``wait``.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            raise BusyError(
                "another run works in this folder",
                where=folder,
                found=f"process {owner}" if owner else None,
                fix="wait for it, or choose another --out",
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)
