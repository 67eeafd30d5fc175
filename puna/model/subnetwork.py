"""A smaller decoder whose weights are parts of the whole one's: it computes less, and gradients reach all.

System S29: a super-network is tuned through such parts. A part is made for one forward pass and its backward
pass: its cut matrices are views in the graph of the whole's parameters, made anew after each.
"""

from __future__ import annotations

from torch.nn import Module

from puna.core.errors import PunaError
from puna.model.llama import Llama
from puna.model.slicing import slice_tensors
from puna.model.units import Kept, sliced_spec


def part_of(model: Llama, kept: Kept) -> Llama:
    """The decoder of what is kept of ``model``, for one pass; nothing is copied where units lie together.

    It has the parameters of ``model`` that are not cut; what is cut of others are tensors in their graph.
    """
    if model.adapter is not None:
        raise PunaError("a part cannot be run under an adapter", fix="merge the adapter first")
    part = Llama(sliced_spec(model.spec, kept), dtype=model.dtype, device="meta")
    tensors = slice_tensors(dict(model.named_parameters()), model.spec, kept, views=True)
    for name, tensor in tensors.items():
        place, _, leaf = name.rpartition(".")
        module: Module = part.get_submodule(place)
        delattr(module, leaf)
        setattr(module, leaf, tensor)
    part.recomputed_layers = min(model.recomputed_layers, len(part.spec.blocks))
    return part.train(model.training)
