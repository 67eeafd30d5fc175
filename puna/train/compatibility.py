"""Updating a model without breaking what its earlier version had right (S58, MUSCLE, arXiv:2407.09435).

A task model that is fine-tuned anew on a newer base is better on the mean, and wrong on some items that the
older one had right. The newer one goes on learning the same task from two teachers: itself as it was, and at
some tokens the older one,

    L = mean over tokens of m KL(older || student) + (1 - m) KL(newer || student),

at one temperature on both sides. m is 1 at tokens that are not the student's likeliest one by now
(``student_wrong``): where it errs it is drawn to the older version, whose errors and answers people know. It
is found anew in every step and no gradient goes through it. The paper's ablations: m is 1 where the older
version is right (``older_right``), or everywhere, which is plain distillation from it.

Only labelled tokens count, so a conversation's prompts are left out. Both teachers have the student's
vocabulary; they may be stored (``teacher.py``). Simplified: none of the method; the paper's temperature
is not known to us, so that it is a setting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from puna.train.arguments import precise_dtype
from puna.train.distillation import LinearTeacher, TopTokens, linear_likeliest
from puna.train.objectives import IGNORED, Loss, linear_cross_entropy

if TYPE_CHECKING:
    from puna.model.llama import Llama
    from puna.train.loader import MicroBatch
    from puna.train.teacher import Distill

Where = Literal["student_wrong", "older_right", "everywhere"]


@dataclass(frozen=True)
class Compatible:
    """The objective: divergence from ``older`` at some labelled positions, from ``newer`` at the others.

    ``where`` says at which; ``cross_entropy`` weighs that of the text's own tokens, which is added. The
    figure ``from_older`` is the share of the positions that are learnt from the older version.
    """

    newer: Distill
    older: Distill
    where: Where = "student_wrong"
    cross_entropy: float = 0.0
    figures: tuple[str, ...] = ("from_older",)

    def __call__(self, model: Llama, micro: MicroBatch) -> Loss:
        """Sum over the labelled positions of ``micro``."""
        batch = micro.batch
        labelled = batch.labels != IGNORED
        wanted = batch.labels[labelled]  # [targets]
        hidden = model.hidden(batch.input_ids, batch.positions, batch.segments)[labelled]  # [targets, width]
        older, newer = (one.said(micro, hidden.device) for one in (self.older, self.newer))
        places = self._places(model, hidden, older, wanted)
        total = torch.zeros((), dtype=precise_dtype(hidden), device=hidden.device)
        tokens = torch.empty(len(wanted), dtype=total.dtype, device=hidden.device)
        for one, said, mask in ((self.older, older, places), (self.newer, newer, ~places)):
            found = one.divergence(model, hidden[mask], said.at(mask))
            total = total + found.total
            tokens[mask] = found.positions
        if self.cross_entropy:
            own = linear_cross_entropy(hidden, model.head_weight, wanted)
            total = total + self.cross_entropy * own.total
            tokens = tokens + self.cross_entropy * own.tokens
        return Loss(total, tokens, {"from_older": places.sum().to(total.dtype)})

    @torch.no_grad()
    def _places(
        self, model: Llama, hidden: Tensor, older: LinearTeacher | TopTokens, wanted: Tensor
    ) -> Tensor:
        """Where the older version is learnt from, bool [targets]."""
        if self.where == "everywhere":
            return torch.ones_like(wanted, dtype=torch.bool)
        if self.where == "student_wrong":
            return linear_likeliest(hidden, model.head_weight) != wanted
        if isinstance(older, TopTokens):
            return older.ids[:, 0] == wanted
        return linear_likeliest(older.hidden, older.weight) == wanted
