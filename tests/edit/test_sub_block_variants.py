"""Variants of a half of a layer, and the weights they start with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from puna.core.errors import PunaError
from puna.edit.sub_blocks.library import block_with
from puna.edit.sub_blocks.variants import PARENT, Space, changed, initial, of_half
from puna.model.attention import lay_out
from puna.model.llama import Llama
from puna.model.spec import BlockSpec, LlamaSpec
from tests.invariants import kit

BLOCK = BlockSpec(heads=4, kv_heads=2, head_dim=8, width=40)
SPEC = LlamaSpec(vocab_size=320, hidden_size=32, blocks=(BLOCK,) * 4, tied=True, max_positions=64)


def own(model: Llama, half: Any, layer: int = 1) -> dict[str, Tensor]:
    return of_half(model.state_dict(), layer, half)


def behind(model: Llama, block: Any) -> tuple[Tensor, Tensor]:
    """A stream, and the same behind a block."""
    hidden = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(0))
    layout = lay_out(2, 12, hidden.device, None, None, None)
    with torch.no_grad():
        return hidden, block(hidden, model._rotations(layout.positions, hidden.dtype), layout, None)


def test_the_space_of_a_layer_follows_what_the_layer_has() -> None:
    space = Space(kv_heads=(1, 2, 3), widths=(0.5, 0.51, 0.01))
    assert space.variants(BLOCK, "attention") == (PARENT, "kv_heads-1", "linear", "none")
    assert space.variants(BLOCK, "feed_forward") == (PARENT, "width-20", "width-1", "linear", "none")
    plain = BlockSpec(attention="linear", feed_forward="none")
    assert space.variants(plain, "attention") == (PARENT, "none")
    assert space.variants(plain, "feed_forward") == (PARENT,)


@pytest.mark.parametrize("bias", ["none", "qkv", "all"])
def test_a_linear_attention_starts_as_attention_of_a_token_to_itself(bias: Any) -> None:
    """With one token softmax is 1, so the product of the matrices is attention itself, biases included."""
    model = kit.decoder(SPEC.replace(attention_bias=bias))
    weights = initial(own(model, "attention"), model.spec, 1, "attention", "linear", ())
    linear = block_with(model, 1, "attention", "linear", weights)
    ids = torch.arange(5)[:, None]  # five rows of a token
    layout = lay_out(5, 1, ids.device, None, None, None)
    hidden = model.model.embed_tokens(ids)
    whole: Any = model.model.layers[1]
    expected = whole.attend(hidden, model._rotations(layout.positions, hidden.dtype), layout, None)
    torch.testing.assert_close(linear.attend(hidden, {}, layout, None), expected, atol=1e-5, rtol=1e-5)


def test_a_linear_feed_forward_starts_as_down_times_up() -> None:
    model = kit.decoder(SPEC.replace(mlp_bias=True))
    weights = initial(own(model, "feed_forward"), model.spec, 1, "feed_forward", "linear", ())
    linear = block_with(model, 1, "feed_forward", "linear", weights)
    feed: Any = model.model.layers[1].mlp
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(linear.mlp(hidden), feed.down_proj(feed.up_proj(hidden)), atol=1e-5, rtol=1e-5)


def test_fewer_key_value_heads_are_means_and_change_nothing_where_heads_were_equal() -> None:
    model = kit.decoder(SPEC)
    attention: Any = model.model.layers[1].self_attn
    with torch.no_grad():
        for projection in (attention.k_proj, attention.v_proj):
            projection.weight[8:] = projection.weight[:8]
    weights = initial(own(model, "attention"), model.spec, 1, "attention", "kv_heads-1", ())
    assert weights["self_attn.k_proj.weight"].shape == (8, 32)
    pooled = block_with(model, 1, "attention", "kv_heads-1", weights)
    torch.testing.assert_close(behind(model, pooled)[1], behind(model, model.model.layers[1])[1])


@pytest.mark.parametrize("series", [0, 3])
def test_a_narrower_feed_forward_keeps_the_channels_that_come_first(series: int) -> None:
    model = kit.decoder(SPEC.replace(series=series))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()
    feed: Any = model.model.layers[1].mlp
    with torch.no_grad():
        feed.down_proj.weight[:, order[25:]] = 0
    weights = initial(own(model, "feed_forward"), model.spec, 1, "feed_forward", "width-25", order)
    narrow = block_with(model, 1, "feed_forward", "width-25", weights)
    torch.testing.assert_close(behind(model, narrow)[1], behind(model, model.model.layers[1])[1])


@pytest.mark.parametrize(
    ("half", "variant", "said"),
    [
        ("attention", "kv_heads-3", "no such variant"),
        ("feed_forward", "width-41", "no such variant"),
        ("feed_forward", "kv_heads-1", "no variant of feed_forward"),
        ("attention", "kv_heads-0", "no variant of attention"),
    ],
)
def test_variants_that_a_layer_cannot_have_are_refused(half: Any, variant: str, said: str) -> None:
    with pytest.raises(PunaError, match=said):
        changed(BLOCK, half, variant)
