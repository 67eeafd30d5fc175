"""The work of the stage ``learn_masks``: gates and a LoRA learn together, then the gates are cut.

System S62, Compresso. In every pass masks are drawn from the gates and what units give is multiplied by them.
The optimiser of the LoRA is that of every training; gates descend and multipliers ascend by an AdamW of their
own, at rates that do not move, without decay and without clipping. When the steps are over, the adapter is
merged, the settled masks are folded into the weights, and what is 0 is sliced away.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from puna.core.errors import PunaError
from puna.core.seeds import derive, torch_generator
from puna.core.stage import Context, Outcome
from puna.edit.pruning.job import CONTEXT, layer_table
from puna.edit.pruning.l0 import Gates, Lagrangian, density_error, target_at
from puna.model.probe import difference, probe
from puna.model.slicing import folded, sliced, soft_mask
from puna.model.units import Kept, count
from puna.text import pretrained
from puna.train import job
from puna.train.loop import Evaluation, Loop, LoopSettings
from puna.train.objectives import Loss, Objective
from puna.train.optimizer import Optimizer, OptimizerSettings

if TYPE_CHECKING:
    from puna.edit.pruning.mask_stages import LearnMasks
    from puna.model.llama import Llama
    from puna.train.loader import MicroBatch


@dataclasses.dataclass
class Learnt:
    """What is learnt beside the weights, and how far that is. ``passes`` are those of the current step."""

    gates: Gates
    multipliers: Lagrangian
    share: float
    ramp: float
    steps: int
    seed: int
    step: int = 0
    passes: int = 0

    def named(self) -> dict[str, Parameter]:
        """Gates and multipliers by name."""
        return {**self.gates.named(), **self.multipliers.named()}

    @property
    def target(self) -> float:
        """The share that the current step aims at."""
        return target_at(self.step, self.steps, self.share, self.ramp)

    def generator(self) -> torch.Generator:
        """What the next pass draws from: of step and pass alone, so that a resumed run draws alike."""
        self.passes += 1
        return torch_generator(self.seed, "masks", self.step, self.passes)


@dataclasses.dataclass(frozen=True)
class GatedObjective:
    """An objective of the model under masks drawn anew for each pass."""

    inner: Objective
    learnt: Learnt

    @property
    def figures(self) -> tuple[str, ...]:
        """Those of the objective, the share expected to be gone, and the one that is aimed at."""
        return (*self.inner.figures, "share_gone", "share_wanted")

    def __call__(self, model: Llama, micro: MicroBatch) -> Loss:
        """The loss under one draw. The size is no part of it: that depends on no token."""
        with soft_mask(model, self.learnt.gates.drawn(self.learnt.generator())):
            loss = self.inner(model, micro)
        gone = self.learnt.gates.share_gone().detach() * loss.targets
        wanted = torch.full_like(gone, self.learnt.target * loss.targets)
        return Loss(loss.total, loss.tokens, {**loss.figures, "share_gone": gone, "share_wanted": wanted})


class GatedOptimizer(Optimizer):
    """Trains the weights as ever, and gates and multipliers beside them."""

    def __init__(
        self,
        named: Iterable[tuple[str, Parameter]],
        settings: OptimizerSettings,
        *,
        learnt: Learnt,
        gate_rate: float,
        multiplier_rate: float,
    ) -> None:
        super().__init__(named, settings)
        self.learnt = learnt
        ascended = learnt.multipliers.named()
        self._beside = learnt.named()
        descended = [value for name, value in self._beside.items() if name not in ascended]
        groups: list[dict[str, Any]] = [
            {"params": descended, "lr": gate_rate},
            {"params": [*ascended.values()], "lr": multiplier_rate, "maximize": True},
        ]
        self._gates = torch.optim.AdamW(groups, weight_decay=0.0)
        self._closed = False

    def step(self, schedule_factor: float, divisor: float, norm: float) -> float:
        """One update of the weights, then one of the gates, with the mean loss and the price of the size."""
        rate = super().step(schedule_factor, divisor, norm)
        learnt = self.learnt
        for value in self._beside.values():
            if value.grad is not None:
                value.grad /= divisor
        gap = learnt.gates.share_gone() - learnt.target
        learnt.multipliers.penalty(gap).backward()  # type: ignore[no-untyped-call]
        self._gates.step()
        self._gates.zero_grad(set_to_none=True)
        learnt.gates.bound()
        learnt.step, learnt.passes = learnt.step + 1, 0
        return rate

    def weights(self) -> dict[str, Tensor]:
        """The float32 masters, with the gates until this is closed: the model's alone are left behind."""
        beside = {} if self._closed else {name: value.detach() for name, value in self._beside.items()}
        return {**super().weights(), **beside}

    def moments(self) -> dict[str, Tensor]:
        """AdamW's two moments of weights and gates."""
        found = super().moments()
        for name, value in self._beside.items():
            state = self._gates.state.get(value)
            if state:
                found[f"first/{name}"] = state["exp_avg"]
                found[f"second/{name}"] = state["exp_avg_sq"]
        return found

    @torch.no_grad()
    def restore(self, weights: dict[str, Tensor], moments: dict[str, Tensor], steps: int) -> None:
        """Take over weights, gates and moments after ``steps`` updates."""
        super().restore(weights, moments, steps)
        self.learnt.step, self.learnt.passes = steps, 0
        for name, value in self._beside.items():
            value.copy_(weights[name])
            if steps:
                self._gates.state[value] = {
                    "step": torch.tensor(float(steps)),
                    "exp_avg": moments[f"first/{name}"],
                    "exp_avg_sq": moments[f"second/{name}"],
                }

    def close(self) -> None:
        """Leave the model, and from then on the gates too."""
        super().close()
        self._closed = True


