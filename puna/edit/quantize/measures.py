"""What the low-bit table measures of a model: bits per byte, a task, and how fast it decodes.

The task is to tell how a text goes on: four texts of one length, one of them the true one and the others from
other documents of the same corpus, chosen by likelihood. It is made of held-out text alone and its chance is
a quarter.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from puna.core.errors import PunaError
from puna.core.progress import Track
from puna.core.seeds import numpy_generator
from puna.data.corpus import Corpus
from puna.edit.quantize.calibration import rounded_activations
from puna.evaluate.bits_per_byte import measure, start_token
from puna.model.stepper import Read
from puna.model.steppers import Quantize, make_stepper
from puna.train.objectives import IGNORED, linear_log_probs

if TYPE_CHECKING:
    from puna.model.llama import Llama

CHOICES = 4


@dataclass(frozen=True)
class Task:
    """Beginnings [items, time] and for each four ends [items, 4, time], of which the first is the true
    one.
    """

    beginnings: Tensor
    ends: Tensor


def texts_of(corpus: str, limit: int, seed: int, name: str) -> list[str]:
    """Texts of a corpus of documents in a random order, until they are ``limit`` bytes; the last one is
    cut.
    """
    found: list[str] = []
    left = limit
    rows = list(Corpus.open(corpus, kind="documents").texts())
    for place in numpy_generator(seed, "texts", name).permutation(len(rows)):
        if left <= 0:
            break
        text = rows[place].encode()[:left].decode(errors="ignore")
        if text:
            found.append(text)
        left -= len(text.encode())
    return found


def calibration_rows(model: Llama, corpus: str, rows: int, tokens: int, seed: int) -> Tensor:
    """Rows of ``tokens`` token ids of the corpus, documents one behind another, [rows, tokens]."""
    tokenizer = model.tokenizer
    assert tokenizer is not None
    texts = list(Corpus.open(corpus, kind="documents").texts())
    ids: list[int] = []
    for place in numpy_generator(seed, "calibration").permutation(len(texts)):
        ids += [start_token(tokenizer), *tokenizer.encode(texts[place])]
        if len(ids) >= rows * tokens:
            return torch.tensor(ids[: rows * tokens]).view(rows, tokens)
    raise PunaError(
        "the corpus is too small to calibrate on",
        where=corpus,
        found=f"{len(ids):,} tokens",
        expected=f"{rows} rows of {tokens}",
        fix="lower calibration_rows or calibration_tokens, or give more text",
    )


def make_task(model: Llama, corpus: str, items: int, seed: int, *, before: int = 24, after: int = 12) -> Task:
    """Items out of documents that are long enough; where there are fewer than five, it is an error."""
    tokenizer = model.tokenizer
    assert tokenizer is not None
    pieces: list[tuple[list[int], list[int]]] = []
    texts = list(Corpus.open(corpus, kind="documents").texts())
    for place in numpy_generator(seed, "task").permutation(len(texts)):
        ids = tokenizer.encode(texts[place][:4000])
        if len(ids) >= before + after:
            pieces.append(([start_token(tokenizer), *ids[:before]], ids[before : before + after]))
        if len(pieces) == items:
            break
    if len(pieces) <= CHOICES:
        raise PunaError(
            "the corpus has too few long documents for a task",
            where=corpus,
            found=len(pieces),
            expected=f"more than {CHOICES} of {before + after} tokens",
        )
    draws = numpy_generator(seed, "other ends")
    ends = []
    for number, (_, end) in enumerate(pieces):
        others = [other for other in draws.permutation(len(pieces)) if other != number][: CHOICES - 1]
        ends.append([end, *(pieces[other][1] for other in others)])
    return Task(torch.tensor([beginning for beginning, _ in pieces]), torch.tensor(ends))


@torch.inference_mode()
def task_score(model: Llama, task: Task, *, items_at_once: int = 8) -> float:
    """Share of items whose true end is the likeliest; ties go to the others."""
    right = 0
    count = len(task.beginnings)
    for start in range(0, count, items_at_once):
        beginnings, ends = (
            task.beginnings[start : start + items_at_once],
            task.ends[start : start + items_at_once],
        )
        items, choices, after = ends.shape
        ids = torch.cat((beginnings.repeat_interleave(choices, dim=0), ends.flatten(0, 1)), dim=1)
        labels = torch.full_like(ids[:, 1:], IGNORED)
        labels[:, -after:] = ids[:, -after:]
        hidden = model.hidden(ids[:, :-1])
        logs = linear_log_probs(hidden, model.head_weight, labels).view(items, choices, after).sum(dim=2)
        right += int((logs[:, 0] > logs[:, 1:].amax(dim=1)).sum())
    return right / count


def quality(
    model: Llama, texts: Mapping[str, Sequence[str]], task: Task, activation_bits: int | None
) -> dict[str, float]:
    """Bits per byte and nats a token of each named list of texts (``bpb.NAME``), and the ``task``'s score."""
    found = {}
    with rounded_activations(model, activation_bits):
        for name, each in texts.items():
            read = measure(model, each, window=512, label=f"reading {name}")
            found[f"bpb.{name}"] = read.bits_per_byte
            found[f"nats.{name}"] = float(read.bits.sum() * math.log(2) / read.tokens.sum())
        found["task"] = task_score(model, task)
    return found


def decoding_rate(
    model: Llama, quantize: Quantize | None, tokens: int, *, rounds: int = 2
) -> tuple[float, int]:
    """Tokens a second of one text, the best of ``rounds``, and bytes of the weights as they were laid out."""
    stepper = make_stepper(model, quantize=quantize, cache_tokens=tokens + 64)
    weights = int(getattr(stepper, "weight_bytes", 0))
    best = 0.0
    with Track("decoding", rounds * tokens, "tokens") as track:
        for _ in range(rounds):
            sequence = stepper.sequence()
            token = int(stepper.logits(stepper.step([Read(sequence, [1, 2, 3, 4])])[0])[-1].argmax())
            began = time.perf_counter()
            for _ in range(tokens):
                token = int(stepper.logits(stepper.step([Read(sequence, [token])])[0])[-1].argmax())
            best = max(best, tokens / (time.perf_counter() - began))
            sequence.free()
            track.advance(tokens)
    return best, weights
