"""What a run ran on: versions, machine, commit; and how much memory a stretch of it took at its peak."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import resource
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from puna import __version__
from puna.core.errors import PunaError
from puna.core.hardware import release_memory, total_memory

_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "tokenizers",
    "safetensors",
    "numpy",
    "pyarrow",
    "gguf",
    "sacrebleu",
)


def versions() -> dict[str, str]:
    """Versions of puna, Python and the packages results depend on, as far as they are installed."""
    found = {"puna": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def describe(device: str = "cpu") -> dict[str, Any]:
    """Processor, cores this process may use, memory in bytes, system, and the GPU if ``device`` is one."""
    about: dict[str, Any] = {
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "memory": total_memory(),
    }
    if device.startswith("cuda"):
        import torch

        about["gpu"] = torch.cuda.get_device_name(device)
    return about


def cpu_name() -> str:
    """The processor's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def commit() -> dict[str, Any] | None:
    """The commit puna's source stands at and whether files differ from it; None if it is not a checkout."""
    root = Path(__file__).parent.parent.parent
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        return {"commit": head, "dirty": bool(_git(root, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *command: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *command], capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()


def choose_device(device: str) -> str:
    """The device to run on: "auto" is a GPU if torch sees one; a GPU that is not there is an error."""
    if device == "cpu":
        return device
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    there = torch.backends.mps.is_available() if device == "mps" else torch.cuda.is_available()
    if not there:
        raise PunaError(f"device {device!r} is not there", expected="a device torch sees", fix="--device cpu")
    return device


def choose_dtype(dtype: str, device: str) -> str:
    """The type to compute in: "auto" is bfloat16, or float32 on a CPU that has no unit for it.

    Without one bfloat16 products run several times slower than float32 ones.
    """
    if dtype != "auto":
        return dtype
    return "bfloat16" if device != "cpu" or bfloat16_unit() else "float32"


def bfloat16_unit() -> str | None:
    """The CPU's instructions for bfloat16 products as Linux names them; None if none are named."""
    with contextlib.suppress(OSError):
        found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        flags = found.group(1).split() if found else []
        return next((name for name in ("amx_bf16", "avx512_bf16", "bf16") if name in flags), None)
    return None


class PeakMemory:
    """Peak memory of a block in bytes: resident on a CPU, allocated on a GPU. Read ``bytes`` after it.

    Memory that earlier work left behind is handed back first, where the C library can. Without
    Linux's counter the peak is that of the whole process so far.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.bytes = 0

    def __enter__(self) -> PeakMemory:
        release_memory()
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.startswith("cuda"):
            import torch

            self.bytes = int(torch.cuda.max_memory_allocated(self.device))
        else:
            self.bytes = _peak_resident()


def resident_memory() -> int:
    """Bytes of this process that are in memory now."""
    return _status("VmRSS") or _peak_resident()


def _peak_resident() -> int:
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def _status(field: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return 0
