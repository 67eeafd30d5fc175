"""An adapter that was trained on a pruned copy, put into the whole model: LoRAM's recovery (S23, 2502.13533).

Pruned structurally, the copy's matrices have fewer rows and columns: those of the small factors go to the
places that their units have in the whole decoder, and all else is zero. That is a LoRA of the whole decoder,
which peft opens, of the same rank and alpha. Pruned without becoming smaller, the product counts at places
that are left; that has no low rank, and goes into the weights alone.

Either way it goes into the weights as they were, not into those that were pruned, nor into those that
training aligned. Several adapters are compared on the whole model, where they are to work: one that was
trained for long may have learnt to mend the pruned copy's own faults.

Simplified: what is not trained is zero; the paper's other way, drawing it for more training, is not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from puna.core.errors import PunaError
from puna.core.files import folder_aside, read_json, write_json
from puna.model.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PREFIX, StoredAdapter
from puna.model.slicing import scatter_back, slice_tensors
from puna.model.spec import LlamaSpec
from puna.model.units import Kept, parameter_shapes


@dataclass(frozen=True)
class Recovered:
    """What an adapter does to the whole decoder.

    ``changes`` are added to its weights, by name, float32. ``factors`` are A and B by PEFT's names, without
    its prefix; there are none where the product is masked.
    """

    changes: dict[str, Tensor]
    factors: dict[str, Tensor]


def recover(adapter: StoredAdapter, spec: LlamaSpec, kept: Kept | None) -> Recovered:
    """The adapter of a pruned copy in the whole decoder of ``spec``; ``kept`` says what the copy holds.

    A masked adapter has the whole decoder's shapes, and no ``kept``.
    """
    if adapter.full:
        raise PunaError(
            "modules that were trained in full belong to the pruned copy alone",
            where=adapter.where,
            found=", ".join(adapter.full),
            fix="train the LoRA without full",
        )
    small = {name: adapter.product(name) for name in adapter.low_rank}
    if adapter.places or kept is None:
        return Recovered(small, {})
    factors: dict[str, Tensor] = {}
    for name, (down, up, _) in adapter.low_rank.items():
        stem = name.removesuffix("weight")
        factors |= {f"{stem}lora_A.weight": down, f"{stem}lora_B.weight": up}
    return Recovered(
        scatter_back(small, spec, kept, correct=False), scatter_back(factors, spec, kept, correct=False)
    )


@dataclass(frozen=True)
class Comparison:
    """Of a recovery: numbers at kept places whose bits ``differ``, and numbers ``elsewhere`` that are not 0.

    ``factors`` is the largest difference between the change and the product of the factors as peft makes it.
    """

    differ: int
    elsewhere: int
    factors: float


def compare(adapter: StoredAdapter, recovered: Recovered, spec: LlamaSpec, kept: Kept | None) -> Comparison:
    """Hold what was recovered against the small adapter's own products."""
    small = {name: adapter.product(name) for name in adapter.low_rank}
    if kept is None or adapter.places:
        outside = {name: change[~adapter.places[name]] for name, change in recovered.changes.items()}
        back = recovered.changes
    else:
        back = slice_tensors(recovered.changes, spec, kept, correct=False)
        zeroed = {name: torch.zeros_like(tensor) for name, tensor in small.items()}
        outside = scatter_back(zeroed, spec, kept, onto=recovered.changes, correct=False)
    differ = sum(
        int((back[name].view(torch.int32) != tensor.view(torch.int32)).sum())
        for name, tensor in small.items()
    )
    elsewhere = sum(int(tensor.count_nonzero()) for tensor in outside.values())
    scales = {scale for _, _, scale in adapter.low_rank.values()}
    largest = 0.0
    for name, change in recovered.changes.items() if recovered.factors and len(scales) == 1 else ():
        stem = name.removesuffix("weight")
        up, down = recovered.factors[f"{stem}lora_B.weight"], recovered.factors[f"{stem}lora_A.weight"]
        largest = max(largest, float(((up @ down) * next(iter(scales)) - change).abs().max()))
    return Comparison(differ, elsewhere, largest)


def write_recovered(
    recovered: Recovered, small: Path, folder: Path, spec: LlamaSpec, *, base_name: str
) -> None:
    """Write the factors as a PEFT adapter of the model called ``base_name``.

    Rank, alpha and all else are what the small adapter in the folder ``small`` states.
    """
    config = read_json(small / ADAPTER_CONFIG)
    for key in ("rank_pattern", "alpha_pattern", "layers_to_transform"):
        if config.get(key):
            raise PunaError(
                f"{key} names layers of the pruned copy", where=small / ADAPTER_CONFIG, found=config[key]
            )
    weights = {name.removesuffix(".lora_A.weight") for name in recovered.factors if "lora_A" in name}
    names = {name.rpartition(".")[2] for name in weights}
    every = {name.removesuffix(".weight") for name in parameter_shapes(spec) if name.split(".")[-2] in names}
    targets = sorted(names if weights == every else weights)
    stated: Mapping[str, Any] = {**config, "base_model_name_or_path": base_name, "target_modules": targets}
    with folder_aside(folder) as aside:
        write_json(aside / ADAPTER_CONFIG, stated)
        tensors = {PREFIX + name: tensor.contiguous() for name, tensor in recovered.factors.items()}
        save_file(tensors, aside / ADAPTER_WEIGHTS, metadata={"format": "pt"})
