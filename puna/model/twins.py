"""Expanded layers: a frozen layer and its trainable twin, whose outputs a merger puts together (S02).

Source: Control LLM (arXiv:2501.10979; the released code settles what the paper leaves open). Both halves read
the same hidden states h; of their outputs p (frozen) and e (twin), residuals included, the merger makes

* ``lerp``: (1 - w) p + w e with w = sigmoid(bias), one number for the layer
* ``dlerp``: the same, w = sigmoid(W [p; e] + bias) for each token; ``dlerpin``: w from h
* ``slerp``: along the arc between p and e; a token whose two are almost parallel goes along the line
* ``proj``: lerp, while the divergence compares e with a map of p; ``prog``: lerp between that map of p and e
* ``moe``: one of the two for each token, the twin where w from h is above a half

A twin that is a copy leaves logits as they are to the bit (of ``prog`` with the map at identity): p and e
are equal then, and torch's lerp of equals is exact. Names of the frozen half are those of a plain layer; the
twin is ``layers.N.twin``, and stores its keys in a slot of its own behind those of all layers.

Unlike in the released code the arc is chosen for each token and not for the whole batch; the gate of ``moe``
is one row in place of two under a softmax, which is the same function, and learns from the text through the
choice (straight through); and nothing of a merger looks at whether the model is being trained.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from puna.core.errors import PunaError
from puna.model.llama import Block

if TYPE_CHECKING:
    from puna.model.llama import Attending, Llama, Storing, _Rotations
    from puna.model.spec import BlockSpec, LlamaSpec, MergerKind

PARALLEL = 1e-4
"""Angle, in radians, from 0 or pi, below which ``slerp`` goes along the line."""
_GATED = {"dlerp": 2, "dlerpin": 1, "moe": 1}  # by kind: inputs of the gate, in widths of the model
_MAPPED = ("proj", "prog")


@dataclass(frozen=True)
class Seen:
    """What passed through an expanded layer: both halves' outputs [batch, time, hidden], the twin's share.

    ``share`` is the w of each token [batch, time, 1], or one for all [1].
    """

    layer: int
    merger: Merger
    frozen: Tensor
    twin: Tensor
    share: Tensor


class _Straight(torch.autograd.Function):
    """1 where a share is above a half, else 0; gradients pass as if it were the share."""

    @staticmethod
    def forward(_ctx: Any, share: Tensor) -> Tensor:
        return (share > 0.5).to(share.dtype)

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Merger(nn.Module):
    """Puts the outputs of a frozen layer and its twin together.

    ``bias`` [1] is the constant of the twin's share, ``weight`` [1, inputs] a gate's matrix, ``map``
    [hidden, hidden] that of ``proj`` and ``prog``.
    """

    def __init__(self, kind: MergerKind, hidden_size: int) -> None:
        super().__init__()
        self.kind = kind
        if kind in _GATED:
            self.weight = nn.Parameter(torch.empty(1, _GATED[kind] * hidden_size))
        if kind in _MAPPED:
            self.map = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(1))

    def forward(self, entering: Tensor, frozen: Tensor, twin: Tensor) -> tuple[Tensor, Tensor]:
        """Three times [batch, time, hidden] to the merged same, and the twin's share, as in :class:`Seen`."""
        share = self.share(entering, frozen, twin)
        if self.kind == "slerp":
            return spherical(frozen, twin, share), share
        if self.kind == "prog":
            frozen = functional.linear(frozen, self.map)
        weight: Tensor = _Straight.apply(share) if self.kind == "moe" else share  # type: ignore[no-untyped-call]
        return torch.lerp(frozen, twin, weight), share

    def share(self, entering: Tensor, frozen: Tensor, twin: Tensor) -> Tensor:
        """The twin's share w, [batch, time, 1] of a gate, else [1]."""
        if self.kind not in _GATED:
            return torch.sigmoid(self.bias)
        read = torch.cat((frozen, twin), dim=-1) if self.kind == "dlerp" else entering
        return torch.sigmoid(functional.linear(read, self.weight, self.bias))

    def compared(self, frozen: Tensor) -> Tensor:
        """What the divergence compares the twin with; no gradient reaches the frozen layer through it."""
        frozen = frozen.detach()
        return functional.linear(frozen, self.map) if self.kind == "proj" else frozen

    @torch.no_grad()
    def begin(self, generator: torch.Generator, noise: float) -> None:
        """A share of a half, a gate drawn as torch draws one, a map that is identity plus so much noise."""
        self.bias.zero_()
        if self.kind in _GATED:
            bound = self.weight.shape[1] ** -0.5
            drawn = torch.empty(self.weight.shape).uniform_(-bound, bound, generator=generator)
            self.weight.copy_(drawn)
        if self.kind in _MAPPED:
            drawn = torch.empty(self.map.shape).normal_(generator=generator)
            self.map.copy_(torch.eye(len(drawn)) + noise * drawn)


