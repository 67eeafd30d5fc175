"""The one training loop, for one process or many.

A step sums the losses of its tokens over all micro-batches and processes and divides the summed
gradients by the number of its targets: how a step is cut into micro-batches or shared out among
processes changes nothing but rounding.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch

from puna.core.errors import PunaError
from puna.core.files import clear_leftovers, room_for
from puna.core.progress import Track
from puna.core.seeds import derive
from puna.train import offending
from puna.train.checkpoint import Checkpoints, TrainState, Window
from puna.train.distributed import World
from puna.train.loader import Feed, MicroBatch, Step
from puna.train.metrics import MetricsLog, peak_memory
from puna.train.objectives import Loss, Objective
from puna.train.optimizer import Optimizer
from puna.train.schedule import Schedule, factor
from puna.train.sharding import communicate_gradients, is_sharded

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from puna.model.llama import Llama

Evaluation = Callable[["Llama"], Mapping[str, float]]
"""Given from outside: measures the model and returns figures by name. Called on every process."""


@dataclass(frozen=True)
class LoopSettings:
    """How long, how often, under which schedule. Steps are optimiser steps.

    Without ``eval_steps`` evaluations are at both ends only; without ``save_steps`` a checkpoint is
    made whenever ``save_seconds`` have passed. When they are made changes nothing in the result.
    ``stop_after`` ends the run early, on the schedule of ``total_steps``; the checkpoint of the step
    ``state_after`` is kept in the folder ``state``.
    """

    total_steps: int
    total_tokens: int
    schedule: Schedule
    seed: int = 0
    logging_steps: int = 1
    eval_steps: int | None = None
    save_steps: int | None = None
    save_seconds: float = 300.0
    tensorboard: bool = False
    stop_after: int | None = None
    state_after: int | None = None

    @property
    def last_step(self) -> int:
        """The step this run ends with, be it that of the plan or an earlier one."""
        return self.total_steps if self.stop_after is None else self.stop_after


@dataclass(frozen=True)
class Handed:
    """A checkpoint of another run to begin with, with AdamW's moments or without."""

    folder: Path
    moments: bool = True


@dataclass(frozen=True)
class _Done:
    """What one step gave: the sum of its losses over all processes, and figures to log."""

    loss: float
    figures: dict[str, float]
    learning_rate: float
    gradient_norm: float
    seconds: float


