"""Feature collapse: how alike the hidden states of a text's tokens become from layer to layer.

Two measures behind each layer, as PanGu-pi (2312.17276, S82) takes them:

* ``distance``, d_M(H) = ||H - 1 mean(H)||_F of a text's states H [tokens, hidden], here over ||H||_F, so that
  layers whose states have grown can be compared: 1 if they cancel out, 0 if all are the same;
* ``dimensions``: principal components that hold a share of the variance (80%) of all tokens' states.

The first token of a text is left out: attention makes its state an outlier many times as long as any other,
and one such direction would be most of the variance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from puna.core.errors import PunaError
from puna.model.llama import Llama
from puna.text.packing import Batch


@dataclass(frozen=True)
class Collapse:
    """By layer from the first on; ``tokens`` were looked at."""

    tokens: int
    distance: tuple[float, ...]
    dimensions: tuple[int, ...]

    def deep(self, numbers: Sequence[float]) -> float:
        """The mean over the last third of the layers, rounded up."""
        last = numbers[-max(1, -(-len(numbers) // 3)) :]
        return sum(last) / len(last)


class _Sums:
    """Of one layer: what the measures are made of, in float64."""

    def __init__(self, size: int) -> None:
        self.count = self.texts = 0
        self.total = torch.zeros(size, dtype=torch.float64)
        self.products = torch.zeros(size, size, dtype=torch.float64)
        self.distance = 0.0

    def add(self, states: Tensor) -> None:
        """States of one text, [tokens, hidden]."""
        wide = states.double().cpu()
        self.count += len(wide)
        self.total += wide.sum(0)
        self.products += wide.T @ wide
        if len(wide) > 1:
            self.texts += 1
            self.distance += float((wide - wide.mean(0)).norm() / wide.norm())


def effective_dimensions(covariance: Tensor, variance: float) -> int:
    """The fewest principal components that hold the share ``variance`` of a covariance [size, size]."""
    falling = torch.linalg.eigvalsh(covariance.double()).flip(0).clamp(min=0)
    held = falling.cumsum(0) / falling.sum()
    return int(torch.searchsorted(held, torch.tensor(variance, dtype=held.dtype))) + 1


@torch.no_grad()
def measure(model: Llama, batches: Sequence[Batch], *, variance: float = 0.8) -> Collapse:
    """Both measures of ``model`` on packed texts. Memory is hidden squared for each layer, in float64."""
    layers = list(model.model.layers)
    sums = [_Sums(model.spec.hidden_size) for _ in layers]
    texts: list[Tensor] = []  # of the batch: places [rows, time] of each text's tokens, the first left out

    def saw(layer: int) -> object:
        def add(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            for places in texts:
                sums[layer].add(output[places])

        return layers[layer].register_forward_hook(add)

    handles = [saw(layer) for layer in range(len(layers))]
    training = model.training
    try:
        model.eval()
        for batch in (batch.to(model.device) for batch in batches):
            texts[:] = _texts(batch)
            model.hidden(batch.input_ids, batch.positions, batch.segments)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()  # type: ignore[attr-defined]
    if not sums[0].texts:
        raise PunaError("there is no text of three tokens to look at", where=model.source)
    return Collapse(
        sums[0].count,
        tuple(each.distance / each.texts for each in sums),
        tuple(
            effective_dimensions(
                each.products / each.count - torch.outer(each.total, each.total) / each.count**2, variance
            )
            for each in sums
        ),
    )


def _texts(batch: Batch) -> list[Tensor]:
    """A mask [rows, time] for every text of the batch, without its first token."""
    found = []
    for row, segments in enumerate(batch.segments):
        for number in segments[segments >= 0].unique().tolist():
            mask = torch.zeros_like(batch.segments, dtype=torch.bool)
            mask[row] = (segments == number) & (batch.positions[row] > 0)
            if bool(mask.any()):
                found.append(mask)
    return found
