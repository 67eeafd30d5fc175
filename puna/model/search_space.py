"""Children of a decoder as genes: how many layers it has, and how wide each feed-forward is.

System S29, LLaMA-NAS (Sarah and others 2024, arXiv:2405.18377): a child has one of a few numbers of layers,
and in each layer the first channels of the feed-forward, one of a few numbers of them. Which layers leave is
not said there: here they leave in a fixed order, a policy. Genes of layers that are not there say nothing;
a child has one spelling, in which those genes are 0. All genes 0 are the whole decoder.

Channels are taken from the front, so they are put in the order of their importance before a super-network is
tuned (:mod:`puna.edit.searching.sort_units`). No torch here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from puna.core.errors import PunaError
from puna.model.spec import LlamaSpec
from puna.model.units import Kept

if TYPE_CHECKING:
    import numpy

Genes = tuple[int, ...]
"""The number of a depth, then for each layer the number of a width; both fall from 0 on."""
Leaving = Literal["last", "spread"] | tuple[int, ...]
"""Which layers leave first: the last ones; those in between, evenly; or layers in the order they leave."""


@dataclass(frozen=True)
class SearchSpace:
    """The children of a decoder of ``spec``; made by :meth:`of`.

    ``depths`` are numbers of layers and ``widths``, by layer, numbers of channels: both fall, and begin with
    those of the whole. ``order`` are layers as they leave, the first to go first.
    """

    spec: LlamaSpec
    depths: tuple[int, ...]
    widths: tuple[tuple[int, ...], ...]
    order: tuple[int, ...]

    @classmethod
    def of(
        cls, spec: LlamaSpec, depths: Sequence[int], shares: Sequence[float], leaving: Leaving = "spread"
    ) -> SearchSpace:
        """Children with so many layers and such shares of each layer's channels.

        The whole has to be among them: the number of all layers, and the share 1.
        """
        layers = len(spec.blocks)
        found = tuple(sorted(set(depths), reverse=True))
        if not found or found[0] != layers or found[-1] < 1:
            raise PunaError(
                "numbers of layers go from all of the model's down to one at least",
                where="layers",
                found=sorted(depths),
                expected=f"{layers}, and smaller numbers",
            )
        falling = tuple(sorted(set(shares), reverse=True))
        if not falling or falling[0] != 1.0 or falling[-1] <= 0:
            raise PunaError(
                "shares of the channels go from 1 down, and lie above 0",
                where="widths",
                found=sorted(shares),
            )
        widths = tuple(_widths(block.width, falling) for block in spec.blocks)
        return cls(spec, found, widths, _order(layers, found[-1], leaving))

    @property
    def whole(self) -> Genes:
        """The whole decoder."""
        return (0,) * (1 + len(self.widths))

    @property
    def smallest(self) -> Genes:
        """The child with the fewest layers and channels."""
        last = (len(self.depths) - 1, *(len(widths) - 1 for widths in self.widths))
        return self.canonical(last)

    @property
    def choices(self) -> tuple[int, ...]:
        """How many values each gene has."""
        return (len(self.depths), *(len(widths) for widths in self.widths))

    @property
    def size(self) -> int:
        """How many different children there are."""
        return sum(
            math.prod(len(self.widths[layer]) for layer in self.layers((depth,)))
            for depth in range(len(self.depths))
        )

    def check(self, genes: Sequence[int]) -> None:
        """Refuse genes of another space."""
        if len(genes) != len(self.choices) or any(
            not 0 <= gene < count for gene, count in zip(genes, self.choices, strict=True)
        ):
            raise PunaError(
                "genes are not of this space", found=list(genes), expected=f"below {list(self.choices)}"
            )

    def layers(self, genes: Sequence[int]) -> tuple[int, ...]:
        """The layers that a child has, in their order."""
        gone = set(self.order[: len(self.widths) - self.depths[genes[0]]])
        return tuple(layer for layer in range(len(self.widths)) if layer not in gone)

    def canonical(self, genes: Sequence[int]) -> Genes:
        """The one spelling of a child: genes of layers that it does not have are 0."""
        self.check(genes)
        there = set(self.layers(genes))
        return (
            int(genes[0]),
            *(int(gene) if layer in there else 0 for layer, gene in enumerate(genes[1:])),
        )

    def kept(self, genes: Sequence[int]) -> Kept:
        """What a child keeps of the decoder: its layers, and their first channels."""
        self.check(genes)
        everything = Kept.everything(self.spec)
        channels = tuple(
            tuple(range(self.widths[layer][gene])) for layer, gene in enumerate(self.canonical(genes)[1:])
        )
        return dataclasses.replace(everything, channels=channels, blocks=self.layers(genes))

    def sample(self, generator: numpy.random.Generator) -> Genes:
        """A child of which every gene is drawn evenly."""
        return self.canonical([int(generator.integers(count)) for count in self.choices])

    def one_hot(self, genes: Sequence[int]) -> list[float]:
        """One number for each value of each gene, 1 where it is the child's: what predictors learn from.

        Of a layer that is not there all are 0.
        """
        there = {0, *(1 + layer for layer in self.layers(genes))}
        canonical = self.canonical(genes)
        return [
            float(place in there and canonical[place] == value)
            for place, count in enumerate(self.choices)
            for value in range(count)
        ]

    def describe(self, genes: Sequence[int]) -> str:
        """For a reader: the layers that are there, each with its channels."""
        canonical = self.canonical(genes)
        there = self.layers(genes)
        widths = (f"{layer}:{self.widths[layer][canonical[1 + layer]]}" for layer in there)
        return f"{len(there)} layers, {' '.join(widths)}"


def _widths(width: int, shares: Sequence[float]) -> tuple[int, ...]:
    """Numbers of channels, falling; a layer without a feed-forward has 0."""
    if not width:
        return (0,)
    return tuple(sorted({max(1, round(share * width)) for share in shares}, reverse=True))


def _order(layers: int, fewest: int, leaving: Leaving) -> tuple[int, ...]:
    """As many layers as leave at most, in the order in which they do."""
    number = layers - fewest
    if leaving == "last":
        return tuple(range(layers - 1, layers - 1 - number, -1))
    if leaving == "spread":
        return _spread(layers, number)
    order = tuple(leaving)
    outside = [layer for layer in order if not 0 <= layer < layers]
    if outside or len({*order}) < len(order) or len(order) < number:
        raise PunaError(
            "layers that leave are layers of the model, each once, as many as leave at most",
            where="leaving",
            found=list(order),
            expected=f"{number} numbers from 0 to {layers - 1}",
        )
    return order[:number]


def _spread(layers: int, number: int) -> tuple[int, ...]:
    """Each as far as can be from both ends and from those gone before it; of equals the later one."""
    fixed = [-1, layers]
    gone: list[int] = []
    while len(gone) < number:
        left = [layer for layer in range(layers) if layer not in gone]
        gone.append(max(left, key=lambda layer: (min(abs(layer - other) for other in fixed), layer)))
        fixed.append(gone[-1])
    return tuple(gone)
