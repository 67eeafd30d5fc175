"""The decoder's own manners: weights, seams, no-op layers, types, devices, input checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from puna.core.errors import PunaError
from puna.core.seeds import torch_generator
from puna.model.llama import Llama, Norm
from puna.model.spec import BlockSpec, LlamaSpec

BLOCK = BlockSpec(heads=4, kv_heads=2, head_dim=8, width=24)
SPEC = LlamaSpec(40, 32, (BLOCK, BLOCK), tied=True)
IDS = torch.arange(12)[None]


def test_initial_weights_come_from_the_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again = Llama(SPEC), Llama(SPEC)
    other = Llama(SPEC, generator=torch_generator(1, "other"))
    low = Llama(SPEC, dtype=torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), before)
    name = "model.layers.1.mlp.up_proj.weight"
    weight = first.state_dict()[name]
    assert torch.equal(weight, again.state_dict()[name])
    assert not torch.equal(weight, other.state_dict()[name])
    assert torch.equal(weight.bfloat16(), low.state_dict()[name])
    assert abs(weight.std().item() - 0.02) < 0.002 and abs(weight.mean().item()) < 0.002


def test_norms_start_as_ones_and_biases_as_zeros() -> None:
    model = Llama(SPEC.replace(attention_bias="all", mlp_bias=True))
    for name, weight in model.state_dict().items():
        if "norm" in name:
            assert (weight == 1).all()
        elif name.endswith("bias"):
            assert (weight == 0).all()


def test_logits_are_the_head_on_the_hidden_states_in_float32() -> None:
    for spec in (SPEC, SPEC.replace(tied=False)):
        model = Llama(spec, dtype=torch.bfloat16)
        hidden = model.hidden(IDS)
        assert hidden.dtype == torch.bfloat16 and hidden.shape == (1, 12, 32)
        logits = model.logits(hidden)
        assert logits.dtype == torch.float32 and logits.shape == (1, 12, 40)
        assert torch.equal(logits, functional.linear(hidden, model.head_weight).float())
        assert torch.equal(logits, model(IDS))


def test_a_tied_head_is_the_embedding_and_an_untied_one_a_layer() -> None:
    tied, untied = Llama(SPEC), Llama(SPEC.replace(tied=False))
    assert tied.head_weight is tied.model.embed_tokens.weight
    assert "lm_head.weight" not in tied.state_dict()
    assert untied.head_weight is untied.lm_head.weight


def test_halves_that_are_none_have_no_parameters_and_do_nothing() -> None:
    empty = BlockSpec(attention="none", feed_forward="none")
    blocks = (
        BLOCK,
        dataclasses.replace(BLOCK, attention="none"),
        dataclasses.replace(BLOCK, feed_forward="none"),
        empty,
    )
    model = Llama(dataclasses.replace(SPEC, blocks=blocks))
    names = {name for name, _ in model.named_parameters()}
    assert not any(
        name.startswith(("model.layers.1.self_attn", "model.layers.1.input_layernorm")) for name in names
    )
    assert not any(name.startswith(("model.layers.2.mlp", "model.layers.2.post_attention")) for name in names)
    assert not any(name.startswith("model.layers.3.") for name in names)
    shorter = Llama(dataclasses.replace(SPEC, blocks=blocks[:3]))
    shorter.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(model(IDS), shorter(IDS))


def test_a_linear_half_is_its_norm_and_one_matrix_and_sees_its_own_token_alone() -> None:
    linear = BlockSpec(attention="linear", feed_forward="linear", kv_heads=7, width=9, window=3)
    assert linear == BlockSpec(attention="linear", feed_forward="linear")
    spec = LlamaSpec(64, 32, (linear,), attention_bias="qkv", mlp_bias=True)
    model = Llama(spec)
    assert sum(weight.numel() for weight in model.parameters()) == spec.parameter_count()
    entering = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    block: Any = model.model.layers[0]
    block.self_attn.linear_attn.bias.data.fill_(0.5)
    behind = entering + block.self_attn.linear_attn(block.input_layernorm(entering))
    expected = behind + block.mlp.linear_mlp(block.post_attention_layernorm(behind))
    assert torch.equal(block(entering, {}, cast(Any, None), None), expected)
    one = model(torch.tensor([[3, 7, 9]]))[0, 1]
    assert torch.allclose(one, model(torch.tensor([[8, 7, 1]]))[0, 1])


def test_on_the_meta_device_weights_have_no_storage_and_can_be_assigned() -> None:
    model, weights = Llama(SPEC, device="meta"), Llama(SPEC)
    assert model.device.type == "meta" and all(weight.is_meta for weight in model.state_dict().values())
    model.load_state_dict(weights.state_dict(), assign=True)
    assert torch.equal(model(IDS), weights(IDS))


def test_shapes_come_out_right_on_a_device_without_data() -> None:
    """Nothing in the plain path asks for a tensor's content, or assumes the CPU."""
    model = Llama(SPEC, device="meta")
    assert model(IDS.to("meta")).shape == (1, 12, 40)


