"""What the machine has, as far as more than one room asks for it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def total_memory() -> int:
    """Memory of the machine in bytes, or of the container where that is less."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            memory = min(memory, int(Path(file).read_text()))
    return memory