def run_learn_masks(context: Context, parameters: LearnMasks) -> Outcome:
    """Learn, merge, fold, slice, compare masked and sliced, save, report."""
    course = _Masked(context, parameters)
    trained = job.run(context, parameters.train.model_copy(update=_WHOLE), course.course)
    assert course.learnt is not None
    gates = course.learnt.gates
    dense = pretrained.load(trained.outputs["model"], dtype="float32").eval()
    small, figures = cut(dense, gates)
    shutil.rmtree(trained.outputs["model"])  # the whole model; what is left takes its place
    figures |= {
        "share_gone": float(gates.share_gone().detach()),
        "size_error": abs(float(gates.share_gone().detach()) - parameters.share),
        "density_error": density_error(gates, derive(context.seed, context.name)),
        "multiplier.linear": float(course.learnt.multipliers.linear.detach()),
        "multiplier.quadratic": float(course.learnt.multipliers.quadratic.detach()),
    }
    context.report["tables"].append(layer_table(dense.spec, small.spec))
    written = pretrained.save(small.to(pretrained.DTYPES[parameters.train.save_dtype]), context.out / "model")
    return Outcome({"model": written}, trained.metrics | figures)


_WHOLE = {"save_dtype": "float32", "save_adapter": False}
"""How the training leaves the whole model, which is not yet cut."""


class _Masked:
    """The course of a training under masks."""

    def __init__(self, context: Context, parameters: LearnMasks) -> None:
        self.parameters = parameters
        self.seed = derive(context.seed, context.name, "gates")
        self.learnt: Learnt | None = None

    def course(self, model: Llama, settings: LoopSettings, make_loop: job.MakeLoop) -> Loop:
        """One loop, whose objective, evaluation and optimiser know of the gates."""
        if model.recomputed_layers:
            raise PunaError(
                "layers cannot be computed again under masks that have been drawn anew",
                where="train.recompute",
                found=f"{model.recomputed_layers} layers, for want of memory",
                fix="a smaller train.micro_batch_tokens",
            )
        parameters = self.parameters
        gates = Gates(
            model.spec,
            parameters.units,
            drop_rate=parameters.drop_rate,
            seed=self.seed,
            device=model.device,
        )
        self.learnt = Learnt(
            gates,
            Lagrangian(model.device, quadratic=parameters.quadratic_start),
            parameters.share,
            parameters.ramp,
            settings.total_steps,
            self.seed,
        )
        optimizer = functools.partial(
            GatedOptimizer,
            learnt=self.learnt,
            gate_rate=parameters.mask_learning_rate,
            multiplier_rate=parameters.multiplier_learning_rate,
        )
        about = parameters.model_dump(mode="json", exclude={"train"})
        loop = make_loop(model, optimizer=optimizer, recipe={"masks": about})
        loop.objective = GatedObjective(loop.objective, self.learnt)
        if loop.evaluate is not None:
            loop.evaluate = _under_masks(loop.evaluate, gates)
        loop.run()
        return loop


def _under_masks(evaluate: Evaluation, gates: Gates) -> Evaluation:
    """What is held out is measured as the model would be if learning ended here."""

    def measured(model: Llama) -> Mapping[str, float]:
        with soft_mask(model, gates.settled()):
            return evaluate(model)

    return measured


@torch.no_grad()
def cut(dense: Llama, gates: Gates) -> tuple[Llama, dict[str, float]]:
    """The model that the gates leave of ``dense``, a float32 one that is changed on the way, and figures.

    ``open_difference`` is how far masks of ones move the logits (0.0: not by a bit), ``masked_difference``
    how far those of the small model are from the masked one's, over the largest logit.
    """
    plain = probe(dense)
    with soft_mask(dense, gates.all_open()):
        opened = difference(plain, probe(dense))
    masks, kept = gates.settled(), gates.kept()
    with soft_mask(dense, masks):
        masked = probe(dense)
    dense.load_state_dict(folded(dense.state_dict(), dense.spec, masks), assign=True)
    small = sliced(dense, kept)
    figures = {
        "open_difference": opened,
        "masked_difference": difference(masked, probe(small)) / float(masked.abs().max()),
        **_sizes(dense, kept, gates),
    }
    return small, figures


def _sizes(dense: Llama, kept: Kept, gates: Gates) -> dict[str, float]:
    """What is left, by count and by kind."""
    before, after = count(dense.spec, context=CONTEXT), count(dense.spec, kept, context=CONTEXT)
    blocks = dense.spec.blocks
    return {
        "parameters": float(after.parameters),
        "parameter_share": after.parameters / before.parameters,
        "removed_share": 1 - after.block_parameters / before.block_parameters,
        "step_operations_share": after.step_operations / before.step_operations,
        "hidden_left": len(kept.hidden) / dense.spec.hidden_size,
        "head_groups_left": sum(map(len, kept.head_groups)) / sum(block.kv_heads for block in blocks),
        "channels_left": sum(map(len, kept.channels)) / sum(block.width for block in blocks),
    }
