"""Compiles the kernels with the system's C++ compiler and opens them; done once for a machine and a version.

Nothing of torch's is compiled against: the library has a C interface and is given addresses. It is kept
in puna's cache folder under a name made of everything it depends on: sources, flags, compiler, processor.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

from puna.core.assets import cache_folder
from puna.core.errors import PunaError
from puna.core.files import fingerprint, room_for, sha256_of, write_aside
from puna.core.progress import say

SOURCES = Path(__file__).parent
# No fusing of products and sums but where the code says so: two kernels must not round differently.
FLAGS = (
    *("-O3", "-march=native", "-std=c++17", "-fPIC", "-pthread", "-w"),
    *("-ffp-contract=off", "-fno-tree-slp-vectorize", "-fvisibility=hidden"),
)
_PATIENCE = 300  # seconds for one file, on a machine that does other things too


class CompilationError(PunaError):
    """There are no kernels on this machine: no compiler, or one that fails."""


class LayerDescription(ctypes.Structure):
    """``PunaLayer`` of interface.cpp."""

    _fields_ = (
        *((name, c_int32) for name in ("heads", "kv_heads", "head_dim", "width", "window", "sink", "rope")),
        *((name, c_int32) for name in ("table", "format", "qkv_bias", "out_bias", "feed_forward_bias")),
        *((name, c_int32) for name in ("linear_attention", "linear_feed_forward", "series", "shortcut")),
        ("shared", c_int32),
        ("scale", c_float),
    )


class ModelDescription(ctypes.Structure):
    """``PunaModel`` of interface.cpp."""

    _fields_ = (
        *((name, c_int32) for name in ("hidden", "vocabulary", "layers", "blocks", "stored")),
        *((name, c_int32) for name in ("head_format", "ropes", "embedding_stored", "head_shared")),
        ("epsilon", c_float),
        ("embedding", c_void_p),
        ("donor", c_void_p),
    )


# Arguments of each function of interface.cpp that returns 0 or what went wrong.
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "puna_fill": (c_void_p, c_int, c_int, c_int, c_int, *[c_void_p] * 3, c_int),
    "puna_row": (c_void_p, c_int, c_int, c_int, c_void_p),
    "puna_bias": (c_void_p, c_int, c_int, c_void_p),
    "puna_norm": (c_void_p, c_int, c_int, c_void_p),
    "puna_series": (c_void_p, c_int, c_void_p),
    "puna_rope": (c_void_p, c_int, c_void_p, c_void_p, c_int),
    "puna_copy_block": (c_void_p, c_int, c_int, c_int),
    "puna_step": (
        *(c_void_p, c_int, *[c_void_p] * 4, c_int, *[c_void_p] * 3),
        *(c_int, c_int, c_void_p, c_void_p, c_void_p, c_int),
    ),
    "puna_logits": (c_void_p, c_void_p, c_int, c_void_p, c_int),
}
_FAILURES = {
    -1: ("there is not enough memory", "a smaller cache_tokens, or fewer tokens in a step"),
    -2: ("the system gave no thread", "fewer threads: torch.set_num_threads"),
}


class Library:
    """The opened kernels."""

    def __init__(self, path: Path) -> None:
        try:
            opened = ctypes.CDLL(str(path))
        except OSError as error:
            raise CompilationError(
                "the compiled kernels cannot be opened",
                where=path,
                found=error,
                fix="remove the file to have it compiled again, or use kernels='plain'",
            ) from None
        self.create: Callable[..., int | None] = opened.puna_create
        opened.puna_create.restype = c_void_p
        opened.puna_create.argtypes = (POINTER(ModelDescription), POINTER(LayerDescription))
        self.destroy: Callable[[int], None] = opened.puna_destroy
        opened.puna_destroy.restype = None
        opened.puna_destroy.argtypes = (c_void_p,)
        for name in ("puna_weight_bytes", "puna_shared_bytes", "puna_store_bytes"):
            function = getattr(opened, name)
            function.restype, function.argtypes = c_int64, (c_void_p,)
        self.weight_bytes: Callable[[int], int] = opened.puna_weight_bytes
        self.shared_bytes: Callable[[int], int] = opened.puna_shared_bytes
        self._functions: dict[str, Any] = {}
        for name, arguments in _FUNCTIONS.items():
            function = getattr(opened, name)
            function.restype, function.argtypes = c_int, arguments
            self._functions[name] = function

    def call(self, name: str, *arguments: int) -> None:
        """Call ``puna_<name>``; raises :class:`PunaError` where it fails."""
        code = self._functions[f"puna_{name}"](*arguments)
        if code:
            message, fix = _FAILURES[code]
            raise PunaError(message, where=f"native kernels, {name}", fix=fix)


@functools.cache
def load(extra_flags: tuple[str, ...] = ()) -> Library:
    """The kernels, compiled if this machine has not done so yet.

    ``extra_flags`` are added for the compiler. Raises :class:`PunaError` where there is no compiler or
    it fails.
    """
    compiler = find_compiler()
    flags = (*FLAGS, *extra_flags)
    target = cache_folder() / "native" / f"kernels-{_identity(compiler, flags)}.so"
    if not target.exists():
        say("compiling the native kernels, once for this machine")
        with room_for(target, fix="set PUNA_CACHE to a folder on another disk"):
            _compile(compiler, flags, target)
    return Library(target)


def find_compiler() -> str:
    """``$CXX``, or the system's c++."""
    wanted = os.environ.get("CXX") or "c++"
    found = shutil.which(wanted)
    if found is None:
        raise CompilationError(
            "the native kernels need a C++ compiler",
            found=f"no program {wanted!r}",
            fix="install g++ or clang, or set CXX to one; kernels='plain' works without",
        )
    return found


def sources() -> list[Path]:
    """The files to compile, headers included, by name."""
    return sorted((*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")))


def _identity(compiler: str, flags: Sequence[str]) -> str:
    stat = os.stat(os.path.realpath(compiler))
    return fingerprint(
        {
            "sources": [(path.name, sha256_of(path)) for path in sources()],
            "flags": list(flags),
            "compiler": [os.path.realpath(compiler), stat.st_size, stat.st_mtime_ns],
            "processor": _processor(),
        }
    )


def _processor() -> str:
    """What code for this machine depends on: the processor's model and what it can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(line for line in lines.splitlines() if line.startswith(wanted))


def _compile(compiler: str, flags: Sequence[str], target: Path) -> None:
    """All files side by side, then the library, which takes its name when it is whole."""
    with tempfile.TemporaryDirectory(prefix="puna-kernels-") as folder:
        files = [path for path in sources() if path.suffix == ".cpp"]
        objects = [str(Path(folder) / f"{path.stem}.o") for path in files]
        jobs = [
            [compiler, *flags, "-c", str(path), "-o", output]
            for path, output in zip(files, objects, strict=True)
        ]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in pool.map(_run, jobs):
                pass
        with write_aside(target) as aside:
            _run([compiler, *flags, "-shared", *objects, "-o", str(aside)])


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _failed(command, str(error)) from None
    if done.returncode:
        raise _failed(command, "\n".join(done.stderr.strip().splitlines()[:8]) or f"code {done.returncode}")


def _failed(command: Sequence[str], what: str) -> CompilationError:
    return CompilationError(
        "the native kernels do not compile here",
        where=command[0],
        found=what,
        expected="a compiler of C++17 that knows GCC's vector extensions",
        fix="set CXX to another compiler, or use kernels='plain'",
    )
