"""Tuning a super-network: steps of the whole model and of children of it by turns.

System S29, LLaMA-NAS (Sarah and others 2024, arXiv:2405.18377), its super-network in the manner of InstaTune
(Sarah and others 2023, arXiv:2308.15609): one set of weights, of which the whole and all children are parts,
learns with the whole in one step and with a child drawn at random in the next. There is no distillation from
the whole to its children here. Which child a step learns with is drawn by the seed and the step's number
alone, so that a run that was killed goes on as it would have, and all processes learn with the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from puna.core.seeds import numpy_generator
from puna.model.search_space import Genes, SearchSpace
from puna.model.subnetwork import part_of
from puna.train.objectives import Loss, Objective

if TYPE_CHECKING:
    from puna.model.llama import Llama
    from puna.train.loader import MicroBatch


class Alternating:
    """An objective that is asked of the whole model or of a child, as :meth:`begin` has it.

    Behind each step of the whole come ``child_steps`` of children. A child computes no more than what it has.
    """

    def __init__(self, objective: Objective, space: SearchSpace, seed: int, child_steps: int = 1) -> None:
        self.objective, self.space, self.seed = objective, space, seed
        self.child_steps = child_steps
        self._kept = space.kept(space.whole)
        self._genes = space.whole

    @property
    def figures(self) -> tuple[str, ...]:
        """Those of the objective."""
        return self.objective.figures

    def genes(self, step: int) -> Genes:
        """What a step learns with; steps count from 0."""
        if step % (1 + self.child_steps) == 0:
            return self.space.whole
        return self.space.sample(numpy_generator(self.seed, "child", step))

    def begin(self, step: int) -> None:
        """The step that micro-batches belong to from now on."""
        self._genes = self.genes(step)
        self._kept = self.space.kept(self._genes)

    def __call__(self, model: Llama, micro: MicroBatch) -> Loss:
        """The loss of the whole or of this step's child."""
        learner = model if self._genes == self.space.whole else part_of(model, self._kept)
        return self.objective(learner, micro)
