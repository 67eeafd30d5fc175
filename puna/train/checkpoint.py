"""Training state on disk: what a run needs to go on as if it had never stopped.

``checkpoints/checkpoint-00000040/`` holds ``weights.safetensors`` (float32 masters of the trained
weights only), ``moments.safetensors`` (AdamW's), ``generators.safetensors`` (one state per process)
and ``state.json`` (position, counts, the recipe, and the other files' SHA-256). A folder is written
aside and renamed, so one that has its name is whole unless a disk spoilt it; that is checked too.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from puna.core.errors import PunaError
from puna.core.files import folder_aside, read_json, sha256_of, write_json
from puna.core.progress import say
from puna.train.distributed import World
from puna.train.optimizer import Optimizer

FORMAT = 2
KEPT = 2
_PREFIX = "checkpoint-"
_FILES = ("weights.safetensors", "moments.safetensors", "generators.safetensors")


@dataclass
class Window:
    """Sums since the last logged line."""

    loss: float = 0.0
    units: int = 0
    targets: int = 0
    tokens: int = 0
    seconds: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)


@dataclass
class TrainState:
    """Where a run stands: ``step`` updates done, the next one being ``epoch_step`` of ``epoch``.

    Of a mixture: ``sources`` counts tokens by source, ``losses`` are the held-out losses by source
    that its feedback went by, before each portion.
    """

    step: int = 0
    epoch: int = 0
    epoch_step: int = 0
    tokens: int = 0
    targets: int = 0
    seconds: float = 0.0
    window: Window = field(default_factory=Window)
    sources: dict[str, int] = field(default_factory=dict)
    losses: list[dict[str, float]] = field(default_factory=list)


class Checkpoints:
    """The checkpoints of one run. ``recipe`` is all that must not change between its processes."""

    def __init__(self, folder: Path, recipe: Mapping[str, Any], world: World) -> None:
        self.folder = folder
        self.recipe = {**recipe, "processes": world.size}
        self.world = world

    def save(self, state: TrainState, optimizer: Optimizer) -> None:
        """Write a checkpoint after ``state.step`` and remove all but the last two."""
        generators = _gather_generators(self.world)
        if self.world.is_main:
            with folder_aside(self.folder / f"{_PREFIX}{state.step:08d}") as aside:
                tensors = (optimizer.weights(), optimizer.moments(), generators)
                for name, content in zip(_FILES, tensors, strict=True):
                    save_file({key: value.contiguous() for key, value in content.items()}, aside / name)
                described = {
                    "format": FORMAT,
                    "state": asdict(state),
                    "recipe": self.recipe,
                    "files": {name: sha256_of(aside / name) for name in _FILES},
                }
                write_json(aside / "state.json", described)
            for old in self._found()[KEPT:]:
                shutil.rmtree(old)
        self.world.wait()

    def restore(self, optimizer: Optimizer) -> TrainState | None:
        """Load the newest whole checkpoint; None if there is none yet.

        A broken one is named and the one before it is used. A recipe that differs from the one
        the checkpoint was made with is an error that names the key.
        """
        found = self._found()
        for folder in found:
            try:
                content = _read_whole(folder)
            except PunaError as error:
                if self.world.is_main:
                    say(f"A checkpoint is broken and is passed over. {error}")
                continue
            self._same_recipe(content["recipe"], folder)
            weights, moments, generators = (load_file(folder / name) for name in _FILES)
            state = TrainState(**{**content["state"], "window": Window(**content["state"]["window"])})
            optimizer.restore(weights, moments, state.step)
            _restore_generators(generators, self.world)
            return state
        if found:
            raise PunaError(
                "every checkpoint is broken",
                where=self.folder,
                found=", ".join(folder.name for folder in found),
                fix="remove that folder to train from the start",
            )
        return None

    def remove(self) -> None:
        """Remove all checkpoints of the run, once its result is written."""
        if self.world.is_main:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _found(self) -> list[Path]:
        """Checkpoint folders, newest first."""
        return sorted(self.folder.glob(f"{_PREFIX}[0-9]*"), reverse=True)

    def _same_recipe(self, stored: dict[str, Any], folder: Path) -> None:
        for key in sorted(stored.keys() | self.recipe.keys()):
            before, now = stored.get(key), _as_json(self.recipe.get(key))
            if before != now:
                raise PunaError(
                    f"{key!r} has changed since this checkpoint was made",
                    where=folder,
                    found=f"{key}: {now!r}",
                    expected=f"{key}: {before!r}",
                    fix=f"restore {key!r}, or remove {folder.parent} to train from the start",
                )


def _as_json(value: Any) -> Any:
    """``value`` as it would come back from JSON."""
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    return value


def _read_whole(folder: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint whose files all are what was written."""
    content: dict[str, Any] = read_json(folder / "state.json")
    if content.get("format") != FORMAT:
        raise PunaError(
            "unknown checkpoint format", where=folder, found=content.get("format"), expected=FORMAT
        )
    for name, expected in content["files"].items():
        path = folder / name
        if not path.exists():
            raise PunaError("file not found", where=path)
        found = sha256_of(path)
        if found != expected:
            raise PunaError("not the file that was written", where=path, found=found, expected=expected)
    return content


def _gather_generators(world: World) -> dict[str, Tensor]:
    """The global generators' states of every process, which dropout draws from."""
    found = {f"cpu/{rank}": state for rank, state in enumerate(_gathered(torch.get_rng_state(), world))}
    if world.device.type == "cuda":
        states = _gathered(torch.cuda.get_rng_state(world.device), world)
        found |= {f"cuda/{rank}": state for rank, state in enumerate(states)}
    return found


def _gathered(state: Tensor, world: World) -> list[Tensor]:
    return [part.cpu() for part in world.gather(state.to(world.device))]


def _restore_generators(states: dict[str, Tensor], world: World) -> None:
    torch.set_rng_state(states[f"cpu/{world.rank}"])
    if world.device.type == "cuda":
        torch.cuda.set_rng_state(states[f"cuda/{world.rank}"], world.device)
