"""What each process holds when a training is sharded, from shapes alone. No torch here.

Shards are cut by rows as FSDP2 cuts them: of n rows each process has ``ceil(n / processes)``, the last
ones fewer or none. Figures are those of the first process, which has the most.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, prod
from typing import TYPE_CHECKING

from puna.train.plan import (
    BYTES,
    Method,
    adapts,
    is_biased,
    lora_parameters,
    memory,
    module_of,
    projections,
    trained_parameters,
)

if TYPE_CHECKING:
    from puna.model.spec import LlamaSpec, Slot

_FLOAT32 = 4
ROOT = -1
"""The layer of what belongs to none: embedding, final norm and head."""


@dataclass(frozen=True)
class ShardBytes:
    """Bytes that one process holds throughout. Trained weights are float32: their own masters."""

    weights: int
    moments: int
    gradient: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.moments + self.gradient


@dataclass(frozen=True)
class _Weight:
    layer: int
    shape: tuple[int, ...]
    trained: bool


def shard_bytes(spec: LlamaSpec, method: Method, dtype: str, processes: int) -> ShardBytes:
    """What the first of so many processes holds of weights, AdamW's moments and gradients."""
    weights = trained = 0
    for weight in _weights(spec, method):
        own = min(ceil(weight.shape[0] / processes), weight.shape[0]) * prod(weight.shape[1:])
        weights += own * (_FLOAT32 if weight.trained else BYTES[dtype])
        trained += own if weight.trained else 0
    return ShardBytes(weights, 2 * _FLOAT32 * trained, _FLOAT32 * trained)


def sharded_memory(
    spec: LlamaSpec,
    method: Method,
    dtype: str,
    positions: int,
    processes: int,
    *,
    accumulates: bool,
    device: str = "cpu",
) -> float:
    """Peak bytes of one of ``processes`` that share the weights out; see :func:`puna.train.plan.memory`.

    Beside its shards a process holds whole weights: the root's, and two layers' (one is gathered while
    the other computes); one layer's gradients, in the dtype of the computation and in float32; and, if a
    step ``accumulates`` several micro-batches without communication, float32 gradients of all that is
    trained. Activations are no fewer: each process has micro-batches of its own.
    """
    size = BYTES[dtype]
    trained = trained_parameters(spec, method)
    replicated = (spec.parameter_count() + lora_parameters(spec, method)) * size
    replicated += trained * (3 * _FLOAT32 + (_FLOAT32 if size != _FLOAT32 else 0))
    layers: dict[int, int] = {}
    gradients: dict[int, int] = {}
    for weight in _weights(spec, method):
        layers[weight.layer] = layers.get(weight.layer, 0) + prod(weight.shape) * size
        if weight.trained:
            whole = prod(weight.shape) * (size + _FLOAT32)
            gradients[weight.layer] = gradients.get(weight.layer, 0) + whole
    root = layers.pop(ROOT)
    gathered = root + 2 * max(layers.values(), default=0) + max(gradients.values(), default=0)
    kept = shard_bytes(spec, method, dtype, processes).total + (trained * _FLOAT32 if accumulates else 0)
    alone = memory(spec, method, dtype, positions, device=device)
    return alone - replicated + gathered + kept


def _weights(spec: LlamaSpec, method: Method) -> Iterator[_Weight]:
    """Every tensor of model and adapter."""
    hidden, embedding = (spec.hidden_size,), (spec.vocab_size, spec.hidden_size)
    yield _Weight(ROOT, embedding, method.trains("model.embed_tokens", spec))
    yield _Weight(ROOT, hidden, method.trains("model.norm", spec))
    if not spec.tied:
        yield _Weight(ROOT, embedding, method.trains("lm_head", spec))
    for slot in spec.slots:
        block = slot.block
        halves = {"input_layernorm": block.attention, "post_attention_layernorm": block.feed_forward}
        for name, half in halves.items():
            if half != "none":
                yield _Weight(slot.layer, hidden, method.trains(f"model.{slot.name}.{name}", spec))
        if block.series:
            series = method.trains(f"model.{slot.name}.mlp.act_fn", spec)
            yield from [_Weight(slot.layer, (block.series * block.width,), series)] * 2  # scales and shifts
        yield from _of_projections(spec, method, slot)
        if slot.name.endswith(".twin"):
            merger = (slot.block.merger_parameters(spec.hidden_size),)
            yield _Weight(slot.layer, merger, method.trains(f"model.layers.{slot.layer}.merger", spec))


def _of_projections(spec: LlamaSpec, method: Method, slot: Slot) -> Iterator[_Weight]:
    layer = slot.layer
    for name, (inputs, outputs) in projections(spec, slot.block).items():
        module = module_of(slot, name)
        trained = method.trains(module, spec)
        yield _Weight(layer, (outputs, inputs), trained)
        if is_biased(spec, module):
            yield _Weight(layer, (outputs,), trained)
        if adapts(name, slot, method):
            yield _Weight(layer, (method.r, inputs), True)
            yield _Weight(layer, (outputs, method.r), True)
