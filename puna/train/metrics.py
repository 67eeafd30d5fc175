"""``metrics.jsonl``: one line for each logged step and each evaluation, exact across a resume."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from puna.core.errors import PunaError
from puna.core.files import write_text


class MetricsLog:
    """Appends lines to a JSON-lines file; only the main process of a run holds one.

    ``after_step`` is the step a run goes on from: lines beyond it, left by a process that died
    after its last checkpoint, are cut, so that every step is in the file once.
    """

    def __init__(self, path: Path, *, after_step: int, tensorboard: Path | None = None) -> None:
        self.path = path
        kept = [line for line in read_metrics(path) if line["step"] <= after_step] if after_step else []
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        # Unbuffered: a line that found no room must not be tried again when the file is closed.
        self._file = path.open("ab", buffering=0)
        self._board = _board(tensorboard, after_step) if tensorboard else None

    def close(self) -> None:
        """Close the file, and TensorBoard's."""
        self._file.close()
        if self._board is not None:
            self._board.close()

    def write(self, step: int, kind: str, values: dict[str, float]) -> None:
        """Append one line: ``{"step": .., "kind": "train" | "eval" | "mixture", ...values}``."""
        line = (json.dumps({"step": step, "kind": kind, **values}) + "\n").encode()
        while line:  # what a full disk takes of it may be a part
            line = line[self._file.write(line) :]
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def sync(self) -> None:
        """Make sure that the lines written so far survive a crash of the machine."""
        os.fsync(self._file.fileno())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file; a last line that a crash cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    found: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise PunaError(
                "not a JSON line", where=f"{path}:{number}", found=error, fix="remove the broken line"
            ) from None
    return found


def _board(folder: Path, after_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise PunaError(
            "TensorBoard is not installed",
            where="report_to",
            found="tensorboard",
            fix="pip install 'puna[tensorboard]', or set report_to: none",
        ) from None
    return SummaryWriter(str(folder), purge_step=after_step + 1)


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: of the GPU's allocator, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
