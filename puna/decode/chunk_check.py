"""That chunks and mixtures change nothing: logits against one pass, texts against each alone.

System S76, SARATHI (arXiv:2308.16369).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from puna.core.progress import Track
from puna.decode.engine import Engine
from puna.decode.sampling import Sampling
from puna.model.stepper import Read

if TYPE_CHECKING:
    from puna.model.llama import Llama
    from puna.model.stepper import Stepper


def chunk_difference(stepper: Stepper, ids: Sequence[int], sizes: Sequence[int]) -> dict[int, float]:
    """For each chunk size, how far logits lie from those of one pass at most, over the largest logit."""
    stepper.pool.sharing = False
    whole = _logits(stepper, ids, len(ids))
    largest = float(whole.abs().max())
    found: dict[int, float] = {}
    with Track("reading in chunks", len(sizes), "sizes") as track:
        for size in sizes:
            found[size] = float((_logits(stepper, ids, size) - whole).abs().max()) / largest
            track.advance()
    return found


def _logits(stepper: Stepper, ids: Sequence[int], size: int) -> torch.Tensor:
    sequence = stepper.sequence()
    hidden = []
    for start in range(0, len(ids), size):
        chunk = ids[start : start + size]
        hidden += stepper.step([Read(sequence, chunk, len(chunk))])
    sequence.free()
    return stepper.logits(torch.cat(hidden))


@dataclass(frozen=True)
class Mixture:
    """Texts that came out the same alone and mixed, of how many; and what the mixed run did."""

    same: int
    texts: int
    preemptions: int
    seconds: float


def mixture_difference(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    max_batch_tokens: int,
    chunk_tokens: int,
    kernels: str,
) -> Mixture:
    """Greedy texts of each prompt alone and of all together, in a cache too small for all at once."""
    import time

    sampling = Sampling(max_tokens=new_tokens, ignore_eos=True)
    longest = max(map(len, prompts)) + new_tokens
    calm = Engine(model, kernels=kernels, cache_tokens=longest + 16)  # type: ignore[arg-type]
    alone = [calm.generate([prompt], sampling)[0].ids for prompt in prompts]
    mixed = Engine(
        model,
        kernels=kernels,  # type: ignore[arg-type]
        max_batch_tokens=max_batch_tokens,
        chunk_tokens=chunk_tokens,
        cache_tokens=max(longest + 16, sum(map(len, prompts)) * 2 // 3),
    )
    begun = time.perf_counter()
    together = [completion.ids for completion in mixed.generate(prompts, sampling)]
    took = time.perf_counter() - begun
    same = sum(left == right for left, right in zip(alone, together, strict=True))
    return Mixture(same, len(prompts), mixed.statistics.preemptions, took)
