"""What lies in a checkpoint, whole, whatever the number of processes that wrote it."""

from __future__ import annotations

from pathlib import Path

import torch

from puna.train.distributed import World
from puna.train.shard_files import read_tensors


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint: ``weights/...``, ``first/...``, ``second/...``, ``cpu/<rank>``."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    about = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(one.size, dtype=one.properties.dtype) for name, one in about.items()}
    read_tensors(folder, tensors, World())
    return tensors