class Loop:
    """Trains ``model`` on ``feed`` in ``out``; :meth:`run` goes on from the newest checkpoint there.

    ``recipe`` is all that must not change between the processes of one run. ``evaluate`` is called
    before the first step, every ``eval_steps`` and after the last step; it changes nothing: dropout
    is off, and all generators are put back. ``begin`` is where a run stands whose weights and moments are
    in the optimiser already, ``checkpoints`` a folder for them other than the one in ``out``. ``before_step``
    is told the number of each step, counted from 0, before its first pass; ``after_step`` is called behind
    each step, before its checkpoint is made.
    """

    def __init__(
        self,
        model: Llama,
        feed: Feed,
        objective: Objective,
        optimizer: Optimizer,
        settings: LoopSettings,
        *,
        out: Path,
        recipe: Mapping[str, Any],
        world: World | None = None,
        evaluate: Evaluation | None = None,
        handed: Handed | None = None,
        begin: TrainState | None = None,
        checkpoints: Path | None = None,
        before_step: Callable[[int], None] | None = None,
        after_step: Callable[[Loop], None] | None = None,
    ) -> None:
        self.model = model
        self.feed = feed
        self.objective = objective
        self.optimizer = optimizer
        self.settings = settings
        self.out = out
        self.world = world or World()
        self.evaluate = evaluate
        self.handed = handed
        self.before_step = before_step
        folder = out / "checkpoints" if checkpoints is None else checkpoints
        self.checkpoints = Checkpoints(folder, recipe, self.world, seed=settings.seed)
        self.after_step = after_step
        self.state = begin or TrainState()
        self._log: MetricsLog | None = None
        self._saved = time.monotonic()

    def run(self) -> TrainState:
        """Train to the last step; returns where the run stands then."""
        with kept_generators(self.world.device):
            torch.manual_seed(derive(self.settings.seed, "train", "dropout", self.world.rank))
            was_training = self.model.training
            self.model.train()
            restored = self.checkpoints.restore(self.optimizer)
            self.state = restored or self._begin()
            self.feed.follow(self.state.losses)
            board = self.out / "tensorboard" if self.settings.tensorboard else None
            try:
                if self.world.is_main:
                    clear_leftovers(self.out)
                    with room_for(self._metrics, fix=self.checkpoints.advice()):
                        step = self.state.step
                        self._log = MetricsLog(self._metrics, after_step=step, tensorboard=board)
                if restored is None:
                    self._evaluate()
                else:
                    self._keep_state()  # where a process died between making the checkpoint and keeping it
                self._steps()
            finally:
                if self._log is not None:
                    self._log.close()
                self.model.train(was_training)
        return self.state

    @property
    def _metrics(self) -> Path:
        return self.out / "metrics.jsonl"

    def _begin(self) -> TrainState:
        """Where a run without a checkpoint of its own begins."""
        if self.handed is None:
            return self.state
        folder, last = self.handed.folder, self.settings.last_step
        state = self.checkpoints.take_over(folder, self.optimizer, moments=self.handed.moments)
        if state.step >= last:
            raise PunaError(
                "nothing is left to train from this state on",
                where=folder,
                found=f"a state after step {state.step} of a run that ends with step {last}",
            )
        return state

    def _keep_state(self) -> None:
        if self.state.step == self.settings.state_after:
            self.checkpoints.keep(self.state.step, self.out / "state")

    def _steps(self) -> None:
        settings, state = self.settings, self.state
        with contextlib.ExitStack() as stack:
            track = None
            if self.world.is_main:
                track = stack.enter_context(Track("training", settings.total_tokens - state.tokens, "tokens"))
            while state.step < settings.last_step:
                step = self.feed.steps(state.epoch)[state.epoch_step]
                done = self._step(step)
                self._count(step, done)
                if track is not None:
                    mean = done.loss / step.units
                    track.note(f"step {state.step}/{settings.last_step} loss {mean:.4f}")
                    track.advance(step.tokens)
                self._after_step()

    def _after_step(self) -> None:
        """Evaluate and save where that is due."""
        settings, state = self.settings, self.state
        if self.after_step is not None:
            self.after_step(self)
        last = state.step == settings.last_step
        due = settings.eval_steps and state.step % settings.eval_steps == 0
        if last or due or self.feed.awaits_losses(state.epoch, state.epoch_step):
            self._evaluate()
        if last or state.step == settings.state_after or self._save_is_due():
            if self._log is not None:
                with room_for(self._metrics, fix=self.checkpoints.advice()):
                    self._log.sync()
            self.checkpoints.save(state, self.optimizer)
            self._saved = time.monotonic()
            self._keep_state()

    def _save_is_due(self) -> bool:
        """Whether it is time for a checkpoint; all processes agree, going by the first one's clock."""
        if self.settings.save_steps is not None:
            return self.state.step % self.settings.save_steps == 0
        passed = self.world.is_main and time.monotonic() - self._saved >= self.settings.save_seconds
        return bool(self.world.sum_(torch.tensor(float(passed), device=self.world.device)))

    def _step(self, step: Step) -> _Done:
        """One optimiser step: gradients of all its tokens, their mean, clipping, update."""
        start = time.perf_counter()
        if self.before_step is not None:
            self.before_step(self.state.step)
        loss, figures = self._accumulate(step)
        self.optimizer.collect(self.world)
        norm = self.optimizer.gradient_norm(step.units, self.world)
        if not math.isfinite(norm):
            rows = [step.rows] if self.world.is_main else []
            raise self._not_finite("the gradient", norm, step, rows)
        rate = self.optimizer.step(factor(self.state.step, self.settings.schedule), step.units, norm)
        return _Done(loss, figures, rate, norm, time.perf_counter() - start)

    def _accumulate(self, step: Step) -> tuple[float, dict[str, float]]:
        """Gradients of the summed losses of this process's share; the sums over all processes."""
        names = self.objective.figures
        found: list[torch.Tensor] = []
        rows: list[NDArray[numpy.int64]] = []
        rounds = self.feed.rounds(step) if is_sharded(self.model) else 0
        for micro in self.feed.micro_batches(step):
            loss = self._backward(micro, last=len(found) + 1 == rounds)
            found.append(torch.stack([loss.total.detach(), *(loss.figures[name] for name in names)]))
            rows.append(micro.rows)
        for number in range(len(found) + 1, rounds + 1):
            self._backward(self.feed.filler(step), last=number == rounds, weight=0.0)
        # A process may have no share of a small step.
        own = torch.stack(found).cpu().double() if found else torch.zeros(1, 1 + len(names)).double()
        sums = self.world.total(own.sum(0)).tolist()
        if not math.isfinite(sums[0]):
            bad = own[:, 0].isfinite().logical_not().tolist() if rows else []
            wrong = [part for part, is_bad in zip(rows, bad, strict=True) if is_bad]
            raise self._not_finite("the loss", sums[0], step, wrong)
        return sums[0], dict(zip(names, sums[1:], strict=True))

    def _backward(self, micro: MicroBatch, *, last: bool, weight: float = 1.0) -> Loss:
        """Loss and gradients of a micro-batch. Those of a sharded model go out with the ``last`` of a step.

        There every process runs as many passes as any other; what is not its share has ``weight`` 0.
        """
        sharded = is_sharded(self.model)
        if sharded:
            communicate_gradients(self.model, now=last)
        loss = self.objective(self.model, micro.to(self.world.device))
        if loss.targets or sharded:  # a row of a long prompt may hold none; the step as a whole does
            total = loss.total if weight == 1.0 else loss.total * weight
            total.backward()  # type: ignore[no-untyped-call]
        return loss

    def _not_finite(
        self, what: str, value: float, step: Step, parts: list[NDArray[numpy.int64]]
    ) -> PunaError:
        """The error for a step that must not be taken; the process that has the rows at hand saves them."""
        number = self.state.step + 1
        place, saved = "rows of another process, which saves them", ""
        if parts:
            rows = numpy.concatenate(parts)
            place = f"rows {self.feed.names(rows)}"
            about = {"what": what, "value": str(value), "step": number, "epoch": self.state.epoch}
            file = offending.file_of(self.out, number, self.world)
            with room_for(file, fix=self.checkpoints.advice()):
                offending.save(file, self.feed, rows, about, self.model.tokenizer)
            saved = f"look at them in {file} and the .json beside it, and "
        return PunaError(
            f"{what} is not finite",
            where=f"step {number}",
            found=f"{value} on {place}",
            fix=f"{saved}lower learning_rate or raise warmup_steps; {self.checkpoints.advice()}",
        )

    def _count(self, step: Step, done: _Done) -> None:
        """Move on by one step, and write a line of metrics where one is due."""
        state, window = self.state, self.state.window
        state.step += 1
        state.epoch_step += 1
        if state.epoch_step == len(self.feed.steps(state.epoch)):
            state.epoch, state.epoch_step = state.epoch + 1, 0
        state.tokens += step.tokens
        for name, tokens in self.feed.tokens_by_source(step).items():
            state.sources[name] = state.sources.get(name, 0) + tokens
        state.targets += step.targets
        state.seconds += done.seconds
        window.loss += done.loss
        window.units += step.units
        for name, value in done.figures.items():
            window.figures[name] = window.figures.get(name, 0.0) + value
        window.tokens += step.tokens
        window.targets += step.targets
        window.seconds += done.seconds
        last = state.step == self.settings.last_step
        if not last and state.step % self.settings.logging_steps:
            return
        self._write(
            "train",
            {
                "tokens": state.tokens,
                "targets": state.targets,
                "loss": window.loss / window.units,
                **{name: value / window.units for name, value in window.figures.items()},
                "learning_rate": done.learning_rate,
                "grad_norm": done.gradient_norm,
                "tokens_per_second": window.tokens / window.seconds,
                "targets_per_second": window.targets / window.seconds,
                "seconds": state.seconds,
                "peak_memory": peak_memory(self.world.device),
                **{f"tokens.{name}": tokens for name, tokens in state.sources.items()},
            },
        )
        state.window = Window()

    def _evaluate(self) -> None:
        if self.evaluate is None:
            return
        with measuring(self.model, self.world.device):
            values = dict(self.evaluate(self.model))
        self._write("eval", {"tokens": self.state.tokens, **values})
        self._heed(values)

    def _heed(self, values: Mapping[str, float]) -> None:
        """Record held-out losses where the mixture goes by them, and write down the weights that follow."""
        state, mixture = self.state, self.feed.mixture
        if mixture is None or not self.feed.awaits_losses(state.epoch, state.epoch_step):
            return
        state.losses.append({name: values[f"{name}.loss"] for name in mixture.names})
        weights = zip(mixture.names, mixture.weights(state.epoch), strict=True)
        self._write(
            "mixture", {"tokens": state.tokens, **{f"weight.{name}": value for name, value in weights}}
        )

    def _write(self, kind: str, values: dict[str, float]) -> None:
        if self._log is not None:
            with room_for(self._metrics, fix=self.checkpoints.advice()):
                self._log.write(self.state.step, kind, values)


@contextlib.contextmanager
def kept_generators(device: torch.device) -> Iterator[None]:
    """Put back every global generator (torch's, numpy's, Python's) after the block."""
    devices = [device] if device.type == "cuda" else []
    python, arrays = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)


@contextlib.contextmanager
def measuring(model: Llama, device: torch.device) -> Iterator[None]:
    """A block in which the model is only looked at: no gradients, no dropout, generators put back."""
    was_training = model.training
    model.eval()
    try:
        with kept_generators(device), torch.no_grad():
            yield
    finally:
        model.train(was_training)
