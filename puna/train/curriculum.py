"""A curriculum: documents from the shortest to the longest, or from the lowest loss of the starting model.

Documents are sorted before they are packed, so that a packed row holds neighbours. Losses are
measured once and written into the run's folder: a resumed run, whose model may have been computed
with other rounding, goes by what stands there.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import torch

from puna.core.files import read_json, write_json
from puna.core.progress import Track
from puna.text.encode import Encoded
from puna.text.packing import Mode, Row, Slice, collate
from puna.train.distributed import World
from puna.train.objectives import linear_cross_entropy

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from puna.model.llama import Llama
    from puna.train.loader import Feed
    from puna.train.sources import Sources

FILE = "order.json"


def in_order(lengths_or_losses: Sequence[float], *, descending: bool) -> list[int]:
    """Places from the smallest value to the largest, or the other way; equal ones stay as they are."""
    sign = -1.0 if descending else 1.0
    return sorted(range(len(lengths_or_losses)), key=lambda place: sign * lengths_or_losses[place])


def keys_of_rows(rows: Iterable[Row], of_document: Mapping[int, float]) -> NDArray[numpy.float64]:
    """[rows, 2] the keys of the first and the last document in each packed row, by the ids of documents."""
    return numpy.array(
        [[of_document[id(row.slices[end].document)] for end in (0, -1)] for row in rows], dtype=numpy.float64
    )


def order_kept(
    sources: Sources, feed: Feed, epoch: int, epoch_step: int, *, descending: bool
) -> dict[str, float]:
    """What became of an order on its way into the steps, up to step ``epoch_step`` of ``epoch``:

    * ``curriculum.rows``: the rows fed; ``curriculum.breaks``: those that begin with a document that
      should have come before the one that the row before of the same source, in the same pass, ended with
    * ``curriculum.first`` and ``curriculum.last``: mean key of the rows in the first and the last step
    """
    if sources.keys is None:
        return {}
    keys = -sources.keys if descending else sources.keys
    size = numpy.bincount(sources.of)
    fed: Counter[int] = Counter()
    before: dict[int, float] = {}
    breaks = 0
    means: list[float] = []
    for number in range(epoch + (epoch_step > 0)):
        steps = feed.steps(number)
        for step in steps[:epoch_step] if number == epoch else steps:
            means.append(float(sources.keys[step.rows].mean()))
            for row in step.rows.tolist():
                source = int(sources.of[row])
                again = fed[source] % size[source] == 0  # a pass begins
                breaks += not again and keys[row, 0] < before[source]
                before[source] = keys[row, 1]
                fed[source] += 1
    return {
        "curriculum.rows": float(fed.total()),
        "curriculum.breaks": float(breaks),
        "curriculum.first": means[0],
        "curriculum.last": means[-1],
    }


def document_losses(
    model: Llama,
    documents: Sequence[Encoded],
    length: int,
    *,
    mode: Mode,
    micro_batch_tokens: int,
    world: World,
) -> list[float]:
    """Mean loss of each document's targets in nats (0 without any), in pieces of at most ``length`` tokens.

    Of a document that ``mode`` would cut off, only what is trained on is measured. Which rows share a
    pass does not depend on the number of processes.
    """
    pieces: list[tuple[int, Row]] = []
    for number, document in enumerate(documents):
        stop = len(document) if mode == "wrap" else min(len(document), length)
        pieces += [
            (number, Row((Slice(document, start, min(start + length, stop)),)))
            for start in range(0, stop, length)
        ]
    pieces.sort(key=lambda piece: -piece[1].tokens)
    sums = torch.zeros(len(documents), 2, dtype=torch.float64)  # nats, targets
    start = group = 0
    track = Track("losses of the curriculum", len(pieces), "rows") if world.is_main else None
    with torch.no_grad(), track or contextlib.nullcontext():
        while start < len(pieces):
            part = pieces[start : start + max(1, micro_batch_tokens // pieces[start][1].tokens)]
            if group % world.size == world.rank:
                _add(model, part, sums, world)
            start += len(part)
            group += 1
            if track is not None:
                track.advance(len(part))
    total = world.total(sums)
    return (total[:, 0] / total[:, 1].clamp(min=1)).tolist()


def _add(model: Llama, part: Sequence[tuple[int, Row]], sums: torch.Tensor, world: World) -> None:
    """Add nats and targets of some pieces to those of their documents."""
    batch = collate([row for _, row in part]).to(world.device)
    hidden = model.hidden(batch.input_ids, batch.positions, batch.segments)
    for place, (number, _) in enumerate(part):
        one = slice(place, place + 1)
        loss = linear_cross_entropy(hidden[one], model.head_weight, batch.labels[one])
        sums[number] += torch.tensor([float(loss.total), loss.targets], dtype=torch.float64)


def stored(folder: Path, recipe: str) -> dict[str, list[float]] | None:
    """The losses that a run of this ``recipe`` wrote into its folder, by source; None if there are none."""
    path = folder / FILE
    content = read_json(path) if path.exists() else {}
    return content["losses"] if content.get("recipe") == recipe else None


def store(folder: Path, recipe: str, losses: Mapping[str, Sequence[float]]) -> None:
    """Write losses for :func:`stored`."""
    write_json(folder / FILE, {"recipe": recipe, "losses": losses})
