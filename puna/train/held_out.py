"""Figures of held-out corpora between training steps: sums only, never logits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy
import torch

from puna.text.packing import Packed, Row, collate
from puna.train.distributed import World
from puna.train.loader import MicroBatch
from puna.train.objectives import CrossEntropy, Objective, Unit
from puna.train.sharding import is_sharded

if TYPE_CHECKING:
    from puna.model.llama import Llama


@dataclass(frozen=True)
class HeldOutCorpus:
    """Packed rows, and the UTF-8 bytes of the texts in them where each token stands for text (else 0).

    ``objective`` gives the loss, a mean over ``unit``, and what else is measured.
    """

    packed: Packed
    bytes: int
    objective: Objective = CrossEntropy()  # noqa: RUF009 - immutable
    unit: Unit = "tokens"


@dataclass(frozen=True)
class HeldOut:
    """Held-out corpora by name, measured in passes of at most ``micro_batch_tokens`` positions."""

    corpora: Mapping[str, HeldOutCorpus]
    micro_batch_tokens: int
    world: World

    def measure(self, model: Llama) -> dict[str, float]:
        """``<name>.loss`` (nats per target token or per pair) and ``<name>.bits_per_byte`` of each corpus.

        Of pairs also ``<name>.margin``, ``<name>.accuracy`` and the objective's other figures. The
        bits are those of the packed rows, end tokens included and without the first token of a
        row, and serve to draw a curve; the stage ``evaluate`` compares models document by document.
        """
        found: dict[str, float] = {}
        for name, corpus in self.corpora.items():
            units, nats, *figures = self._sums(model, corpus)
            found[f"{name}.loss"] = nats / units
            for figure, value in zip(corpus.objective.figures, figures, strict=True):
                found[f"{name}.{figure}"] = value / units
            if corpus.bytes:
                found[f"{name}.bits_per_byte"] = nats / math.log(2) / corpus.bytes
        return found

    @torch.no_grad()
    def _sums(self, model: Llama, corpus: HeldOutCorpus) -> list[float]:
        """Number of units, sum of their losses and of each figure, over all processes."""
        names, tokens, world = corpus.objective.figures, self.micro_batch_tokens, self.world
        sums = torch.zeros(2 + len(names), dtype=torch.float64)
        run = 0
        for micro in passes(corpus.packed, tokens, world):
            loss = corpus.objective(model, micro.to(world.device))
            pairs = sum(len(corpus.packed[int(row)].slices) // 2 for row in micro.rows)
            units = loss.targets if corpus.unit == "tokens" else pairs
            values = [float(loss.total), *(float(loss.figures[name]) for name in names)]
            sums += torch.tensor([units, *values], dtype=torch.float64)
            run += 1
        if is_sharded(model):  # every pass communicates: all processes run as many
            most = max(len(_shares(corpus.packed, tokens, rank, world.size)) for rank in range(world.size))
            for _ in range(most - run):
                model.hidden(torch.zeros((1, 1), dtype=torch.int64, device=world.device))
        found: list[float] = world.total(sums).tolist()
        return found


def passes(rows: Sequence[Row], micro_batch_tokens: int, world: World) -> Iterator[MicroBatch]:
    """This process's share of ``rows``, the longest first, in passes of so many positions at most."""
    for numbers in _shares(rows, micro_batch_tokens, world.rank, world.size):
        yield MicroBatch(collate([rows[number] for number in numbers]), numpy.array(numbers))


def _shares(rows: Sequence[Row], micro_batch_tokens: int, rank: int, size: int) -> list[list[int]]:
    """The numbers of the rows in each pass of a process."""
    order = sorted(range(len(rows)), key=lambda number: -rows[number].tokens)[rank::size]
    found: list[list[int]] = []
    start = 0
    while start < len(order):
        longest = rows[order[start]].tokens
        found.append(order[start : start + max(1, micro_batch_tokens // longest)])
        start += len(found[-1])
    return found
