"""The matrices of a block that read the same input, and what a scale of that input folds into.

Four sites: queries, keys and values (and a shortcut's first matrix) behind the first norm; the output
projection behind the values; gate and up behind the second norm; down behind up. A shortcut's second matrix
is a fifth, whose scale cannot be moved through the GELU. A linear half has one, behind its norm. A scale of
values can be moved only where every query head has a key-value head of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from puna.model.llama import Block, Llama


@dataclass(frozen=True)
class Site:
    """``linears`` by ``names`` (of their weights, in the decoder) read one input, which ``source``
    produces.
    """

    names: tuple[str, ...]
    linears: tuple[nn.Linear, ...]
    folds_into: Literal["norm", "rows"] | None
    source: Any

    @property
    def reader(self) -> nn.Linear:
        """A module whose input is the site's."""
        return self.linears[0]


def sites(model: Llama, layer: int) -> Iterator[Site]:
    """The sites of one block, in the order of the forward pass."""
    model.spec.refuse_twins("what works matrix by matrix")
    block: Block = model.model.layers[layer]  # type: ignore[assignment]
    prefix = f"model.layers.{layer}"
    if block.block.attention == "full":
        attention: Any = block.self_attn
        readers = ("q_proj", "k_proj", "v_proj", *(["squeeze_proj"] if block.block.shortcut else []))
        names = tuple(f"{prefix}.self_attn.{name}.weight" for name in readers)
        linears = tuple(getattr(attention, name) for name in readers)
        yield Site(names, linears, "norm", block.input_layernorm)
        own = block.block.heads == block.block.kv_heads
        out = (f"{prefix}.self_attn.o_proj.weight",)
        yield Site(out, (attention.o_proj,), "rows" if own else None, attention.v_proj)
        if block.block.shortcut:
            expand = (f"{prefix}.self_attn.expand_proj.weight",)
            yield Site(expand, (attention.expand_proj,), None, attention.squeeze_proj)
    elif block.block.attention == "linear":
        alone = (f"{prefix}.self_attn.linear_attn.weight",)
        yield Site(alone, (block.self_attn.linear_attn,), "norm", block.input_layernorm)
    if block.block.feed_forward == "swiglu":
        feed: Any = block.mlp
        names = tuple(f"{prefix}.mlp.{name}.weight" for name in ("gate_proj", "up_proj"))
        yield Site(names, (feed.gate_proj, feed.up_proj), "norm", block.post_attention_layernorm)
        yield Site((f"{prefix}.mlp.down_proj.weight",), (feed.down_proj,), "rows", feed.up_proj)
    elif block.block.feed_forward == "linear":
        alone = (f"{prefix}.mlp.linear_mlp.weight",)
        yield Site(alone, (block.mlp.linear_mlp,), "norm", block.post_attention_layernorm)


@torch.no_grad()
def fold_inputs(site: Site, scale: Tensor) -> None:
    """Multiply the site's weights by ``scale`` [in] and divide what produces its input by it: outputs
    stay.
    """
    for linear in site.linears:
        linear.weight.mul_(scale)
    site.source.weight.div_(scale if site.folds_into == "norm" else scale[:, None])
    if site.folds_into == "rows" and site.source.bias is not None:
        site.source.bias.div_(scale)
