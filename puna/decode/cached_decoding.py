"""What a cache of keys and values is worth in decoding, and what a machine's memory allows at most.

System S42, GEB-1.3B (arXiv:2406.09900), is meant to answer in float32 on a CPU. Decoding with a cache reads
each weight once for a token, so that bytes a second over bytes a token bound its speed. Without a cache all
that was said is read again for each token. The time of the prompt is kept apart.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from puna.core.progress import Track
from puna.model.cache import KeyValueCache
from puna.model.sizes import cache_bytes

if TYPE_CHECKING:
    from puna.model.llama import Llama

_BANDWIDTH_BYTES = 256_000_000  # of the matrix that is read: more than caches of processors hold
_BANDWIDTH_ROUNDS = 7
_ROW = 4096


@dataclass(frozen=True)
class Decoded:
    """Tokens that were chosen, seconds for the prompt, and for the tokens after the first."""

    ids: list[int]
    prompt_seconds: float
    seconds: float


@torch.inference_mode()
def with_cache(model: Llama, prompt: Sequence[int], count: int) -> Decoded:
    """``count`` greedy tokens, each read once."""
    cache = KeyValueCache(model.spec, 1, len(prompt) + count, model.dtype, model.device)
    begun = time.perf_counter()
    ids = [_best(model, torch.tensor([list(prompt)]), cache)]
    read = time.perf_counter()
    while len(ids) < count:
        ids.append(_best(model, torch.tensor([[ids[-1]]]), cache))
    return Decoded(ids, read - begun, time.perf_counter() - read)


@torch.inference_mode()
def without_cache(model: Llama, prompt: Sequence[int], count: int) -> Decoded:
    """``count`` greedy tokens, for each of which all before it are read again."""
    begun = time.perf_counter()
    ids = [_best(model, torch.tensor([list(prompt)]), None)]
    read = time.perf_counter()
    while len(ids) < count:
        ids.append(_best(model, torch.tensor([[*prompt, *ids]]), None))
    return Decoded(ids, read - begun, time.perf_counter() - read)


def _best(model: Llama, ids: torch.Tensor, cache: KeyValueCache | None) -> int:
    """The likeliest next token behind ``ids`` [1, time]; logits are made of the last place alone."""
    hidden = model.hidden(ids.to(model.device), cache=cache)
    return int(model.logits(hidden[:, -1]).argmax())


def bytes_of_a_token(model: Llama, stored: float) -> float:
    """Bytes that a step with a cache must read: all weights but the embedding's other rows, and the cache."""
    spec = model.spec
    size = model.head_weight.element_size()
    weights = spec.parameter_count() - (0 if spec.tied else spec.vocab_size * spec.hidden_size)
    return float(size * (weights + spec.hidden_size)) + cache_bytes(spec, size) * stored


@torch.inference_mode()
def bandwidth() -> float:
    """Bytes a second that a product of a matrix and a vector reads, the best of some rounds."""
    matrix = torch.ones(_BANDWIDTH_BYTES // 4 // _ROW, _ROW)
    vector = torch.ones(_ROW)
    best = float("inf")
    for _ in range(_BANDWIDTH_ROUNDS):
        begun = time.perf_counter()
        torch.mv(matrix, vector)
        best = min(best, time.perf_counter() - begun)
    return matrix.nbytes / best


def compare(model: Llama, prompt: Sequence[int], count: int, rounds: int) -> dict[str, float]:
    """Both ways by turns; the best round of each is told, tokens a second without the prompt's time."""
    model.eval()
    with_cache(model, prompt, min(count, 8))  # kernels are chosen and memory is found
    stored: list[Decoded] = []
    again: list[Decoded] = []
    peak = bandwidth()
    with Track("decoding with and without a cache", 2 * rounds, "texts") as track:
        for _ in range(rounds):
            stored.append(with_cache(model, prompt, count))
            track.advance()
            again.append(without_cache(model, prompt, count))
            track.advance()
    peak = max(peak, bandwidth())
    speed, slow = ((count - 1) / min(each.seconds for each in found) for found in (stored, again))
    needed = bytes_of_a_token(model, len(prompt) + count / 2)
    return {
        "tokens": float(count),
        "tokens_differ": float(sum(a != b for a, b in zip(stored[0].ids, again[0].ids, strict=True))),
        "tokens_per_second": speed,
        "tokens_per_second.uncached": slow,
        "gain": speed / slow,
        "prompt_seconds": min(each.prompt_seconds for each in stored),
        "bandwidth": peak,
        "bytes_per_token": needed,
        "bound": peak / needed,
        "share_of_bound": speed * needed / peak,
        "threads": float(torch.get_num_threads()),
    }
