"""Places of matrices that were pruned without becoming smaller, and training that does not fill them again.

LoRAM (S23, 2502.13533), its semi-structured and unstructured forms. A place is gone where the weight is
exactly zero. Of training in full its gradient is held at zero; of a LoRA the product counts at the other
places alone, W + s (B A) * mask (:class:`puna.model.adapted.MaskedLinear`).

The product of a mask and B A has no low rank, so peft cannot hold it: on disk such an adapter has PEFT's
tensors, a bit for each place, and a type of its own, which peft refuses.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

import numpy
import torch
from torch import Tensor, nn

from puna.core.errors import PunaError
from puna.model.nf4 import NF4Linear

if TYPE_CHECKING:
    from puna.model.llama import Llama

MASKED_TYPE = "PUNA_MASKED_LORA"
PLACES = "adapter_places.safetensors"


def nonzero_places(model: Llama) -> dict[str, Tensor]:
    """By projection, where its weight is not zero, bool [outputs, inputs]; a plain model."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.startswith("model.layers.") and name.endswith("_proj"):
            if isinstance(module, NF4Linear):
                raise PunaError(
                    "places that were pruned are looked for before the model is put into NF4",
                    where=model.source,
                    found=name,
                )
            found[name] = cast(nn.Linear, module).weight.detach() != 0
    return found


def hold_zeros(model: Llama) -> list[Any]:
    """Hooks that keep gradients off the places of projections that are zero; undo them by ``remove``.

    AdamW does not move a weight of zero whose gradients are zero, with decay or without.
    """
    handles: list[Any] = []
    parameters = dict(model.named_parameters())
    for name, places in nonzero_places(model).items():
        weight = parameters[f"{name}.weight"]
        if weight.requires_grad and not bool(places.all()):
            handles.append(weight.register_hook(_masking(places)))  # type: ignore[no-untyped-call]
    return handles


def _masking(places: Tensor) -> Any:
    def mask(gradient: Tensor) -> Tensor:
        return gradient * places

    return mask


def pack_places(places: Tensor) -> Tensor:
    """A bit for each place, uint8 [ceil(places / 8)]."""
    return torch.from_numpy(numpy.packbits(places.cpu().numpy().reshape(-1)))


def unpack_places(packed: Tensor, shape: Iterable[int]) -> Tensor:
    """The reverse of :func:`pack_places`."""
    shape = tuple(shape)
    count = int(numpy.prod(shape))
    return torch.from_numpy(numpy.unpackbits(packed.numpy(), count=count).astype(bool)).view(shape)
