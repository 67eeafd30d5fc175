"""What a training run costs, from shapes alone: weights trained, operations, bytes. No torch here.

Memory counts what the loop really holds. Activations are what autograd saves in our decoder for the
backward pass, tensor by tensor (:func:`activation_bytes`); kernels' scratch space is not counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from puna.model.nf4_layout import bits
from puna.model.sizes import attention_product
from puna.model.sizes import forward_operations as forward_operations
from puna.model.sizes import projections as projections

if TYPE_CHECKING:
    from puna.model.spec import LlamaSpec, Slot

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
DROPOUT_TRAFFIC = {"cpu": 80, "cuda": 10}
"""Bytes of memory traffic that take as long as dropping one element, back and forth (CPU: measured)."""

_SCRATCH_ON_CPU = 1.5  # glibc, SmolLM2-135M with LoRA in bfloat16: 2.36 GB resident for 1.57 GB kept
_EMBEDDING = "model.embed_tokens"
LOGITS_AT_ONCE = 2048  # puna.train.linear_loss.CHUNK, which cannot be imported without torch


@dataclass(frozen=True)
class Method:
    """What is trained: all weights (``r`` 0), or a LoRA of rank ``r`` on ``target`` and ``full`` modules.

    ``dora`` adds a magnitude for each row of an adapted matrix; with ``base`` "nf4" the projections that
    are not trained in full are held in NF4. Without a LoRA ``frozen`` modules are not trained. ``light`` is
    a kind of LLaMA-Adapter with a ``prompt`` of so many vectors in so many layers. With ``only`` nothing is
    trained but modules in whose name one of these stands, less the frozen ones.
    """

    r: int = 0
    dropout: float = 0.0
    target: tuple[str, ...] = ()
    full: tuple[str, ...] = ()
    dora: bool = False
    base: str = "as_is"
    frozen: tuple[str, ...] = ()
    light: str = ""
    prompt: tuple[int, int | None] = (0, None)
    only: tuple[str, ...] = ()

    def trains(self, module: str, spec: LlamaSpec) -> bool:
        """Whether the own weights of a module, told by its whole name, are trained.

        Names in ``full`` are ends of the module's name or of one that encloses it; of a tied model
        ``lm_head`` is the embedding.
        """
        if self.light:
            return self.light == "llama_adapter_v2" and module.endswith("norm")
        if self.only and not any(part in f"{module}." for part in self.only):
            return False
        names = self.full if self.r else self.frozen
        parts = module.split(".")
        around = [f".{'.'.join(parts[:count])}" for count in range(1, len(parts) + 1)]
        named = spec.tied and module == _EMBEDDING and "lm_head" in names
        named = named or any(name.endswith(f".{wanted}") for name in around for wanted in names)
        return named if self.r else not named

    def trains_head(self, spec: LlamaSpec) -> bool:
        """Whether the weight that makes logits needs a gradient."""
        return self.trains(_EMBEDDING if spec.tied else "lm_head", spec)


BIASED_WITH_QKV = ("q_proj", "k_proj", "v_proj", "linear_attn")
"""What has a bias where ``attention_bias`` is "qkv": all that reads the attention's norm."""


def is_biased(spec: LlamaSpec, module: str) -> bool:
    """Whether a projection, by its whole name, has a bias."""
    name = module.rpartition(".")[2]
    if ".mlp." in module:
        return spec.mlp_bias
    if name in ("squeeze_proj", "expand_proj"):
        return False
    return spec.attention_bias == "all" or (spec.attention_bias == "qkv" and name in BIASED_WITH_QKV)


def module_of(slot: Slot, projection: str) -> str:
    """The whole name of a projection."""
    group = "mlp" if projection in ("gate_proj", "up_proj", "down_proj", "linear_mlp") else "self_attn"
    return f"model.{slot.name}.{group}.{projection}"


def adapts(name: str, slot: Slot, method: Method) -> bool:
    """Whether a projection has a LoRA; targets may name a projection of one layer only."""
    whole = f".{module_of(slot, name)}"
    return bool(method.r) and any(whole.endswith(f".{target}") for target in method.target)


