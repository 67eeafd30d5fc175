"""Fully sharded training: every process holds a part of each weight, and whole weights of a layer at a time.

FSDP2 (``torch.distributed.fsdp.fully_shard``; the scheme is ZeRO's third stage, 1910.02054) on each block
and on what is left, embedding, final norm and head. Trained weights are float32 shards, which are their own
masters; they are gathered in the dtype of the computation just before a block needs them and dropped after
it. Gradients are summed in float32 and scattered once per optimiser step, with its last micro-batch.

Whole weights of the root (the embedding and the head are needed at both ends) stay for the length of a
micro-batch. Every process must run the same number of micro-batches, for each one communicates: the loop
fills up with micro-batches whose loss counts nothing (:meth:`puna.train.loader.Feed.filler`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from puna.train.distributed import World

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from puna.model.llama import Llama


def shard(model: Llama, world: World) -> None:
    """Share the weights of ``model`` out among the processes, in place; it goes on computing in its dtype.

    Trained weights become float32. A block at a time goes to the process's device, so that a GPU never
    holds the whole model; in main memory the model was whole before.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(
        param_dtype=model.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for part in (*model.model.layers, model):
        for parameter in part.parameters():
            if parameter.requires_grad and not is_shard(parameter):
                parameter.data = parameter.data.float()
        fully_shard(part, mesh=mesh, mp_policy=policy)
        # Sums, not means: a step divides by its units, however they are spread over the processes.
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "hidden")  # objectives call it, not ``forward``


def is_sharded(model: nn.Module) -> bool:
    """Whether :func:`shard` was applied to ``model``."""
    return hasattr(model, "set_requires_gradient_sync")


def communicate_gradients(model: nn.Module, now: bool) -> None:
    """Whether the next backward pass sums and scatters gradients, or keeps them whole on this process."""
    model.set_requires_gradient_sync(now)  # type: ignore[operator]


def is_shard(tensor: Tensor) -> bool:
    """Whether ``tensor`` is one of which every process holds a part."""
    return hasattr(tensor, "to_local")


def local_part(tensor: Tensor) -> Tensor:
    """This process's part of ``tensor``, in the same storage; without sharding the tensor itself."""
    return cast("DTensor", tensor).to_local() if is_shard(tensor) else tensor


def like(local: Tensor, tensor: Tensor) -> Tensor:
    """``local`` as this process's part of something shaped and shared out like ``tensor``."""
    if not is_shard(tensor):
        return local
    from torch.distributed.tensor import DTensor

    pattern = cast(DTensor, tensor)
    return DTensor.from_local(
        local,
        pattern.device_mesh,
        pattern.placements,
        run_check=False,
        shape=pattern.shape,
        stride=pattern.stride(),
    )


def whole_on_first(tensors: Mapping[str, Tensor], world: World) -> Iterator[tuple[str, Tensor]]:
    """Each of ``tensors`` by name, whole and in main memory, on the first process; nothing on the others.

    One tensor is gathered at a time. Every process must come here.
    """
    for name, tensor in tensors.items():
        whole = _gather(tensor, world) if is_shard(tensor) else tensor
        if whole is not None and world.is_main:
            yield name, whole.detach().cpu()


def _gather(tensor: Tensor, world: World) -> Tensor | None:
    """A tensor that is sharded by rows, whole on the first process; None on the others."""
    own = local_part(tensor.detach())
    rows = -(-tensor.shape[0] // world.size)  # of every process but perhaps the last ones
    padded = own.new_zeros((rows, *tensor.shape[1:]))
    padded[: own.shape[0]] = own
    parts = [torch.empty_like(padded) for _ in range(world.size)] if world.is_main else None
    dist.gather(padded, parts)
    return None if parts is None else torch.cat(parts)[: tensor.shape[0]]