def spherical(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """From ``first`` to ``second`` [..., hidden] along the arc between them, by ``weight`` [..., 1].

    A token whose two are parallel, or point in opposite ways, goes along the line. Angles are taken in
    float32 or wider.
    """
    wide = torch.promote_types(first.dtype, torch.float32)
    one, other = (functional.normalize(each.to(wide), dim=-1) for each in (first, second))
    apart = torch.linalg.vector_norm(one - other, dim=-1, keepdim=True)
    together = torch.linalg.vector_norm(one + other, dim=-1, keepdim=True)
    straight = (apart < PARALLEL) | (together < PARALLEL)
    # Both lengths are replaced where they are not looked at, so that no gradient of a zero is asked for.
    angle = 2 * torch.atan2(torch.where(straight, 1.0, apart), torch.where(straight, 1.0, together))
    weight = weight.to(wide)
    parts = torch.sin((1 - weight) * angle) * first + torch.sin(weight * angle) * second
    along = parts / torch.sin(angle)
    return torch.where(straight, torch.lerp(first, second, weight.to(first.dtype)), along.to(first.dtype))


class TwinBlock(Block):
    """A layer and its twin: two blocks of one shape with keys of their own, and a merger."""

    def __init__(self, spec: LlamaSpec, layer: int) -> None:
        super().__init__(spec, layer)
        kind = spec.blocks[layer].merger
        assert kind is not None
        self.layer = layer
        self.twin = Block(spec, layer)
        if self.block.attention == "full":
            names = [slot.name for slot in spec.slots]
            self.twin.self_attn.layer = names.index(f"layers.{layer}.twin")
        self.merger = Merger(kind, spec.hidden_size)
        self.seen: list[Seen] | None = None  # whoever watches; see :func:`watched`

    def forward(
        self, hidden: Tensor, rotations: _Rotations, layout: Attending, cache: Storing | None
    ) -> Tensor:
        """[batch, time, hidden] to the same."""
        frozen = Block.feed(self, Block.attend(self, hidden, rotations, layout, cache))
        twin = self.twin(hidden, rotations, layout, cache)
        merged, share = self.merger(hidden, frozen, twin)
        if self.seen is not None:
            self.seen.append(Seen(self.layer, self.merger, frozen, twin, share))
        return cast(Tensor, merged)

    def tell(self, block: BlockSpec) -> None:
        """See :meth:`Block.tell`; the twin is told the same."""
        super().tell(block)
        self.twin.tell(block)

    def attend(
        self, hidden: Tensor, rotations: _Rotations, layout: Attending, cache: Storing | None
    ) -> Tensor:
        """Refused: the merger is behind both halves."""
        raise self._apart()

    def feed(self, hidden: Tensor) -> Tensor:
        """Refused: the merger is behind both halves."""
        raise self._apart()

    def _apart(self) -> PunaError:
        return PunaError(
            "attention and feed-forward of an expanded layer cannot be run apart",
            where=f"layer {self.layer}",
            found=f"a twin, merged by {self.merger.kind}",
            fix="put the twins back into their layers first: the stage merge_twins",
        )


def expanded_layers(model: Llama) -> list[TwinBlock]:
    """The expanded layers of a decoder, in their order."""
    return [layer for layer in model.model.layers if isinstance(layer, TwinBlock)]


@contextlib.contextmanager
def watched(model: Llama) -> Iterator[list[Seen]]:
    """A block in which each pass notes what goes through the expanded layers; nothing is computed for it."""
    seen: list[Seen] = []
    layers = expanded_layers(model)
    try:
        for layer in layers:
            layer.seen = seen
        yield seen
    finally:
        for layer in layers:
            layer.seen = None
