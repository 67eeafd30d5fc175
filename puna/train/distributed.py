"""One process or many: the few collective operations the loop needs.

``torchrun`` starts one process per device and tells each its rank; gloo joins them on CPUs, nccl on
GPUs. A single process needs no group, and every operation is then a no-op.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from puna.core.errors import PunaError

# Groups this process has joined. Every process counts alike: none takes addresses of an earlier group for
# those of the next.
_groups = itertools.count()


@dataclass(frozen=True)
class World:
    """The processes of a run: this one's ``rank`` among ``size``, and its device."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace ``tensor`` by its sum over all processes; returns it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def total(self, values: Tensor) -> Tensor:
        """The sum of float64 ``values`` over all processes, on the CPU as they are.

        Only a device that joins in is given float64: Apple's has none.
        """
        return self.sum_(values.to(self.device)).cpu() if self.size > 1 else values

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """``tensor`` (of one shape everywhere) of every process, by rank."""
        if self.size == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor)
        return parts

    def told(self, word: str) -> str:
        """``word`` of the first process, at most 255 bytes of UTF-8; that of the others does not matter."""
        if self.size == 1:
            return word
        letters = torch.zeros(256, dtype=torch.uint8)
        if self.is_main:
            content = word.encode()
            letters[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        letters = letters.to(self.device)
        dist.broadcast(letters, 0)
        return bytes(letters.tolist()).rstrip(b"\0").decode()

    def wait(self) -> None:
        """Wait until every process has come here."""
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def world(device: str = "cpu") -> Iterator[World]:
    """The processes ``torchrun`` started, joined for the length of the block; else this one alone.

    ``device`` is ``cpu`` or ``cuda``; with many processes each takes the GPU of its local rank.
    A group that is already joined is used and left as it is.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 and not (dist.is_available() and dist.is_initialized()):
        yield World(device=torch.device(device))
        return
    own = torch.device(device)
    if own.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise PunaError(
                "more processes than GPUs on this machine",
                found=f"local rank {local}, {torch.cuda.device_count()} GPUs",
                fix="start torchrun with --nproc-per-node at most the number of GPUs",
            )
        own = torch.device("cuda", local)
        torch.cuda.set_device(own)
    joined_here = not dist.is_initialized()
    if joined_here:
        store, rank, size = next(iter(rendezvous("env://")))
        # torchrun keeps its store over a restart: the addresses in it may be those of processes that died.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"puna/{attempt}/{next(_groups)}", store)  # type: ignore[attr-defined]
        backend = "nccl" if own.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), own)
    finally:
        if joined_here:
            dist.destroy_process_group()
