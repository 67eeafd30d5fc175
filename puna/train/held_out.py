"""Loss on held-out corpora between training steps: sums only, never logits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from puna.text.packing import Packed, Row, collate
from puna.train.distributed import World
from puna.train.objectives import linear_cross_entropy
from puna.train.sharding import is_sharded

if TYPE_CHECKING:
    from puna.model.llama import Llama


@dataclass(frozen=True)
class HeldOutCorpus:
    """Packed rows, and the UTF-8 bytes of the texts in them where each token stands for text (else 0)."""

    packed: Packed
    bytes: int


@dataclass(frozen=True)
class HeldOut:
    """Held-out corpora by name, measured in passes of at most ``micro_batch_tokens`` positions."""

    corpora: Mapping[str, HeldOutCorpus]
    micro_batch_tokens: int
    world: World

    def measure(self, model: Llama) -> dict[str, float]:
        """``<name>.loss`` (nats per target token) and ``<name>.bits_per_byte`` of each corpus.

        The bits are those of the packed rows, end tokens included and without the first token of a
        row, and serve to draw a curve; the stage ``evaluate`` compares models document by document.
        """
        found: dict[str, float] = {}
        for name, corpus in self.corpora.items():
            nats, targets = self._sums(model, corpus.packed)
            found[f"{name}.loss"] = nats / targets
            if corpus.bytes:
                found[f"{name}.bits_per_byte"] = nats / math.log(2) / corpus.bytes
        return found

    @torch.no_grad()
    def _sums(self, model: Llama, packed: Packed) -> tuple[float, int]:
        """Sum of token losses and number of targets over all processes."""
        sums = torch.zeros(2, dtype=torch.float64)
        ordered = sorted(packed, key=lambda row: -row.tokens)
        shares = [self._passes(ordered[rank :: self.world.size]) for rank in range(self.world.size)]
        own = shares[self.world.rank]
        for rows in own:
            batch = collate(rows).to(self.world.device)
            hidden = model.hidden(batch.input_ids, batch.positions, batch.segments)
            loss = linear_cross_entropy(hidden, model.head_weight, batch.labels)
            sums += torch.tensor([float(loss.total), loss.targets], dtype=torch.float64)
        if is_sharded(model):  # every pass communicates: all processes run as many
            for _ in range(max(map(len, shares)) - len(own)):
                model.hidden(torch.zeros((1, 1), dtype=torch.int64, device=self.world.device))
        total = self.world.total(sums)
        return float(total[0]), int(total[1])

    def _passes(self, rows: Sequence[Row]) -> list[Sequence[Row]]:
        """Rows, the longest first, in passes of at most ``micro_batch_tokens`` positions."""
        passes: list[Sequence[Row]] = []
        start = 0
        while start < len(rows):
            passes.append(rows[start : start + max(1, self.micro_batch_tokens // rows[start].tokens)])
            start += len(passes[-1])
        return passes
