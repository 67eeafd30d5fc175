"""What a decoder's shape promises: how many weights it has, what its cache holds, what sharing heads changes.

Systems S42 (arXiv:2406.09900) and S65 (arXiv:2408.03506).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from puna.core.errors import PunaError
from puna.core.seeds import torch_generator
from puna.model.cache import KeyValueCache
from puna.model.grouped_heads import expanded, multi_head_logits
from puna.model.llama import Llama
from puna.model.sizes import cache_bytes

if TYPE_CHECKING:
    from puna.edit.new_stages import Sizes
    from puna.model.spec import LlamaSpec


def formula(sizes: Sizes, rows: int) -> int:
    """Weights of a plain Llama with so many rows of the embedding, summed by hand.

    Embedding and head; of each layer the projections of queries and outputs, of keys and values, three
    matrices of the feed-forward half and two norms; the last norm.
    """
    hidden, heads = sizes.hidden_size, sizes.num_attention_heads
    kv_heads = sizes.num_key_value_heads or heads
    shared = hidden // heads * kv_heads
    layer = 2 * hidden * hidden + 2 * hidden * shared + 3 * hidden * sizes.intermediate_size + 2 * hidden
    embeddings = rows * hidden * (1 if sizes.tie_word_embeddings else 2)
    return embeddings + sizes.num_hidden_layers * layer + hidden


def of_shape(sizes: Sizes, rows: int) -> dict[str, float]:
    """Weights by the formula and as the decoder's own tensors have them, none of which is given storage."""
    spec = sizes.spec(rows)
    tensors = Llama(spec, device="meta").parameters()
    multi_head = spec.replace(kv_heads=spec.blocks[0].heads)
    return {
        "parameters": float(formula(sizes, rows)),
        "parameters.tensors": float(sum(tensor.numel() for tensor in tensors)),
        "cache_share": cache_bytes(spec) / cache_bytes(multi_head),
        "embedding_share": rows * sizes.hidden_size * (2 - sizes.tie_word_embeddings) / formula(sizes, rows),
    }


@torch.no_grad()
def of_model(model: Llama, length: int) -> dict[str, float]:
    """How a model and the one with a key-value head for each query compare, on ``length`` random tokens.

    ``mha.differ`` counts logits of the second that are not, to the bit, those of multi-head attention
    written out; ``mha.difference`` is how far they are from the model's, ``mha.cache_share`` the bytes of
    keys and values that the model stores over those that the second does.
    """
    if any(block.attention != "full" for block in model.spec.blocks):
        raise PunaError("a layer of this model has no attention", where=model.source)
    model.eval()
    wide = expanded(model)
    generator = torch_generator(0, "shape checks", model.spec.vocab_size)
    ids = torch.randint(model.spec.vocab_size, (1, length), generator=generator)
    through = wide(ids)
    written_out = multi_head_logits(wide, ids)
    return {
        "mha.differ": float((through.view(torch.int32) != written_out.view(torch.int32)).sum()),
        "mha.difference": float((model(ids) - through).abs().max()),
        "mha.cache_share": _stored(model.spec, length) / _stored(wide.spec, length),
    }


def _stored(spec: LlamaSpec, length: int) -> int:
    """Bytes of keys and values alone in a cache for so many tokens, as its tensors take them."""
    nothing = KeyValueCache(spec.replace(attention="none"), 1, length)
    return KeyValueCache(spec, 1, length).bytes - nothing.bytes