def _adapted_sizes(spec: LlamaSpec, method: Method) -> Iterator[tuple[int, int]]:
    """Inputs and outputs of each adapted projection."""
    for slot in spec.slots:
        for name, sizes in projections(spec, slot.block).items():
            if adapts(name, slot, method):
                yield sizes


def _held_in_nf4(spec: LlamaSpec, method: Method) -> Iterator[tuple[int, int]]:
    """Inputs and outputs of each projection that is held in NF4: all that are not trained in full."""
    for slot in spec.slots:
        for name, sizes in projections(spec, slot.block).items():
            if method.base == "nf4" and not method.trains(module_of(slot, name), spec):
                yield sizes


def module_sizes(spec: LlamaSpec) -> Iterator[tuple[str, int]]:
    """Name and number of weights, biases included, of every module that has some; a tied head has none."""
    matrix = spec.vocab_size * spec.hidden_size
    yield _EMBEDDING, matrix
    for slot in spec.slots:
        if slot.block.attention != "none":
            yield f"model.{slot.name}.input_layernorm", spec.hidden_size
        if slot.block.feed_forward != "none":
            yield f"model.{slot.name}.post_attention_layernorm", spec.hidden_size
        if slot.block.series:
            yield f"model.{slot.name}.mlp.act_fn", 2 * slot.block.series * slot.block.width
        for name, (inputs, outputs) in projections(spec, slot.block).items():
            module = module_of(slot, name)
            yield module, inputs * outputs + (outputs if is_biased(spec, module) else 0)
    for layer, block in enumerate(spec.blocks):
        if block.merger:
            yield f"model.layers.{layer}.merger", block.merger_parameters(spec.hidden_size) - 1
            yield f"model.layers.{layer}.merger.bias", 1
    yield "model.norm", spec.hidden_size
    if not spec.tied:
        yield "lm_head", matrix


def lora_parameters(spec: LlamaSpec, method: Method) -> int:
    """Weights of the adapter: r for each input and each output of an adapted projection, and magnitudes."""
    return sum(
        method.r * (inputs + outputs) + (outputs if method.dora else 0)
        for inputs, outputs in _adapted_sizes(spec, method)
    )


def light_parameters(spec: LlamaSpec, method: Method) -> int:
    """Weights of LLaMA-Adapter but for the norms: prompts and gates, a scale and a bias for each output."""
    if not method.light:
        return 0
    length, layers = method.prompt
    wanted = max(1, len(spec.blocks) - 1) if layers is None else layers
    prompted = spec.blocks[len(spec.blocks) - min(wanted, len(spec.blocks)) :] if length else ()
    total = sum(length * spec.hidden_size + block.heads for block in prompted)
    if method.light == "llama_adapter_v2":
        total += sum(2 * out for block in spec.blocks for _, out in projections(spec, block).values())
    return total


def trained_parameters(spec: LlamaSpec, method: Method) -> int:
    """Weights that get a gradient; a tied embedding and head count once."""
    own = sum(size for module, size in module_sizes(spec) if method.trains(module, spec))
    return lora_parameters(spec, method) + light_parameters(spec, method) + own


def training_operations(spec: LlamaSpec, method: Method, length: int) -> float:
    """Operations for one trained token, forward and backward; every position has a label.

    With N weights in matrices: forward 2 N (:func:`forward_operations`), backward 2 N for the
    activations' gradients and two more for each trained weight; four products of attention; an
    adapter's weights count six times, magnitudes not at all. DoRA with dropout multiplies by the base's
    matrix once more, for what was dropped; :func:`magnitude_operations` are what it does once for a
    micro-batch. Decoding NF4 is no multiplication of matrices, and is not counted.
    """
    head = spec.vocab_size * spec.hidden_size
    total = forward_operations(spec, length) + (4 if method.trains_head(spec) else 2) * head
    for slot in spec.slots:
        for name, (inputs, outputs) in projections(spec, slot.block).items():
            total += (4 if method.trains(module_of(slot, name), spec) else 2) * inputs * outputs
            again = method.dora and method.dropout and adapts(name, slot, method)
            total += 4 * inputs * outputs if again else 0
        total += 4 * attention_product(slot.block, length)
    return total + 6 * lora_parameters(spec, dataclasses.replace(method, dora=False))


