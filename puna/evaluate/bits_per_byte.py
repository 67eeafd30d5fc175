"""Bits per byte: the one likelihood figure that compares models with different tokenizers.

The rule, the same for every model:

* A document's bits are the sum of ``-log2 p`` over its tokens, each given the tokens before it.
* The first token is given the start token: the tokenizer's BOS, or its EOS if it has no BOS.
* The end token is left out: it carries no bytes, and tokenizers differ in what theirs means.
* Bytes are those of the document's text in UTF-8, before any normalisation of the tokenizer.
* A document longer than the window is read in overlapping windows: every token is scored once, and
  from the second window on with at least ``window - stride`` tokens before it.

Bits and bytes are kept per document, so that models can be compared by pairs of documents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy
import torch

from puna.core.errors import PunaError
from puna.core.progress import Track
from puna.evaluate.statistics import Floats
from puna.model.labels import require_words
from puna.model.rope import depends_on_length
from puna.train.objectives import IGNORED, linear_cross_entropy

if TYPE_CHECKING:
    from puna.model.llama import Llama
    from puna.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class DocumentBits:
    """Bits, UTF-8 bytes and tokens of each document, float64 ``[documents]``."""

    bits: Floats
    bytes: Floats
    tokens: Floats

    @property
    def bits_per_byte(self) -> float:
        """All bits over all bytes."""
        return float(self.bits.sum() / self.bytes.sum())


@dataclass(frozen=True)
class Window:
    """A run of tokens to read: position i of ``inputs`` predicts the next token; the last ones are scored."""

    document: int
    inputs: Sequence[int]
    targets: Sequence[int]  # what the last len(targets) positions predict; IGNORED is not scored


def start_token(tokenizer: Tokenizer) -> int:
    """The token that stands before a document: BOS, or EOS where there is no BOS."""
    return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id


def measure(
    model: Llama,
    texts: Sequence[str],
    *,
    window: int = 2048,
    stride: int | None = None,
    batch_tokens: int = 2048,
    encoded: Sequence[Sequence[int]] | None = None,
    label: str = "bits per byte",
) -> DocumentBits:
    """Bits of each text under ``model`` in the dtype of its weights.

    ``window`` is bounded by the model's context; ``stride`` is half of the window unless given.
    Windows of similar length share a forward pass of at most ``batch_tokens`` positions; how they
    are grouped does not change the result beyond rounding. ``encoded`` gives the texts' ids, if
    they are there already. ``label`` names the work in the progress.
    """
    window = min(window, model.spec.max_positions)
    stride = max(window // 2, 1) if stride is None else stride
    tokenizer = _check(model, texts, window, stride, batch_tokens)
    ids = [tokenizer.encode(text) for text in texts] if encoded is None else encoded
    start = start_token(tokenizer)
    windows = [
        piece
        for document, row in enumerate(ids)
        for piece in windows_of(document, [start, *row], window, stride)
    ]
    nats = sum_nats(model, windows, len(texts), batch_tokens, label)
    return DocumentBits(
        bits=nats / math.log(2),
        bytes=numpy.array([len(text.encode()) for text in texts], dtype=numpy.float64),
        tokens=numpy.array([len(row) for row in ids], dtype=numpy.float64),
    )


def sum_nats(model: Llama, windows: list[Window], count: int, batch_tokens: int, label: str) -> Floats:
    """The negative log-likelihoods that ``windows`` score, summed for each of ``count`` documents."""
    nats = numpy.zeros(count)
    was_training = model.training
    model.eval()
    try:
        with Track(label, sum(len(piece.inputs) for piece in windows), "tokens") as track:
            for batch in _batches(model, windows, batch_tokens):
                _score(model, batch, nats)
                track.advance(sum(len(piece.inputs) for piece in batch))
    finally:
        model.train(was_training)
    return nats


def _check(model: Llama, texts: Sequence[str], window: int, stride: int, batch_tokens: int) -> Tokenizer:
    if model.tokenizer is None:
        raise PunaError("the model has no tokenizer", where=model.source, fix="open it with puna.load")
    require_words(model, "bits per byte")
    if not any(texts):
        raise PunaError("there is no text to measure", found=f"{len(texts)} documents, 0 bytes")
    if window < 1 or not 1 <= stride <= window or batch_tokens < 1:
        raise PunaError(
            "window settings out of range",
            found=f"window={window}, stride={stride}, batch_tokens={batch_tokens}",
            expected="1 <= stride <= window, and at least one token a batch",
        )
    tokenizer: Tokenizer = model.tokenizer
    return tokenizer


def windows_of(
    document: int, ids: list[int], window: int, stride: int, targets: Sequence[int] | None = None
) -> Iterator[Window]:
    """Cut ``ids`` (start token first) so that each later token is scored once; the last window is full.

    ``targets`` are what is scored where it is not ``ids``: the same, with IGNORED in some places.
    """
    targets = ids if targets is None else targets
    last = len(ids) - 1  # the last token is only ever predicted
    start = scored = 0
    while scored < last:
        end = min(start + window, last)
        yield Window(document, ids[start:end], targets[scored + 1 : end + 1])
        scored = end
        start = min(start + stride, max(last - window, 0))


def _batches(model: Llama, windows: list[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Windows of similar length together, the longest first, ``rows x longest <= batch_tokens``."""
    # Some rotations follow the longest row of a batch: there only equal lengths go together.
    mixed = not any(depends_on_length(block.rope) for block in model.spec.blocks)
    batch: list[Window] = []
    for piece in sorted(windows, key=lambda piece: -len(piece.inputs)):
        fits = (len(batch) + 1) * len(batch[0].inputs) <= batch_tokens if batch else True
        if batch and not (fits and (mixed or len(piece.inputs) == len(batch[0].inputs))):
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch


@torch.inference_mode()
def _score(model: Llama, batch: list[Window], nats: Floats) -> None:
    """Add the negative log-likelihoods of a batch's targets to their documents' ``nats``."""
    input_ids = torch.zeros(len(batch), len(batch[0].inputs), dtype=torch.int64)
    labels = torch.full_like(input_ids, IGNORED)
    for row, piece in enumerate(batch):
        # Padding stands on the right, where causal attention lets nobody look: no mask is needed.
        end = len(piece.inputs)
        input_ids[row, :end] = torch.tensor(piece.inputs)
        labels[row, end - len(piece.targets) : end] = torch.tensor(piece.targets)
    hidden = model.hidden(input_ids.to(model.device))
    losses = linear_cross_entropy(hidden, model.head_weight, labels.to(model.device)).tokens
    scored = [sum(target != IGNORED for target in piece.targets) for piece in batch]
    documents = numpy.repeat([piece.document for piece in batch], scored)
    numpy.add.at(nats, documents, losses.cpu().double().numpy())
