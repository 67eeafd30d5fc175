"""Training state on disk: what a run needs to go on as if it had never stopped.

``checkpoints/checkpoint-00000040/`` holds ``shard-*.safetensors`` (``weights/<name>``, float32 masters of
the trained weights only, and AdamW's moments ``first/<name>`` and ``second/<name>``, written by all
processes: ``shard_files.py``), ``generators.safetensors`` (one state per process) and ``state.json``
(position, counts, the recipe, and the other files' SHA-256). A folder is written aside and renamed, so
one that has its name is whole unless a disk spoilt it; that is checked too.

Another number of processes can go on from it. The generators, which dropout alone draws from, are then
derived anew from the seed, the step, the number of processes and the rank: such a run can be repeated to
the bit, and without dropout it agrees with the uninterrupted one up to rounding.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from puna.core.errors import PunaError
from puna.core.files import folder_aside, read_json, sha256_of, write_json
from puna.core.progress import say
from puna.core.seeds import derive
from puna.train.distributed import World
from puna.train.optimizer import Optimizer
from puna.train.shard_files import check_files, read_tensors, write_tensors

FORMAT = 3
KEPT = 2
_PREFIX = "checkpoint-"
_GENERATORS = "generators.safetensors"
_WEIGHTS = "weights/"


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
    """Where a run stands: ``step`` updates done, the next one being ``epoch_step`` of ``epoch``."""

    step: int = 0
    epoch: int = 0
    epoch_step: int = 0
    tokens: int = 0
    targets: int = 0
    seconds: float = 0.0
    window: Window = field(default_factory=Window)


class Checkpoints:
    """The checkpoints of one run. ``recipe`` is all that must not change between its processes.

    ``seed`` is that of generators which no process has left a state of.
    """

    def __init__(self, folder: Path, recipe: Mapping[str, Any], world: World, *, seed: int = 0) -> None:
        self.folder = folder
        self.recipe = dict(recipe)
        self.world = world
        self.seed = seed

    def save(self, state: TrainState, optimizer: Optimizer) -> None:
        """Write a checkpoint after ``state.step`` and remove all but the last two."""
        generators = _gather_generators(self.world)
        tensors = {_WEIGHTS + name: tensor for name, tensor in optimizer.weights().items()}
        with self._aside(f"{_PREFIX}{state.step:08d}") as aside:
            files = write_tensors(aside, tensors | optimizer.moments(), self.world)
            if self.world.is_main:
                save_file(generators, aside / _GENERATORS)
                described = {
                    "format": FORMAT,
                    "state": asdict(state),
                    "processes": self.world.size,
                    "recipe": self.recipe,
                    "files": {**files, _GENERATORS: sha256_of(aside / _GENERATORS)},
                }
                write_json(aside / "state.json", described)
        if self.world.is_main:
            for old in self._found()[KEPT:]:
                shutil.rmtree(old)
        self.world.wait()

    @contextlib.contextmanager
    def _aside(self, name: str) -> Iterator[Path]:
        """One folder for all processes, which the first one gives its name when all have written."""
        if not self.world.is_main:
            yield self.folder / self.world.told("")
            return
        with folder_aside(self.folder / name) as aside:
            yield self.folder / self.world.told(aside.name)

    def restore(self, optimizer: Optimizer) -> TrainState | None:
        """Load the newest whole checkpoint; None if there is none yet.

        A broken one is named and the one before it is used. A recipe that differs from the one
        the checkpoint was made with is an error that names the key.
        """
        if self.world.is_main:
            for rest in self.folder.glob(f".{_PREFIX}*"):  # of a process that was killed as it wrote
                shutil.rmtree(rest)
        self.world.wait()
        found = self._found()
        for folder in found:
            try:
                content = self._read_whole(folder)
            except PunaError as error:
                if self.world.is_main:
                    say(f"A checkpoint is broken and is passed over. {error}")
                continue
            self._same_recipe(content["recipe"], folder)
            state = TrainState(**{**content["state"], "window": Window(**content["state"]["window"])})
            self._read_tensors(folder, optimizer, state.step)
            self._restore_generators(load_file(folder / _GENERATORS), content["processes"], state.step)
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

    def _read_whole(self, folder: Path) -> dict[str, Any]:
        """``state.json`` of a checkpoint whose files all are what was written."""
        content: dict[str, Any] = read_json(folder / "state.json")
        if content.get("format") != FORMAT:
            raise PunaError(
                "unknown checkpoint format", where=folder, found=content.get("format"), expected=FORMAT
            )
        check_files(folder, content["files"], self.world)
        return content

    def _read_tensors(self, folder: Path, optimizer: Optimizer, step: int) -> None:
        weights = {name: torch.empty_like(tensor) for name, tensor in optimizer.weights().items()}
        moments = {
            f"{moment}/{name}": torch.zeros_like(tensor)
            for moment in ("first", "second")
            for name, tensor in weights.items()
            if step
        }
        wanted = {_WEIGHTS + name: tensor for name, tensor in weights.items()}
        read_tensors(folder, wanted | moments, self.world)
        optimizer.restore(weights, moments, step)

    def _restore_generators(self, states: dict[str, Tensor], processes: int, step: int) -> None:
        world = self.world
        if processes != world.size:
            torch.manual_seed(derive(self.seed, "train", "dropout", world.rank, world.size, step))
            return
        torch.set_rng_state(states[f"cpu/{world.rank}"])
        if world.device.type == "cuda":
            torch.cuda.set_rng_state(states[f"cuda/{world.rank}"], world.device)


def _as_json(value: Any) -> Any:
    """``value`` as it would come back from JSON."""
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    return value


def _gather_generators(world: World) -> dict[str, Tensor]:
    """The global generators' states of every process, which dropout draws from."""
    found = {f"cpu/{rank}": state for rank, state in enumerate(_gathered(torch.get_rng_state(), world))}
    if world.device.type == "cuda":
        states = _gathered(torch.cuda.get_rng_state(world.device), world)
        found |= {f"cuda/{rank}": state for rank, state in enumerate(states)}
    return found


def _gathered(state: Tensor, world: World) -> list[Tensor]:
    return [part.cpu() for part in world.gather(state.to(world.device))]
