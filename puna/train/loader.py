"""The order in which packed rows are fed: a function of the seed and the position alone.

An epoch is a permutation of the rows drawn from (seed, epoch). It is cut into steps of at most
``batch_tokens`` tokens; a step never spans two epochs, and none is left out, so the last step of an
epoch may be smaller. The rows of a step are dealt out to the processes and grouped into micro-batches
of at most ``micro_batch_tokens`` positions, padding included.

What a step learns from does not depend on the number of processes or the size of micro-batches. The
longest rows of a step run first, and the step with the largest micro-batch is the first of the run
(it changes places with the one that the permutation put there): if memory does not suffice, that
shows at once. Rows of one length, as packing makes them, need no such exchange.

With a mixture an epoch is a portion of it (:mod:`puna.train.mixture`), its rows in the order in which
they were drawn; sorted rows come as they are, and no step changes places.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy

from puna.core.errors import PunaError
from puna.core.seeds import numpy_generator
from puna.text.packing import Batch, Row, collate
from puna.train.mixture import MixedRows
from puna.train.objectives import Unit
from puna.train.sources import Sources

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass: the batch, and the indices of the rows in it."""

    batch: Batch
    rows: NDArray[numpy.int64]

    def to(self, device: torch.device) -> MicroBatch:
        """The same with its tensors on another device."""
        return MicroBatch(self.batch.to(device), self.rows)


@dataclass(frozen=True)
class Step:
    """One optimiser step: its rows, over all processes, and how many tokens and targets they hold.

    Its loss is the mean over ``units``: its targets, or its pairs where preferences are learnt.
    """

    rows: NDArray[numpy.int64]
    tokens: int
    targets: int
    units: int


