"""Key-value heads that several query heads share, and the same decoder with one for each query head.

A decoder with as many key-value heads as query heads is one of plain multi-head attention. Systems S42
(arXiv:2406.09900) and S65 (arXiv:2408.03506) share each among four and eight queries.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from puna.core.errors import PunaError
from puna.model.llama import Attention, Block, Llama
from puna.model.rope import rotate, rotation


@torch.no_grad()
def expanded(model: Llama) -> Llama:
    """The same function with a key-value head for each query head: shared ones are written out.

    Matrices ``k_proj`` and ``v_proj`` [kv_heads * head_dim, hidden] become [heads * head_dim, hidden].
    """
    blocks = tuple(
        dataclasses.replace(block, kv_heads=block.heads) if block.attention == "full" else block
        for block in model.spec.blocks
    )
    state = dict(model.state_dict())
    for layer, block in enumerate(model.spec.blocks):
        if block.attention != "full":
            continue
        for name in ("k_proj", "v_proj"):
            for part in ("weight", "bias"):
                key = f"model.layers.{layer}.self_attn.{name}.{part}"
                if key in state:
                    state[key] = _repeated(state[key], block.head_dim, block.heads // block.kv_heads)
    made = Llama(model.spec.replace(blocks=blocks), dtype=model.dtype, device="meta")
    made.load_state_dict(state, assign=True)
    made.tokenizer, made.template, made.source = model.tokenizer, model.template, model.source
    return made.train(model.training)


def _repeated(matrix: Tensor, head_dim: int, times: int) -> Tensor:
    """[kv_heads * head_dim, ...] to [kv_heads * times * head_dim, ...], each head ``times`` times."""
    heads = matrix.view(-1, head_dim, *matrix.shape[1:])
    return heads.repeat_interleave(times, dim=0).flatten(0, 1).clone()


@torch.no_grad()
def multi_head_logits(model: Llama, input_ids: Tensor) -> Tensor:
    """Logits [batch, time, vocab] with multi-head attention written out, which knows no groups.

    ``input_ids`` is [batch, time]; every layer must have as many key-value heads as query heads.
    """
    hidden = cast(Tensor, model.model.embed_tokens(input_ids))
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    for number, layer in enumerate(model.model.layers):
        block = cast(Block, layer).block
        if block.attention != "full" or block.kv_heads != block.heads or block.shortcut:
            raise PunaError(
                "this layer's heads share keys and values, or there is a way around them",
                where=f"layer {number}",
                found=f"{block.heads} heads, {block.kv_heads} key-value heads, shortcut {block.shortcut}",
            )
        attention = cast(Attention, cast(Block, layer).self_attn)
        normed = cast(Block, layer).input_layernorm(hidden)
        shape = (*normed.shape[:2], block.heads, block.head_dim)
        turn = rotation(block.rope, block.head_dim, positions, input_ids.shape[1], hidden.dtype)
        query = rotate(attention.q_proj(normed).view(shape), turn)  # [batch, time, heads, head_dim]
        key = rotate(attention.k_proj(normed).view(shape), turn)
        value = attention.v_proj(normed).view(shape)
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=block.scale)
        hidden = hidden + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        hidden = cast(Block, layer).feed(hidden)
    return model.logits(cast(Tensor, model.model.norm(hidden)))