def test_changing_the_type_of_a_model_leaves_its_rotations_exact() -> None:
    """Positions near 1000 cannot be told apart in bfloat16; frequencies are never kept in it."""
    exact, low = Llama(SPEC), Llama(SPEC).bfloat16()
    positions = torch.arange(1000, 1012)[None]
    shift = (exact(IDS, positions=positions) - low(IDS, positions=positions)).abs().max()
    plain = (exact(IDS) - low(IDS)).abs().max()
    assert shift < 2 * plain


@pytest.mark.parametrize("shape", [(3,), (1, 0), (0, 3), (1, 2, 3)])
def test_input_that_is_not_rows_of_tokens_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(PunaError, match="input_ids must be"):
        Llama(SPEC)(torch.zeros(shape, dtype=torch.int64))


def test_the_norms_gradient_is_the_one_of_its_formula() -> None:
    norm = Norm(6, 1e-5).double()
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))

    def formula(hidden: torch.Tensor) -> torch.Tensor:
        wide = hidden.float()
        return norm.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(hidden.dtype)

    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        norm = norm.to(dtype)
        hidden = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        weight = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(2)).to(dtype)
        got, expected = norm(hidden), formula(hidden)
        assert torch.equal(got, expected) and got.dtype == dtype
        inputs = (hidden, norm.weight)
        ours = torch.autograd.grad((got * weight).sum(), inputs)
        theirs = torch.autograd.grad((expected * weight).sum(), inputs)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, atol=tolerance, rtol=tolerance)


def test_the_feed_forwards_gradient_is_the_one_of_its_formula() -> None:
    layer = Llama(SPEC).model.layers[0].mlp

    def formula(hidden: torch.Tensor) -> torch.Tensor:
        return layer.down_proj(functional.silu(layer.gate_proj(hidden)) * layer.up_proj(hidden))

    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    inputs = (hidden, *layer.parameters())
    got, expected = layer(hidden), formula(hidden)
    assert torch.equal(got, expected)
    theirs = torch.autograd.grad(expected.square().sum(), inputs)
    for ours, other in zip(torch.autograd.grad(got.square().sum(), inputs), theirs, strict=True):
        torch.testing.assert_close(ours, other)


def test_both_types_learn(tiny_llama: Callable[..., Any]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_llama().to(dtype)
        ids = torch.arange(30).repeat(2)[None]
        optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(12):
            loss = functional.cross_entropy(model(ids)[0, :-1], ids[0, 1:])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("layers", [1, 2])
def test_recomputed_layers_change_no_bit_and_keep_only_their_input(layers: int) -> None:
    model, kept = Llama(SPEC), []
    found = []
    ids = torch.arange(24).view(2, 12)
    for count in (0, layers):
        model.recomputed_layers = count
        storages: dict[int, int] = {}

        def keep(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model.hidden(ids).float().square().sum()
        kept.append(sum(storages.values()))
        found.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert kept[1] < kept[0]
    with torch.no_grad():
        assert torch.equal(model.hidden(ids).float().square().sum(), found[0][0])
