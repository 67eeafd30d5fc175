"""A curriculum: documents from the shortest to the longest, or from the lowest loss of the starting model.

Documents are sorted before they are packed, so that a packed row holds neighbours. Losses are
measured once and written into the run's folder: a resumed run, whose model may have been computed
with other rounding, goes by what stands there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from puna.core.files import read_json, write_json
from puna.core.progress import Track
from puna.text.encode import Encoded
from puna.text.packing import Mode, Row, Slice, collate
from puna.train.distributed import World
from puna.train.objectives import linear_cross_entropy

if TYPE_CHECKING:
    from puna.model.llama import Llama

FILE = "order.json"


def in_order(lengths_or_losses: Sequence[float], *, descending: bool) -> list[int]:
    """Places from the smallest value to the largest, or the other way; equal ones stay as they are."""
    sign = -1.0 if descending else 1.0
    return sorted(range(len(lengths_or_losses)), key=lambda place: sign * lengths_or_losses[place])


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
