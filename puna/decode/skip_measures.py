"""What skipping feed-forwards costs in quality and saves in work, beside other ways to save as much.

Texts are read as a decoder would: a beginning in full, then every token with the skip. As all
attention runs, reading a text's tokens together gives each what it would get one by one.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from puna.model.feed_forward_skip import FeedForwardSkip, feed_forward_operations, stream_cosine
from puna.model.llama import Block
from puna.model.plain_stepper import PlainStepper
from puna.model.stepper import Read

if TYPE_CHECKING:
    from puna.model.llama import Llama
    from puna.model.stepper import FeedForwardSkip as Skip
    from puna.model.stepper import Stepper


Text = tuple[Sequence[int], int]
"""Token ids, and how many of them are read in full."""


@dataclass
class _Recorder:
    """A skip that leaves nothing out and notes how far each feed-forward turns the stream."""

    cosines: dict[int, list[Tensor]] = field(default_factory=dict)
    skipped: int = 0

    def begin(self, rows: int) -> _Recorder:
        return self

    def running(self, layer: int) -> Tensor | None:
        return None

    def saw(self, layer: int, rows: Tensor | None, before: Tensor, after: Tensor) -> None:
        self.cosines.setdefault(layer, []).append(stream_cosine(before, after).cpu())


def calibrate(model: Llama, texts: Sequence[Text]) -> Tensor:
    """Cosines of the stream around every feed-forward, [layers, tokens], of the tokens that may skip."""
    recorder = _Recorder()
    read_texts(model, texts, recorder)
    return torch.stack([torch.cat(recorder.cosines[layer]) for layer in range(len(model.spec.blocks))])


@dataclass(frozen=True)
class Reading:
    """``losses``: nats by text, summed over its ``tokens``; ``skipped`` feed-forwards of ``possible``.

    ``stored`` is the largest difference between the tokens read and the keys that a layer made of them.
    """

    losses: list[float]
    tokens: list[int]
    skipped: int
    possible: int
    stored: int

    @property
    def loss(self) -> float:
        """Mean nats a token."""
        return sum(self.losses) / sum(self.tokens)

    @property
    def share(self) -> float:
        """Share of feed-forwards that was left out, of the tokens that are counted."""
        return self.skipped / self.possible


@torch.inference_mode()
def read_texts(model: Llama, texts: Sequence[Text], skip: Skip | None) -> Reading:
    """Read each text in full up to its start and with ``skip`` from there; the losses are of what follows."""
    stepper = PlainStepper(model, cache_tokens=max(len(ids) for ids, _ in texts))
    losses: list[float] = []
    skipped = read = 0
    with _counted_keys(model) as keys:
        for ids, start in texts:
            sequence = stepper.sequence()
            stepper.step([Read(sequence, ids[:start], 0)])
            count = len(ids) - 1 - start  # the last token is only foretold
            (hidden,) = stepper.step([Read(sequence, ids[start:-1], count, skip)])
            skipped += stepper.skipped[0]
            logs = stepper.logits(hidden).log_softmax(-1)
            targets = torch.tensor(ids[start + 1 :], device=logs.device)
            losses.append(float(-logs.gather(1, targets[:, None]).double().sum()))
            read += sequence.length
            sequence.free()
    counts = [len(ids) - 1 - start for ids, start in texts]
    stored = max(abs(made - read) for made in keys.values())
    return Reading(losses, counts, skipped, sum(counts) * len(model.spec.blocks), stored)


@contextlib.contextmanager
def _counted_keys(model: Llama) -> Iterator[dict[int, int]]:
    """Count, by layer, the tokens of which keys are made."""
    counts = {layer: 0 for layer, block in enumerate(model.spec.blocks) if block.attention == "full"}

    def counting(layer: int) -> Callable[[object, object, Tensor], None]:
        def hook(module: object, inputs: object, output: Tensor) -> None:
            counts[layer] += output.shape[-2]

        return hook

    hooks = [
        cast(Block, model.model.layers[layer]).self_attn.k_proj.register_forward_hook(counting(layer))
        for layer in counts
    ]
    try:
        yield counts
    finally:
        for handle in hooks:
            handle.remove()


@contextlib.contextmanager
def without_blocks(model: Llama, blocks: Sequence[int]) -> Iterator[None]:
    """Let whole blocks hand on what they are given: the baseline, in the model as it stands."""
    hooks = [
        model.model.layers[block].register_forward_hook(lambda module, inputs, output: inputs[0])
        for block in blocks
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def block_cosines(model: Llama, texts: Sequence[Sequence[int]]) -> Tensor:
    """Mean cosine of the stream before and after each whole block, [layers]."""
    sums = torch.zeros(len(model.spec.blocks), dtype=torch.float64)

    def note(layer: int) -> Callable[[object, tuple[Tensor, ...], Tensor], None]:
        def hook(module: object, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            sums[layer] += stream_cosine(inputs[0], output).double().mean()

        return hook

    hooks = [block.register_forward_hook(note(layer)) for layer, block in enumerate(model.model.layers)]
    try:
        for ids in texts:
            model.hidden(torch.tensor([list(ids)], device=model.device))
    finally:
        for handle in hooks:
            handle.remove()
    return sums / len(texts)


def least_needed_blocks(cosines: Tensor, count: int) -> list[list[int]]:
    """Two candidates to drop: the ``count`` blocks that turn the stream least, and the best such run."""
    apart = sorted(cosines.argsort(descending=True)[:count].tolist())
    sums = cosines.unfold(0, count, 1).sum(1)
    first = int(sums.argmax())
    return [apart, list(range(first, first + count))]


def operations(model: Llama, ids: Sequence[int], start: int, skip: Skip | None) -> tuple[int, int]:
    """Operations that torch counts while ``ids`` are read from ``start`` on, and feed-forwards skipped."""
    stepper = PlainStepper(model, cache_tokens=len(ids))
    sequence = stepper.sequence()
    stepper.step([Read(sequence, ids[:start], 0)])
    with FlopCounterMode(display=False) as counter:
        stepper.step([Read(sequence, ids[start:], 1, skip)])
    return counter.get_total_flops(), stepper.skipped[0]


def operations_error(model: Llama, ids: Sequence[int], start: int, skip: FeedForwardSkip) -> float:
    """How far what torch counts less is from what the skipped feed-forwards would have taken, as a share."""
    block = model.spec.blocks[skip.first]
    full, _ = operations(model, ids, start, None)
    less, skipped = operations(model, ids, start, skip)
    expected = skipped * feed_forward_operations(model.spec.hidden_size, block.width)
    return abs(full - less - expected) / full


def step_times(
    stepper: Stepper, texts: Sequence[Text], tokens: int, skips: Sequence[Skip | None], rounds: int
) -> list[float]:
    """Mean seconds of a batch-1 step with each of ``skips``, the ways taken in turn token by token.

    Of each text up to ``tokens`` are read from its start on, one a step; each way has its own keys. Of a
    token's times in all rounds the least counts, which leaves out what else the machine did, and then
    their mean, since tokens differ in what they leave out.
    """
    best: list[list[float]] = [[] for _ in skips]
    for ids, start in texts:
        sequences = [stepper.sequence() for _ in skips]
        for sequence in sequences:
            stepper.step([Read(sequence, ids[:start], 0)])
        timed = ids[start : start + tokens]
        found = [[math.inf] * len(timed) for _ in skips]
        for _ in range(rounds):
            for place, token in enumerate(timed):
                for sequence, skip, taken in zip(sequences, skips, found, strict=True):
                    begun = time.perf_counter()
                    stepper.logits(stepper.step([Read(sequence, [token], 1, skip)])[0])
                    taken[place] = min(taken[place], time.perf_counter() - begun)
            for sequence in sequences:
                sequence.crop(start)
        for sequence, taken, every in zip(sequences, found, best, strict=True):
            sequence.free()
            every += taken
    return [statistics.mean(taken) for taken in best]
