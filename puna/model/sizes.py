"""What a decoder of a spec consists of and computes, from its shapes alone. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from puna.model.spec import BlockSpec, LlamaSpec


def projections(spec: LlamaSpec, block: BlockSpec) -> dict[str, tuple[int, int]]:
    """The matrices of a layer by name, as (inputs, outputs); of an expanded layer those of one half."""
    hidden, found = spec.hidden_size, dict[str, tuple[int, int]]()
    if block.attention == "full":
        queries, keys = block.heads * block.head_dim, block.kv_heads * block.head_dim
        found |= {"q_proj": (hidden, queries), "k_proj": (hidden, keys), "v_proj": (hidden, keys)}
        found |= {"o_proj": (queries, hidden)}
        if block.shortcut:
            found |= {"squeeze_proj": (hidden, block.shortcut), "expand_proj": (block.shortcut, hidden)}
    elif block.attention == "linear":
        found |= {"linear_attn": (hidden, hidden)}
    if block.feed_forward == "swiglu":
        found |= {"gate_proj": (hidden, block.width), "up_proj": (hidden, block.width)}
        found |= {"down_proj": (block.width, hidden)}
    elif block.feed_forward == "linear":
        found |= {"linear_mlp": (hidden, hidden)}
    return found


def forward_operations(spec: LlamaSpec, length: int) -> float:
    """Floating-point operations of the forward pass for one token in a document of ``length``.

    Two for each weight of a matrix, the head's included, and two products of causal attention over
    half of ``length`` on average.
    """
    return _operations(spec, lambda block: min(length, block.window or length) / 2)


def step_operations(spec: LlamaSpec, context: int) -> float:
    """Floating-point operations of reading one token when ``context`` tokens, itself included, are stored."""
    return _operations(spec, lambda block: min(context, block.window or context))


def attention_product(block: BlockSpec, length: int) -> float:
    """Operations of one product of queries and keys (or weights and values) for one token of a document."""
    return _product(block, min(length, block.window or length) / 2)


def cache_bytes(spec: LlamaSpec, number: int = 2) -> int:
    """Bytes of the keys and values of one token, with ``number`` bytes for each number."""
    return sum(2 * slot.block.kv_heads * slot.block.head_dim * number for slot in spec.slots)


def _product(block: BlockSpec, seen: float) -> float:
    return 2 * seen * block.heads * block.head_dim if block.attention == "full" else 0.0


def _operations(spec: LlamaSpec, seen: Callable[[BlockSpec], float]) -> float:
    total = 2.0 * spec.vocab_size * spec.hidden_size
    for block in (slot.block for slot in spec.slots):
        total += 2 * sum(inputs * outputs for inputs, outputs in projections(spec, block).values())
        total += 2 * _product(block, seen(block))
    return total + 2 * sum(block.merger_parameters(spec.hidden_size) for block in spec.blocks)