def exit_operations(spec: LlamaSpec, method: Method) -> float:
    """What :func:`training_operations` grows by for each exit: the head once more."""
    return (6.0 if method.trains_head(spec) else 4.0) * spec.vocab_size * spec.hidden_size


def magnitude_operations(spec: LlamaSpec, method: Method) -> float:
    """Operations with which DoRA makes B A, for the norms of its rows, once for each micro-batch.

    As PEFT does it: A and B multiply an identity matrix. Nothing flows back through the norms.
    """
    if not method.dora:
        return 0.0
    return (
        2.0 * method.r * sum(inputs * (inputs + outputs) for inputs, outputs in _adapted_sizes(spec, method))
    )


def dropped_elements(spec: LlamaSpec, method: Method) -> int:
    """Elements that the adapter's dropout draws for, per token: the inputs of adapted projections."""
    if not method.dropout:
        return 0
    return sum(inputs for inputs, _ in _adapted_sizes(spec, method))


def activation_bytes(
    spec: LlamaSpec, method: Method, dtype: str, *, device: str = "cpu", recomputed: int = 0
) -> float:
    """Bytes that autograd saves per position of a micro-batch, over all layers.

    Counted from the decoder: a norm keeps its input and one float32 figure. Attention in tiles
    (of bfloat16 on a CPU) keeps rotated queries, keys and values; any other keeps keys and values
    repeated for their group, its output and a float32 sum for each head. SwiGLU keeps gate and up, and
    makes their product for the down projection again where that is plain or carries a plain LoRA; that of a
    series is kept, and a shortcut keeps what enters its GELU. A
    projection keeps its input if it is trained, an adapted one what enters A (after dropout a tensor of
    its own, and a mask of bytes) and what leaves it; DoRA keeps the outputs of base and adapter, whose
    ratio its magnitudes set. A tensor that several keep counts once. Of the first ``recomputed`` layers
    only the input is kept.
    """
    size = BYTES[dtype]
    tiled = dtype == "bfloat16" and device == "cpu"
    total = float(3 * spec.hidden_size * size + 4)  # final norm, its output, the loss's gradient
    for slot in spec.slots:
        whole = slot.layer >= recomputed
        total += _layer_bytes(spec, method, slot, size, tiled) if whole else spec.hidden_size * size
    # A merger keeps the outputs of both halves.
    merged = sum(layer >= recomputed for layer, block in enumerate(spec.blocks) if block.merger)
    return total + 2 * merged * spec.hidden_size * size


def _layer_bytes(spec: LlamaSpec, method: Method, slot: Slot, size: int, tiled: bool) -> float:
    block = slot.block
    norms = (block.attention != "none") + (block.feed_forward != "none")
    total = float(norms * (spec.hidden_size * size + 4))
    if block.attention != "none":
        queries, keys = block.heads * block.head_dim, block.kv_heads * block.head_dim
        total += (queries + 2 * keys) * size if tiled else 4 * queries * size + 4 * block.heads
    if block.feed_forward != "none":
        total += 2 * block.width * size
    total += block.shortcut * size  # what enters its GELU
    unlike_plain = method.dora or method.base == "nf4"
    shared: dict[str, int] = {}  # inputs that are kept once, however many projections want them
    for name, (inputs, outputs) in projections(spec, block).items():
        adapted = adapts(name, slot, method)
        if adapted:
            total += method.r * size + (2 * outputs * size if method.dora else 0)
        if adapted and method.dropout:
            total += inputs * (size + 1)
        elif method.light == "llama_adapter_v2":
            total += 4 * outputs  # the product, in float32, which the scale's gradient takes
        elif name == "down_proj" and not (block.series or (adapted and unlike_plain)):
            pass  # its input is made again
        elif adapted or method.trains(module_of(slot, name), spec):
            shared[_source_of(name)] = inputs
    return total + sum(width * size for width in shared.values())


