"""Tensors of all processes in one folder of safetensors, each written and read by whoever holds it.

torch's distributed checkpointing (DCP) does it: of a sharded tensor each process writes its part, of a
replicated one some process the whole, and a reader takes the slices that its own parts need, whatever
the number of processes was. Its usual storage keeps an index in a pickle, ``.metadata``; the one used
here (``HuggingFaceStorageWriter``) writes safetensors alone, whose headers say which part they hold.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from puna.core.errors import PunaError
from puna.core.files import sha256_of
from puna.train.distributed import World

_PATTERN = "shard-*.safetensors"
_FILE_BYTES = 2**28  # DCP makes a file in memory before it writes it
_HEXADECIMAL = 64  # of a SHA-256


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], world: World) -> dict[str, str]:
    """Write ``tensors`` of all processes into ``folder``; SHA-256 by name of all files, on every process."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = HuggingFaceStorageWriter(
        str(folder), fqn_to_index_mapping=_files(tensors), save_distributed=True
    )
    with _alone(world) as no_dist, _own_error():
        save(dict(tensors), storage_writer=writer, no_dist=no_dist)
    own = sorted(folder.glob(f"shard-{world.rank + 1:05d}-{_PATTERN.removeprefix('shard-')}"))
    return _exchange({file.name: sha256_of(file) for file in own}, folder, world)


def read_tensors(folder: Path, tensors: Mapping[str, Tensor], world: World) -> None:
    """Fill ``tensors``, each process its parts, from files that as many or other processes wrote."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(folder))
    with _alone(world) as no_dist, _own_error():
        load(dict(tensors), storage_reader=reader, no_dist=no_dist)


def check_files(folder: Path, expected: Mapping[str, str], world: World) -> None:
    """Raise the same :class:`PunaError` on all processes if a file by its name is not what was written.

    The files are shared out: each is read by one process.
    """
    names = sorted(expected)
    verdicts = torch.zeros(len(names), dtype=torch.int64)  # 0 whole, 1 missing, 2 another
    for place in range(world.rank, len(names), world.size):
        path = folder / names[place]
        if not path.is_file():
            verdicts[place] = 1
        elif sha256_of(path) != expected[names[place]]:
            verdicts[place] = 2
    for name, verdict in zip(names, world.sum_(verdicts.to(world.device)).tolist(), strict=True):
        if verdict == 1:
            raise PunaError("file not found", where=folder / name)
        if verdict:
            raise PunaError("not the file that was written", where=folder / name, expected=expected[name])


@contextlib.contextmanager
def _alone(world: World) -> Iterator[bool]:
    """Whether there is nobody to talk to; DCP need not warn of that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield world.size == 1


@contextlib.contextmanager
def _own_error() -> Iterator[None]:
    """DCP gathers what went wrong on all processes in an exception of its own: raise the first of them."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


def _files(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The number of the file of each tensor, from 1; a file is closed once it holds ``_FILE_BYTES``."""
    found: dict[str, int] = {}
    number, size = 1, 0
    for name, tensor in tensors.items():
        if size >= _FILE_BYTES:
            number, size = number + 1, 0
        found[name] = number
        size += tensor.numel() * tensor.element_size()
    return found


def _exchange(own: dict[str, str], folder: Path, world: World) -> dict[str, str]:
    """What every process says of its files, by name, on every process."""
    if world.size == 1:
        return own
    world.wait()  # all files are there
    names = sorted(file.name for file in folder.glob(_PATTERN))
    digests = torch.zeros(len(names), _HEXADECIMAL // 2, dtype=torch.uint8)
    for place, name in enumerate(names):
        if name in own:
            digests[place] = torch.frombuffer(bytearray.fromhex(own[name]), dtype=torch.uint8)
    total = world.sum_(digests.to(world.device)).cpu()  # each row is zero everywhere but in one process
    return {name: bytes(row.tolist()).hex() for name, row in zip(names, total, strict=True)}
