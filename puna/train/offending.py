"""The rows on which a loss or a gradient was not finite, saved for somebody to look at.

``offending/step-00000003.safetensors`` holds the batch as the objective was given it, rows padded to the
longest, and their numbers; the JSON file beside it names the documents in each row, and says what the
row is in words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from puna.core.files import write_aside, write_json
from puna.text.packing import Batch, collate
from puna.train.distributed import World
from puna.train.loader import Feed, MicroBatch

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    from puna.text.tokenizer import Tokenizer


def file_of(out: Path, step: int, world: World) -> Path:
    """Where the rows of a step are saved; of many processes each has a file of its own."""
    own = f"-process-{world.rank}" if world.size > 1 else ""
    return out / "offending" / f"step-{step:08d}{own}.safetensors"


def save(
    file: Path,
    feed: Feed,
    rows: NDArray[numpy.int64],
    about: Mapping[str, Any],
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write the packed rows with these numbers to ``file``, and what is known of them to a JSON beside it.

    ``about`` is what the JSON begins with; with a ``tokenizer`` it holds the text of each row too.
    """
    packed = [feed.rows[int(row)] for row in rows]
    batch = collate(packed, pad_id=feed.pad_id)
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
    with write_aside(file) as aside:
        save_file({**tensors, "rows": torch.from_numpy(rows)}, aside)
    described = []
    for number, row in zip(rows, packed, strict=True):
        pieces = [
            {"document": piece.document.source, "start": piece.start, "stop": piece.stop}
            for piece in row.slices
        ]
        said: dict[str, Any] = {"row": int(number), "pieces": pieces}
        if tokenizer is not None:
            ids = [token for piece in row.slices for token in piece.document.ids[piece.start : piece.stop]]
            said["text"] = tokenizer.decode(ids, skip_special=False)
        described.append(said)
    write_json(file.with_suffix(".json"), {**about, "batch": file.name, "rows": described})


def load(file: Path) -> MicroBatch:
    """A saved batch as an objective takes it, to see what is wrong with it."""
    tensors = load_file(file)
    rows = tensors.pop("rows")
    return MicroBatch(Batch(**tensors), rows.numpy())