def _source_of(name: str) -> str:
    """Which tensor enters a projection."""
    if name in BIASED_WITH_QKV or name == "squeeze_proj":
        return "attention norm"
    own = {"o_proj": "joined documents", "down_proj": "product", "expand_proj": "squeezed"}
    return own.get(name, "feed-forward norm")


def weight_bytes(spec: LlamaSpec, method: Method, dtype: str) -> int:
    """Bytes of the model's weights and the adapter's as they are held: exactly, NF4's scales included."""
    size = BYTES[dtype]
    total = (spec.parameter_count() + lora_parameters(spec, method)) * size
    total += 4 * light_parameters(spec, method)
    for inputs, outputs in _held_in_nf4(spec, method):
        total += sum(bits((outputs, inputs))) // 8 - inputs * outputs * size
    return total


def decoded_bytes(spec: LlamaSpec, method: Method, dtype: str) -> int:
    """Bytes of matrices decoded from NF4 at the peak: the largest one, for they are decoded one at a time.

    DoRA with dropout keeps those of all adapted projections: PEFT multiplies what was dropped by a
    plain matrix, and autograd keeps that.
    """
    sizes = [inputs * outputs * BYTES[dtype] for inputs, outputs in _held_in_nf4(spec, method)]
    if not (sizes and method.dora and method.dropout):
        return max(sizes, default=0)
    return sum(inputs * outputs * BYTES[dtype] for inputs, outputs in _adapted_sizes(spec, method))


def memory(
    spec: LlamaSpec,
    method: Method,
    dtype: str,
    positions: int,
    *,
    device: str = "cpu",
    recomputed: int = 0,
    exits: int = 0,
) -> float:
    """Peak bytes of weights, optimiser, activations of ``positions`` and the loss, also at ``exits``.

    Per trained weight: a float32 gradient and two moments, and a master where the model is not
    float32. The peak is the end of the forward pass, when all activations, a chunk of logits and
    the head's gradient are there together (of several chunks the sum in float32, and a chunk's own).
    On a CPU the C library's allocator cannot reuse scratch space between tensors that are kept:
    measured, activations take half as much again.
    """
    size = BYTES[dtype]
    trained = trained_parameters(spec, method)
    weights = weight_bytes(spec, method, dtype) + decoded_bytes(spec, method, dtype)
    optimiser = trained * (12 + (4 if size != 4 else 0))
    rows = positions * (1 + exits)  # of the head
    loss = min(rows, LOGITS_AT_ONCE) * spec.vocab_size * size
    loss += 3 * exits * positions * spec.hidden_size * size  # states, those at labels, their gradients
    if method.trains_head(spec):
        several = rows > LOGITS_AT_ONCE
        loss += spec.vocab_size * spec.hidden_size * (size + (8 if several and size != 4 else 0))
    kept = activation_bytes(spec, method, dtype, device=device, recomputed=recomputed)
    activations = kept * positions
    activations *= _SCRATCH_ON_CPU if device == "cpu" else 1.0
    return weights + optimiser + activations + loss


def recomputed_operations(spec: LlamaSpec, layers: int, length: int) -> float:
    """Operations for one token that recomputing the first ``layers`` adds: their forward pass."""
    total = 0.0
    for block in (slot.block for slot in spec.slots if slot.layer < layers):
        total += 2 * sum(inputs * outputs for inputs, outputs in projections(spec, block).values())
        total += 2 * attention_product(block, length)
    return total


def kind_of_device(profile: Any) -> str:
    """Whether a device profile is that of a GPU; one measured here is called "this"."""
    name = str(profile.name)
    return "cuda" if name.startswith("cuda") else "cpu"
