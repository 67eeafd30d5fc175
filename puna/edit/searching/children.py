"""What a child of a super-network measures: its loss on common text, its cost, and how it runs in the engine.

System S29. All children read the same rows, so that what tells two of them apart is not the text. A child is
read as a part of the whole (:func:`puna.model.subnetwork.part_of`): nothing is copied for a measurement.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy
import torch

from puna.core.errors import unknown_name
from puna.decode.engine import Engine
from puna.decode.sampling import Sampling
from puna.edit.searching.step_seconds import StepSeconds
from puna.model.search_space import Genes, SearchSpace
from puna.model.sizes import step_operations
from puna.model.slicing import Masks, sliced, soft_mask
from puna.model.stepper import Read
from puna.model.steppers import Quantize, make_stepper
from puna.model.subnetwork import part_of
from puna.model.units import sliced_spec
from puna.text.packing import IGNORED, Batch
from puna.train.loader import MicroBatch
from puna.train.objectives import CrossEntropy

if TYPE_CHECKING:
    from puna.model.llama import Llama
    from puna.model.spec import LlamaSpec

COSTS: dict[str, Callable[[LlamaSpec, int], float]] = {
    "parameters": lambda spec, _context: float(spec.parameter_count()),
    "operations": step_operations,
}
"""Costs of a decoder by name; operations are those of a token behind so many."""


@torch.no_grad()
def mean_loss(model: Llama, batches: Sequence[Batch]) -> float:
    """Nats a token over all labelled tokens."""
    total, targets = 0.0, 0
    for batch in batches:
        micro = MicroBatch(batch.to(model.device), numpy.arange(len(batch.input_ids)))
        loss = CrossEntropy()(model, micro)
        total += float(loss.total)
        targets += loss.targets
    return total / targets


@dataclass
class Measured:
    """Measures children of ``model`` on ``batches``; one that was measured is not measured again.

    ``cost`` is a name out of :data:`COSTS`, ``context`` the tokens that it looks at; with ``seconds`` the
    cost is what that table says.
    """

    model: Llama
    space: SearchSpace
    batches: Sequence[Batch]
    cost: str = "operations"
    context: int = 512
    seconds: StepSeconds | None = None
    losses: dict[Genes, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.seconds is None and self.cost not in COSTS:
            raise unknown_name("cost", self.cost, COSTS)

    def __call__(self, genes: Genes) -> tuple[float, float]:
        """The loss and the cost of a child."""
        return self.loss(genes), self.cost_of(genes)

    def loss(self, genes: Genes) -> float:
        """Nats a token."""
        own = self.space.canonical(genes)
        if own not in self.losses:
            with torch.no_grad():
                self.losses[own] = mean_loss(part_of(self.model, self.space.kept(own)), self.batches)
        return self.losses[own]

    def cost_of(self, genes: Genes) -> float:
        """The cost of a child, from its shapes or from the table of seconds."""
        if self.seconds is not None:
            return self.seconds.of(self.space, genes)
        return COSTS[self.cost](sliced_spec(self.space.spec, self.space.kept(genes)), self.context)


def masked_difference(model: Llama, space: SearchSpace, genes: Genes, batch: Batch) -> float:
    """Largest difference of logits of the masked whole and the materialised child, over the largest logit."""
    kept = space.kept(genes)
    with torch.no_grad():
        with soft_mask(model, Masks.of(model.spec, kept)):
            masked = model(batch.input_ids, batch.positions, batch.segments)
        child = sliced(model, kept)(batch.input_ids, batch.positions, batch.segments)
    return float((masked - child).abs().max() / masked.abs().max())


def differing_numbers(model: Llama, other: Llama, batch: Batch) -> int:
    """Weights, and logits of a batch, that are not the same bits in two models of one shape."""
    with torch.no_grad():
        logits = [each(batch.input_ids, batch.positions, batch.segments) for each in (model, other)]
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    return sum(int((one != two).sum()) for one, two in [*pairs, logits])


def engine_loss(model: Llama, batches: Sequence[Batch], quantize: Quantize | None) -> tuple[float, int]:
    """Nats a token as the engine's kernels compute them, and the bytes of the weights that they read."""
    longest = max(batch.input_ids.shape[1] for batch in batches)
    stepper = make_stepper(model, quantize=quantize, cache_tokens=longest + 64)
    total, targets = 0.0, 0
    for batch in batches:
        for ids, labels, segments in zip(batch.input_ids, batch.labels, batch.segments, strict=True):
            for document in segments[segments >= 0].unique().tolist():
                here = segments == document
                sequence = stepper.sequence()
                read = Read(sequence, ids[here].tolist(), outputs=int(here.sum()))
                logits = stepper.logits(stepper.step([read])[0])
                sequence.free()
                lost = torch.nn.functional.cross_entropy(
                    logits, labels[here], ignore_index=IGNORED, reduction="sum"
                )
                total += float(lost)
                targets += int((labels[here] != IGNORED).sum())
    return total / targets, stepper.weight_bytes


def speeds(
    models: Mapping[str, Llama], whole: str, quantize: Quantize | None, *, tokens: int, rounds: int
) -> dict[str, float]:
    """Tokens a second in the engine over those of the model ``whole``, one text at a time: the median of
    rounds in which all take turns.
    """
    engines = {name: Engine(model, quantize=quantize) for name, model in models.items()}
    sampling = Sampling(max_tokens=tokens, ignore_eos=True)
    prompt = [list(range(1, 9))]
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(rounds + 1):
        names = list(engines) if turn % 2 else list(engines)[::-1]
        for name in names:
            start = time.perf_counter()
            engines[name].generate(prompt, sampling)
            if turn:  # the first is not counted
                seconds[name].append(time.perf_counter() - start)
    return {
        name: statistics.median(base / mine for base, mine in zip(seconds[whole], found, strict=True))
        for name, found in seconds.items()
    }
