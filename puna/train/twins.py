"""The divergence of expanded layers: how far each twin has gone from its frozen layer (S02, 2501.10979).

The objective of Control LLM is that of the text plus the mean over expanded layers of a * D(p, e), for the
outputs p of the frozen layer and e of its twin: D is the mean over the width of squared differences
(``mse``), or smooth-L1 of relu(1 - cos(p, e)) (``cosine``), token by token; a is a number or the twin's
share w.

Sums run over the tokens that have a label, as that of the text does; the released code averages over all
tokens, padding too. p gets no gradient here. In the released code it does, so that the divergence also moves
the twins of earlier layers through it; through e, which reads the same stream, it still reaches them. Its
``dot`` compares a norm with itself and is left out. A layer merged by ``moe`` counts where the twin was
chosen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional

from puna.core.errors import PunaError
from puna.model.twins import Seen, expanded_layers, watched
from puna.train.objectives import IGNORED, CrossEntropy, Loss, Objective

if TYPE_CHECKING:
    from puna.model.llama import Llama
    from puna.train.loader import MicroBatch
    from puna.train.settings import Twins

Divergence = Literal["cosine", "mse"]


def apart(frozen: Tensor, twin: Tensor, divergence: Divergence) -> Tensor:
    """D of each token, [...], of two outputs [..., hidden]; in float32 or wider, exactly 0 for equals."""
    wide = torch.promote_types(twin.dtype, torch.float32)
    one, other = frozen.to(wide), twin.to(wide)
    if divergence == "mse":
        return (one - other).square().mean(-1)
    # 1 - cos is half the squared distance of unit vectors: of equals that is 0, and rounding leaves it so.
    units = (functional.normalize(each, dim=-1) for each in (one, other))
    distance = (next(units) - next(units)).square().sum(-1) / 2
    return functional.smooth_l1_loss(distance, torch.zeros_like(distance), reduction="none")


def divergence_of(seen: Seen, divergence: Divergence, factor: float | Literal["share"]) -> Tensor:
    """a * D of each token [batch, time] that passed through an expanded layer."""
    found = apart(seen.merger.compared(seen.frozen), seen.twin, divergence)
    share = seen.share[..., 0]  # [batch, time], or one number
    if seen.merger.kind == "moe":
        found = found * (share > 0.5)
    return found * (share if factor == "share" else factor)


@dataclass(frozen=True)
class TwinLoss:
    """An objective with the divergence added: ``divergence`` None leaves it out."""

    divergence: Divergence | None = "cosine"
    factor: float | Literal["share"] = 1.0
    inner: Objective = field(default_factory=CrossEntropy)

    @property
    def figures(self) -> tuple[str, ...]:
        """Those of the text's objective, and the divergence where there is one."""
        return (*self.inner.figures, *(("divergence",) if self.divergence else ()))

    def __call__(self, model: Llama, micro: MicroBatch) -> Loss:
        """Sum over the labelled tokens of ``micro``."""
        if self.divergence is None:
            return self.inner(model, micro)
        with watched(model) as seen:
            loss = self.inner(model, micro)
        labelled = micro.batch.labels != IGNORED
        layers = [divergence_of(each, self.divergence, self.factor)[labelled].sum() for each in seen]
        total = torch.stack(layers).mean().float() if layers else torch.zeros_like(loss.total)
        return Loss(loss.total + total, loss.tokens, {**loss.figures, "divergence": total.detach()})


def with_divergence(objective: Objective, twins: Twins | None) -> Objective:
    """The objective of a training of ``twins``; of any other as it is."""
    if twins is None:
        return objective
    return TwinLoss(None if twins.divergence == "none" else twins.divergence, twins.factor, objective)


def free_twins(model: Llama, *, inserted: tuple[int, ...] = (), hold_share: bool = False) -> None:
    """Freeze all but the twins and mergers, and but whole layers ``inserted``, counted from 0.

    ``hold_share`` freezes the mergers' constants too.
    """
    expanded = [block.layer for block in expanded_layers(model)]
    if not expanded and not inserted:
        raise PunaError(
            "no layer of this model is expanded",
            where=model.source,
            fix="expand it first: the stage expand",
        )
    beyond = [layer for layer in inserted if not 0 <= layer < len(model.spec.blocks) or layer in expanded]
    if beyond:
        raise PunaError(
            "an inserted layer is one of the model's, and has no twin",
            where="twins.inserted",
            found=beyond,
            expected=f"numbers from 0 to {len(model.spec.blocks) - 1}, not {', '.join(map(str, expanded))}",
        )
    whole = tuple(f"model.layers.{layer}." for layer in inserted)
    for name, parameter in model.named_parameters():
        held = hold_share and name.endswith(".merger.bias")
        parameter.requires_grad_(
            not held and (".twin." in name or ".merger." in name or name.startswith(whole))
        )
