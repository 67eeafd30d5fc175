"""Training state on disk: what a run needs to go on as if it had never stopped.

``checkpoints/checkpoint-00000040/`` holds ``shard-*.safetensors`` (``weights/<name>``, float32 masters of
the trained weights only, and AdamW's moments ``first/<name>`` and ``second/<name>``, written by all
processes: ``shard_files.py``), ``generators.safetensors`` (one state per process) and ``state.json``
(position, counts, the recipe, the other files' SHA-256, and a seal on all that). A folder is written
aside and renamed, so one that has its name is whole unless a disk spoilt it; that is checked too.

Another number of processes can go on from it. The generators, which dropout alone draws from, are then
derived anew from the seed, the step, the number of processes and the rank: such a run can be repeated to
the bit, and without dropout it agrees with the uninterrupted one up to rounding.

A checkpoint can be kept and handed on (:meth:`Checkpoints.keep`): another run of the same recipe goes on
from it, with the optimiser's moments or without.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from puna.core.errors import PunaError
from puna.core.files import (
    clear_leftovers,
    fingerprint,
    folder_aside,
    read_json,
    room_for,
    sha256_of,
    write_json,
)
from puna.core.progress import say
from puna.core.seeds import derive
from puna.train.distributed import World
from puna.train.optimizer import Optimizer
from puna.train.shard_files import check_files, read_tensors, write_tensors

FORMAT = 3
KEPT = 2
_PREFIX = "checkpoint-"
STATE = "state.json"
FREE = (
    *("stop_after", "state_after", "restore", "state", "save_steps", "model_steps", "logging_steps"),
    "eval_steps",
    *("eval_tokens", "report_to", "save_adapter", "save_dtype"),
)
"""Keys of a recipe that change no weight of the steps to come: a run that is handed on may change them."""
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
        tensors |= optimizer.moments()
        target = self._folder_of(state.step)
        size = sum(tensor.nbytes for tensor in tensors.values())
        with room_for(target, needed=size, fix=self.advice()), self._aside(target) as aside:
            files = write_tensors(aside, tensors, self.world)
            if self.world.is_main:
                save_file(generators, aside / _GENERATORS)
                described = {
                    "format": FORMAT,
                    "state": asdict(state),
                    "processes": self.world.size,
                    "recipe": self.recipe,
                    "files": {**files, _GENERATORS: sha256_of(aside / _GENERATORS)},
                }
                write_json(aside / STATE, {**described, "seal": fingerprint(described)})
        if self.world.is_main:
            for old in self._found()[KEPT:]:
                shutil.rmtree(old)
        self.world.wait()

    @contextlib.contextmanager
    def _aside(self, target: Path) -> Iterator[Path]:
        """One folder for all processes, which the first one gives its name when all have written."""
        if not self.world.is_main:
            yield self.folder / self.world.told("")
            return
        with folder_aside(target) as aside:
            yield self.folder / self.world.told(aside.name)

    def restore(self, optimizer: Optimizer) -> TrainState | None:
        """Load the newest whole checkpoint; None if there is none yet.

        A broken one is named and the one before it is used. A recipe that differs from the one
        the checkpoint was made with is an error that names the key.
        """
        if self.world.is_main:
            clear_leftovers(self.folder)
        self.world.wait()
        found = self._found()
        for folder in found:
            try:
                content = self._read_whole(folder)
            except PunaError as error:
                if self.world.is_main:
                    say(f"A checkpoint is broken and is passed over. {error}")
                continue
            again = f"remove {folder.parent} to train from the start"
            self._same_recipe(content["recipe"], folder, again)
            if self.world.is_main and folder != found[0]:
                say(f"Going on from {folder}.")
            return self._load(folder, content, optimizer)
        if found:
            raise PunaError(
                "every checkpoint is broken",
                where=self.folder,
                found=", ".join(folder.name for folder in found),
                fix="remove that folder to train from the start",
            )
        return None

    def keep(self, step: int, target: Path) -> None:
        """Leave the checkpoint made after ``step`` at ``target`` too, for another run to go on from."""
        if self.world.is_main:
            with room_for(target, fix=self.advice()), folder_aside(target) as aside:
                shutil.copytree(self._folder_of(step), aside, copy_function=_link_or_copy, dirs_exist_ok=True)
        self.world.wait()

    def take_over(self, folder: Path, optimizer: Optimizer, *, moments: bool) -> TrainState:
        """Load the checkpoint another run handed on; its recipe is this run's but for the keys in FREE.

        Without ``moments`` AdamW's start at zero, as where a trainer stored none; all else is restored.
        """
        content = self._read_whole(folder)
        leave = "leave out the input 'state' and give its model as 'model', which begins a run of its own"
        self._same_recipe(content["recipe"], folder, leave, apart_from=FREE)
        return self._load(folder, content, optimizer, moments=moments)

    def advice(self) -> str:
        """What stands if this process ends now: the last checkpoint, and how to go on from it."""
        found = self._found()
        if not found:
            return "no checkpoint was made yet: the same command begins at the first step"
        return f"the last good checkpoint is {found[0]}: the same command goes on from there"

    def _load(
        self, folder: Path, content: dict[str, Any], optimizer: Optimizer, *, moments: bool = True
    ) -> TrainState:
        state = TrainState(**{**content["state"], "window": Window(**content["state"]["window"])})
        self._read_tensors(folder, optimizer, state.step if moments else 0)
        self._restore_generators(load_file(folder / _GENERATORS), content["processes"], state.step)
        return state

    def _folder_of(self, step: int) -> Path:
        return self.folder / f"{_PREFIX}{step:08d}"

    def _found(self) -> list[Path]:
        """Checkpoint folders, newest first."""
        return sorted(self.folder.glob(f"{_PREFIX}[0-9]*"), reverse=True)

    def _same_recipe(
        self, stored: dict[str, Any], folder: Path, otherwise: str, apart_from: Collection[str] = ()
    ) -> None:
        for key in sorted((stored.keys() | self.recipe.keys()) - set(apart_from)):
            before, now = stored.get(key), _as_json(self.recipe.get(key))
            if before != now:
                raise PunaError(
                    f"{key!r} has changed since this checkpoint was made",
                    where=folder,
                    found=f"{key}: {now!r}",
                    expected=f"{key}: {before!r}",
                    fix=f"restore {key!r}, or {otherwise}",
                )

    def _read_whole(self, folder: Path) -> dict[str, Any]:
        """``state.json`` of a checkpoint whose files all are what was written."""
        content = _described(folder)
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


def seed_of(folder: Path) -> int:
    """The seed of the run a checkpoint is from."""
    return int(_described(folder)["recipe"]["seed"])


def seal_of(folder: Path) -> str:
    """What changes with any file of a checkpoint: the SHA-256 of the file that holds theirs."""
    return sha256_of(folder / STATE)


def _described(folder: Path) -> dict[str, Any]:
    content = read_json(folder / STATE)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise PunaError("unknown checkpoint format", where=folder, found=found, expected=FORMAT)
    seal, found = content.pop("seal", None), fingerprint(content)
    if found != seal:
        raise PunaError("not the file that was written", where=folder / STATE, found=found, expected=seal)
    return content


def _link_or_copy(source: str, target: str) -> None:
    """A second name for a file that nobody writes to again; a copy where there is no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


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
