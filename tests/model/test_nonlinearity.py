"""Series activations and augmented shortcuts: what they compute, what they weigh, what they leave alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

import puna
from puna.core.errors import PunaError
from puna.core.seeds import torch_generator
from puna.model.checkpoint import read_weights
from puna.model.hf import write_hf
from puna.model.llama import FeedForward, Llama
from puna.model.nonlinearity import SeriesActivation
from puna.model.plain_stepper import PlainStepper
from puna.model.spec import BlockSpec, LlamaSpec
from puna.model.steppers import make_stepper
from tests.invariants import kit
from tests.model.native_models import hidden_of


@st.composite
def shapes(draw: st.DrawFn) -> BlockSpec:
    kv_heads = draw(st.integers(1, 3))
    return BlockSpec(
        heads=kv_heads * draw(st.integers(1, 2)),
        kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 6)),
        width=draw(st.integers(1, 40)),
        series=draw(st.integers(0, 4)),
        shortcut=draw(st.integers(0, 12)),
    )


@settings(max_examples=30)
@given(shapes(), st.integers(4, 40))
def test_what_they_add_is_two_matrices_and_two_vectors_for_each_term(block: BlockSpec, hidden: int) -> None:
    """2 d s weights a layer, s = d / r of the paper's 2 d^2 / r, and 2 n times the width."""
    plain = BlockSpec(heads=block.heads, kv_heads=block.kv_heads, head_dim=block.head_dim, width=block.width)
    counts = [LlamaSpec(20, hidden, (each, each)).parameter_count() for each in (block, plain)]
    assert counts[0] - counts[1] == 2 * (2 * hidden * block.shortcut + 2 * block.series * block.width)


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 5))
def test_the_series_and_its_gradients_are_those_of_the_formula(terms: int, width: int, rows: int) -> None:
    generator = torch_generator(0, "series", terms, width, rows)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    series = SeriesActivation(width, terms).double()
    weight, bias = drawn(width, terms), drawn(width, terms)
    gate, up = drawn(rows, 2, width), drawn(rows, 2, width)
    torch.nn.utils.vector_to_parameters(torch.cat((weight.flatten(), bias.flatten())), series.parameters())
    found = series(gate, up)
    expected = functional.silu(gate[..., None] * weight + bias).sum(-1) * up
    torch.testing.assert_close(found, expected)
    toward = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad(found, (gate, up, series.weight, series.bias), toward)
    theirs = torch.autograd.grad(expected, (gate, up, weight, bias), toward)
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got.view_as(wanted), wanted)


def test_one_term_that_is_not_scaled_is_plain_swiglu_to_the_bit() -> None:
    plain, one = (Llama(kit.spec_of().replace(series=terms)).eval() for terms in (0, 1))
    kit.assert_same_bits(plain, one, kit.random_ids(2, 17))  # a new one begins with scale 1 and no shift


def test_what_goes_around_attention_is_added_to_what_it_gives() -> None:
    model = kit.decoder(kit.spec_of().replace(shortcut=6))
    attention, seen = model.model.layers[1].self_attn, []
    attention.register_forward_hook(lambda _module, inputs, output: seen.append((inputs[0], output)))
    attention.o_proj.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.no_grad():
        model(kit.random_ids(2, 9))
        attended, (normed, output) = seen[0], seen[1]
        squeezed = functional.linear(normed, attention.squeeze_proj.weight)
        squeezed = squeezed * 0.5 * (1 + torch.erf(squeezed / math.sqrt(2)))
        around = functional.linear(squeezed, attention.expand_proj.weight)
    torch.testing.assert_close(output, attended + around, atol=1e-6, rtol=1e-5)


def test_from_scratch_the_first_term_is_plain_and_no_two_terms_are_alike() -> None:
    model = Llama(kit.spec_of().replace(series=3, shortcut=4), generator=torch_generator(1, "new"))
    for layer in model.model.layers:
        pairs = list(layer.mlp.act_fn.by_term())
        assert (pairs[0][0] == 1).all() and all((shift == 0).all() for _, shift in pairs)
        assert 0.01 < float(pairs[1][0].detach().std()) < 0.03 and not torch.equal(pairs[1][0], pairs[2][0])
        assert 0.01 < float(layer.self_attn.expand_proj.weight.detach().std()) < 0.03
    loss = functional.cross_entropy(model(kit.random_ids(2, 9)).flatten(0, 1), kit.random_ids(2, 9).flatten())
    loss.backward()
    for layer in model.model.layers:
        scales = layer.mlp.act_fn.weight.grad.view(-1, 3)
        assert not torch.equal(scales[:, 1], scales[:, 2])  # they will part further


def test_halves_that_have_no_place_for_them_are_equal_without() -> None:
    assert BlockSpec(attention="none", width=8, shortcut=3) == BlockSpec(attention="none", width=8)
    one = BlockSpec(heads=2, kv_heads=2, head_dim=4, feed_forward="linear")
    assert BlockSpec(heads=2, kv_heads=2, head_dim=4, feed_forward="linear", series=2) == one


@pytest.mark.parametrize("name", ["series", "shortcut"])
@pytest.mark.parametrize("value", [-1, 1.5, True, None])
def test_a_number_of_terms_or_a_width_that_is_none_is_refused(name: str, value: Any) -> None:
    with pytest.raises(PunaError, match=name):
        BlockSpec(**{"heads": 2, "kv_heads": 2, "head_dim": 4, "width": 8, name: value})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_they_say_the_same_in_both_steppers(tmp_path: Path, dtype: torch.dtype) -> None:
    spec = kit.spec_of(kit.BLOCK, BlockSpec(heads=4, kv_heads=2, head_dim=8, width=40, series=2, shortcut=6))
    model = kit.decoder(spec).to(dtype)
    write_hf(model, tmp_path)
    again = read_weights(tmp_path, dtype=dtype)
    assert again.spec == spec and (tmp_path / "puna.json").exists()
    kit.assert_same_bits(model, again, kit.random_ids(2, 9))
    ids = kit.random_ids(1, 23)
    with torch.no_grad():
        expected = model(ids)[0]
    for stepper in (make_stepper(again, cache_tokens=64), PlainStepper(again, cache_tokens=64)):
        found = stepper.logits(hidden_of(stepper, ids[0].tolist(), (20, 1, 1, 1)))
        near = 1e-4 if dtype == torch.float32 else 0.15
        torch.testing.assert_close(found, expected, atol=near * float(expected.abs().max()), rtol=0)


def test_transformers_and_llama_cpp_know_no_such_layers(tmp_path: Path, tiny_tokenizer: Any) -> None:
    spec = kit.spec_of().replace(series=2)
    assert not spec.uniform and spec.to_config()["model_type"] == "puna"
    model = kit.decoder(spec.replace(vocab_size=tiny_tokenizer.vocab_size))
    model.tokenizer = tiny_tokenizer
    with pytest.raises(PunaError, match="ordinary Llama layers"):
        puna.save(model, tmp_path / "model.gguf", format="gguf")


def test_the_engine_takes_them_and_a_hook_sees_what_enters_down() -> None:
    model = kit.decoder(kit.spec_of().replace(series=2, shortcut=6))
    assert make_stepper(model, cache_tokens=64, kernels="native").name == "native"
    feed, seen = model.model.layers[0].mlp, []
    assert isinstance(feed, FeedForward)
    handle = feed.down_proj.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(kit.random_ids(1, 5))
    handle.remove()
    assert seen[0].shape == (1, 5, 40)
