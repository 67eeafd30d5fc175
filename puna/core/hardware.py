"""What the machine has, as far as more than one room asks for it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from pathlib import Path


def total_memory() -> int:
    """Memory of the machine in bytes, or of the container where that is less."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            memory = min(memory, int(Path(file).read_text()))
    return memory


def release_memory() -> None:
    """Collect garbage and give free pages back to the system."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
