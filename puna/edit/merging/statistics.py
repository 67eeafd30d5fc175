"""What Fisher merging and RegMean have to know of a model: squared gradients, and products of its inputs.

Fisher (2111.09832): the mean over texts of the squared gradient of the log-likelihood, element by element,
in the empirical form: of the text's own tokens. RegMean (2212.09849): of each group of projections the Gram
matrix of its inputs, the mean over positions, as :mod:`puna.edit.stats` sums it. Both are float32 on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from puna.core.errors import PunaError
from puna.core.files import write_aside
from puna.core.progress import Track
from puna.edit.stats import collect, site_of
from puna.model.hf import SafetensorsFile
from puna.model.llama import Llama
from puna.text.packing import IGNORED, Row, collate

Kind = Literal["fisher", "gram"]
_WEIGHT = ".weight"


@dataclass(frozen=True)
class Measured:
    """What was measured of one model, read when asked for."""

    file: SafetensorsFile
    kind: Kind

    @classmethod
    def open(cls, path: str | Path, kind: Kind) -> Measured:
        """The file that :func:`write` left; one of another kind is an error."""
        file = SafetensorsFile(Path(path))
        found = file.metadata.get("kind")
        if found != kind:
            raise PunaError("this was measured for another method", where=path, found=found, expected=kind)
        return cls(file, kind)

    def reader(self, name: str) -> Callable[[int, int], Tensor] | None:
        """Reads parts, laid out flat, of what belongs to the weight ``name``; None if nothing does."""
        own = name if self.kind == "fisher" else site_of(name.removesuffix(_WEIGHT))
        if own not in self.file.shapes:
            return None
        return lambda start, stop: self.file.part(own, start, stop).float()


def measure(model: Llama, rows: Sequence[Row], kind: Kind) -> dict[str, Tensor]:
    """Squared gradients by weight, or Gram matrices by site, of ``model`` over packed ``rows``.

    Time is a forward pass over the rows, and for fisher a backward pass too; memory holds one float32 of
    each weight (fisher), or of each pair of inputs of a group of projections (gram).
    """
    if kind == "gram":
        found = collect(model, [collate([row]) for row in rows], ["gram"])
        return {name: total / found.tokens for name, total in found.of("gram").items()}
    parameters = dict(model.named_parameters())
    sums = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    with Track("squaring gradients", len(rows), "texts") as track:
        for row in rows:
            gradients = torch.autograd.grad(nats_of(model, row), list(parameters.values()))
            for total, gradient in zip(sums.values(), gradients, strict=True):
                total.addcmul_(gradient.float(), gradient.float(), value=1 / len(rows))
            track.advance()
    return sums


def nats_of(model: Llama, row: Row) -> Tensor:
    """The summed loss of a row's targets."""
    batch = collate([row])
    hidden = model.hidden(batch.input_ids, batch.positions, batch.segments)
    asked = batch.labels != IGNORED
    return functional.cross_entropy(model.logits(hidden[asked]), batch.labels[asked], reduction="sum")


def write(tensors: dict[str, Tensor], kind: Kind, path: Path) -> Path:
    """Write what was measured as one safetensors file."""
    with write_aside(path) as aside:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside, {"kind": kind})
    return path