class Feed:
    """Feeds ``rows`` to the loop. See the module's docstring for the order.

    ``unit`` is what a step's loss is the mean of; of pairs a row holds both documents, one after
    the other.

    ``rank`` and ``size`` are this process's place among all; ``pad_id`` fills up shorter rows (it is
    never looked at). A step without any target is refused when its epoch is drawn. ``mixture`` decides
    what an epoch holds; ``sources`` are what tokens are counted by.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        batch_tokens: int,
        micro_batch_tokens: int,
        seed: int,
        rank: int = 0,
        size: int = 1,
        pad_id: int = 0,
        unit: Unit = "tokens",
        shuffled: bool = True,
        mixture: MixedRows | None = None,
        sources: Sources | None = None,
    ) -> None:
        if not rows:
            raise PunaError("no rows to train on", fix="look at what packing dropped and why")
        self.rows = rows
        self.pad_id = pad_id
        self.batch_tokens = batch_tokens
        self.micro_batch_tokens = micro_batch_tokens
        self.seed = seed
        self.rank = rank
        self.size = size
        self.shuffled = shuffled
        self.mixture = mixture
        self.sources = sources
        self.lengths = numpy.array([row.tokens for row in rows], dtype=numpy.int64)  # in tokens
        self.targets = numpy.array([row.targets for row in rows], dtype=numpy.int64)
        self.unit: Unit = unit
        pairs = [len(row.slices) // 2 for row in rows]
        self.units = self.targets if unit == "tokens" else numpy.array(pairs, dtype=numpy.int64)
        self._epoch = -1
        self._steps: list[Step] = []
        longest = int(self.lengths.max())
        for name, limit in (("batch_tokens", batch_tokens), ("micro_batch_tokens", micro_batch_tokens)):
            if longest > limit:
                raise PunaError(
                    f"{name} is smaller than the longest row",
                    where=name,
                    found=limit,
                    expected=f"at least {longest}",
                    fix=f"raise {name} or lower max_length",
                )

    def steps(self, epoch: int) -> list[Step]:
        """The steps of an epoch, in order."""
        if epoch != self._epoch:
            self._steps = self._draw(epoch)
            self._epoch = epoch
        return self._steps

    def _order(self, epoch: int) -> NDArray[numpy.int64]:
        """The rows of an epoch, in order."""
        if self.mixture is not None:
            return self.mixture.rows(epoch)
        if not self.shuffled:
            return numpy.arange(len(self.rows))
        return numpy_generator(self.seed, "train", "order", epoch).permutation(len(self.rows))

    def _draw(self, epoch: int) -> list[Step]:
        order = self._order(epoch)
        ends = numpy.cumsum(self.lengths[order])
        steps: list[Step] = []
        start = 0
        while start < len(order):
            used = ends[start - 1] if start else 0
            end = max(start + 1, int(numpy.searchsorted(ends, used + self.batch_tokens, side="right")))
            chosen = order[start:end]
            counts = (int(count[chosen].sum()) for count in (self.lengths, self.targets, self.units))
            steps.append(Step(chosen, *counts))
            start = end
        empty = next((step for step in steps if not step.targets), None)
        if empty is not None:
            raise PunaError(
                "a batch without targets: nothing in it is trained on",
                where=f"epoch {epoch}",
                found=self.names(empty.rows),
                fix="raise batch_tokens or max_length, or check train_on",
            )
        if epoch == 0 and self.shuffled and self.lengths.min() != self.lengths.max():
            heaviest = max(range(len(steps)), key=lambda index: self._weight(steps[index]))
            steps[0], steps[heaviest] = steps[heaviest], steps[0]
        return steps

    def _weight(self, step: Step) -> int:
        """Positions of the largest micro-batch of a step."""
        return max(len(group) * int(self.lengths[group].max()) for group in self._groups(step.rows))

    def _groups(self, rows: NDArray[numpy.int64]) -> list[NDArray[numpy.int64]]:
        """Rows in micro-batches, the longest first."""
        ordered = rows[numpy.argsort(-self.lengths[rows], kind="stable")]
        groups: list[NDArray[numpy.int64]] = []
        start = 0
        while start < len(ordered):
            many = max(1, self.micro_batch_tokens // int(self.lengths[ordered[start]]))
            groups.append(ordered[start : start + many])
            start += many
        return groups

    def micro_batches(self, step: Step) -> Iterator[MicroBatch]:
        """This process's share of a step."""
        ordered = step.rows[numpy.argsort(-self.lengths[step.rows], kind="stable")]
        for group in self._groups(ordered[self.rank :: self.size]):
            batch = collate([self.rows[int(row)] for row in group], pad_id=self.pad_id)
            yield MicroBatch(batch, group)

    def rounds(self, step: Step) -> int:
        """Micro-batches of the process that has the most of them in a step."""
        ordered = step.rows[numpy.argsort(-self.lengths[step.rows], kind="stable")]
        return max(len(self._groups(ordered[rank :: self.size])) for rank in range(self.size))

    def filler(self, step: Step) -> MicroBatch:
        """The shortest row of a step with something to learn, for a process that joins in without a share."""
        learnt = step.rows[self.units[step.rows] > 0]
        row = learnt[[numpy.argmin(self.lengths[learnt])]]
        return MicroBatch(collate([self.rows[int(row[0])]], pad_id=self.pad_id), row)

    def names(self, rows: NDArray[numpy.int64], most: int = 8) -> str:
        """The corpus rows whose pieces are in these packed rows, for messages; the first few."""
        pieces = (piece for row in rows for piece in self.rows[int(row)].slices)
        names = list(dict.fromkeys(piece.document.source for piece in pieces))
        more = f" and {len(names) - most} more" if len(names) > most else ""
        return ", ".join(names[:most]) + more

    def count(
        self, *, epochs: int | None = None, max_steps: int | None = None, max_tokens: int | None = None
    ) -> tuple[int, int]:
        """(steps, tokens) of a run that ends at whichever of the limits is given, or with its mixture."""
        if self.mixture is not None and self.mixture.portions is not None:
            epochs = self.mixture.portions
        steps = tokens = epoch = 0

        def reached() -> bool:
            return (max_steps is not None and steps >= max_steps) or (
                max_tokens is not None and tokens >= max_tokens
            )

        while (epochs is None or epoch < epochs) and not reached():
            for step in self.steps(epoch):
                if self.mixture is None and reached():  # a mixture draws no more than the limits let it
                    break
                steps += 1
                tokens += step.tokens
            epoch += 1
        return steps, tokens

    def phase_ends(self) -> list[int]:
        """The steps of the run after which the phases of its mixture end."""
        phases = 0 if self.mixture is None else len(self.mixture.settings.phases)
        return list(itertools.accumulate(len(self.steps(phase)) for phase in range(phases)))

    # ---- mixtures ----------------------------------------------------------------------------------------

    def follow(self, history: Sequence[Mapping[str, float]]) -> None:
        """Draw what comes by this history of held-out losses, which grows as the run goes on."""
        if self.mixture is not None:
            self.mixture.follow(history)
            self._epoch = -1

    def awaits_losses(self, epoch: int, epoch_step: int) -> bool:
        """Whether held-out losses have to be measured before this step, for its mixture to follow."""
        mixture = self.mixture
        if mixture is None or mixture.settings.feedback is None or epoch_step:
            return False
        return len(mixture.history) == epoch < (mixture.portions or 0)

    def tokens_by_source(self, step: Step) -> dict[str, int]:
        """Tokens of a step by the source of its rows; nothing where sources are not counted."""
        if self.sources is None:
            return {}
        sums = numpy.bincount(
            self.sources.of[step.rows], self.lengths[step.rows], minlength=len(self.sources.names)
        )
        return {name: int(tokens) for name, tokens in zip(self.sources.names, sums, strict=True)}

    def uses(self, epoch: int, epoch_step: int) -> NDArray[numpy.int64]:
        """How often each row is fed before step ``epoch_step`` of ``epoch``."""
        found = numpy.zeros(len(self.rows), dtype=numpy.int64)
        for before in range(epoch + (epoch_step > 0)):
            steps = self.steps(before)
            for step in steps[:epoch_step] if before == epoch else steps:
                numpy.add.at(found, step.rows, 1)  # a step may hold a row twice, where sources repeat
        return found
