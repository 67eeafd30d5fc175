"""Layers with a twin: what mergers make of two outputs, keys of their own, saved, served, and refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import puna
from puna.core.errors import PunaError
from puna.core.seeds import torch_generator
from puna.edit.growing.expand import expand, last_of_groups, plan
from puna.model.adapters import LoraSettings, add_lora
from puna.model.cache import KeyValueCache
from puna.model.checkpoint import read_weights, write_gguf, write_hf
from puna.model.light_adapter import LightSettings, add_light
from puna.model.llama import Llama
from puna.model.plain_stepper import PlainStepper
from puna.model.sites import sites
from puna.model.sizes import cache_bytes
from puna.model.spec import BlockSpec, LlamaSpec, MergerKind
from puna.model.stepper import Read
from puna.model.steppers import make_stepper
from puna.model.twins import PARALLEL, Merger, TwinBlock, spherical, watched
from puna.model.units import Kept, members
from tests.invariants import kit

MERGERS = get_args(MergerKind)


def pair(hidden: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """What enters a layer and what its two halves give, [2, 5, hidden] each, float64."""
    generator = torch_generator(seed, "pair")
    entering, frozen, twin = torch.randn(3, 2, 5, hidden, generator=generator, dtype=torch.float64)
    return entering, frozen, twin


def merger_of(kind: MergerKind, hidden: int = 6, seed: int = 0) -> Merger:
    merger = Merger(kind, hidden).double()
    generator = torch_generator(seed, "weights")
    with torch.no_grad():
        for weight in merger.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    return merger


def test_each_merger_computes_its_formula() -> None:
    entering, frozen, twin = pair()
    for kind in MERGERS:
        merger = merger_of(kind)
        merged, share = merger(entering, frozen, twin)
        if kind in ("lerp", "proj", "slerp", "prog"):
            w = torch.sigmoid(merger.bias)
        else:
            read = torch.cat((frozen, twin), -1) if kind == "dlerp" else entering
            w = torch.sigmoid((read * merger.weight).sum(-1, keepdim=True) + merger.bias)
        torch.testing.assert_close(share, w)
        if kind == "slerp":
            angle = torch.acos(torch.nn.functional.cosine_similarity(frozen, twin, dim=-1))[..., None]
            expected = (torch.sin((1 - w) * angle) * frozen + torch.sin(w * angle) * twin) / torch.sin(angle)
        elif kind == "moe":
            assert (w > 0.5).any()
            assert (w < 0.5).any()
            expected = torch.where(w > 0.5, twin, frozen)
        else:
            mapped = frozen @ merger.map.T if kind == "prog" else frozen
            expected = (1 - w) * mapped + w * twin
        torch.testing.assert_close(merged, expected)


def test_the_choice_of_moe_has_a_gradient() -> None:
    merger = merger_of("moe")
    merged, _ = merger(*pair())
    merged.square().sum().backward()
    assert merger.weight.grad is not None
    assert bool((merger.weight.grad != 0).all())


@given(st.floats(0, 1), st.integers(0, 1000))
def test_an_arc_ends_at_its_ends_and_keeps_a_common_length(weight: float, seed: int) -> None:
    _, one, other = pair(seed=seed)
    one, other = (torch.nn.functional.normalize(each, dim=-1) for each in (one, other))
    between = spherical(one, other, torch.tensor([weight], dtype=torch.float64))
    torch.testing.assert_close(between.norm(dim=-1), torch.ones(2, 5, dtype=torch.float64))
    torch.testing.assert_close(spherical(one, other, torch.zeros(1, dtype=torch.float64)), one)
    torch.testing.assert_close(spherical(one, other, torch.ones(1, dtype=torch.float64)), other)


def test_an_arc_is_chosen_token_by_token_and_has_finite_gradients() -> None:
    one = torch.eye(4, dtype=torch.float64)[:3].clone()
    other = torch.stack([one[0], torch.roll(one[1], 1), -one[2]])
    one.requires_grad_()
    weight = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    between = spherical(one, other, weight)
    torch.testing.assert_close(between[0], one[0], rtol=0, atol=0)
    torch.testing.assert_close(between[1], (one[1] + other[1]) / 2**0.5)  # the arc, though others go straight
    assert bool((between[2] == 0).all())
    between.sum().backward()
    assert bool(torch.isfinite(one.grad).all())
    assert weight.grad is not None
    assert bool(torch.isfinite(weight.grad).all())
    assert PARALLEL < 1e-3


SIZES = st.tuples(
    st.sampled_from(MERGERS),
    st.integers(1, 3),  # key-value heads
    st.integers(1, 2),  # queries for each
    st.integers(1, 3),  # groups
    st.integers(1, 2),  # layers of a group
)


@settings(max_examples=25)
@given(SIZES, st.booleans(), st.booleans())
def test_any_shape_expands_to_the_same_bits_and_the_bytes_that_are_said(
    sizes: tuple[MergerKind, int, int, int, int], biased: bool, tied: bool
) -> None:
    kind, kv_heads, queries, groups, depth = sizes
    block = BlockSpec(heads=kv_heads * queries, kv_heads=kv_heads, head_dim=4, width=12)
    layers = groups * depth
    spec = LlamaSpec(kit.VOCABULARY, 16, (block,) * layers, tied=tied, mlp_bias=biased, max_positions=64)
    model = kit.decoder(spec.replace(attention_bias="all" if biased else "none"))
    grown = expand(model, plan(model.spec, last_of_groups(layers, groups), kind), seed=1, noise=0.0)
    ids = kit.random_ids(2, 9)
    kit.assert_same_bits(model, grown, ids)
    assert sum(weight.numel() for weight in grown.parameters()) == grown.spec.parameter_count()
    added = {"dlerp": 32, "dlerpin": 16, "moe": 16, "proj": 256, "prog": 256}.get(kind, 0) + 1
    one = block.parameter_count(16, model.spec.attention_bias, biased)
    assert grown.spec.parameter_count() - model.spec.parameter_count() == groups * (one + added)
    stores = [cache_bytes(one.spec) for one in (grown, model)]
    assert stores[0] * layers == stores[1] * (layers + groups)
    plain = [PlainStepper(each, cache_tokens=16).pool.bytes_per_block for each in (grown, model)]
    assert plain[0] * layers == plain[1] * (layers + groups)
    with watched(grown) as seen, torch.no_grad():
        grown(ids)
    assert all(torch.equal(each.frozen, each.twin) for each in seen)
    assert [each.layer for each in seen] == list(last_of_groups(layers, groups))


def test_twins_store_keys_of_their_own() -> None:
    model = kit.DECODERS["twins"]()
    cache = KeyValueCache(model.spec, 1, 8)
    with torch.no_grad():
        model(kit.random_ids(1, 8), cache=cache)
    keys = [pair[0] for pair in cache._stores if pair is not None]
    assert len(keys) == 9
    assert all(bool((stored != 0).any()) for stored in keys)
    for slot, (layer, twin) in enumerate(((1, 6), (3, 7), (5, 8))):
        assert not torch.equal(keys[layer], keys[twin]), slot
    names = [slot.name for slot in model.spec.slots]
    assert names[6:] == ["layers.1.twin", "layers.3.twin", "layers.5.twin"]


@pytest.mark.parametrize("name", ["twins", "more-twins"])
@pytest.mark.parametrize("size", [1, 7, 40])
def test_a_stepper_reads_twins_in_parts_of_any_size(name: str, size: int) -> None:
    model = kit.DECODERS[name]().double()
    ids = kit.random_ids(1, 40)
    with torch.no_grad():
        expected = model.hidden(ids)[0]
    stepper = PlainStepper(model, cache_tokens=64)
    sequence, found = stepper.sequence(), list[Tensor]()
    for part in ids[0].split(size):
        found += stepper.step([Read(sequence, part.tolist(), len(part))])
    assert float((torch.cat(found) - expected).abs().max()) < 1e-5  # the softmax is in float32


def test_an_expanded_model_is_saved_loaded_and_served(
    tiny_llama: Callable[..., Llama], tiny_tokenizer: object, tmp_path: Path
) -> None:
    base = tiny_llama()
    model = expand(base, plan(base.spec, (1,), "dlerp"), seed=0)
    with torch.no_grad():
        for weight in model.model.layers[1].twin.parameters():
            weight.mul_(1.3)
    model.tokenizer = tiny_tokenizer
    puna.save(model, tmp_path / "model")
    again = puna.load(tmp_path / "model", dtype="float32")
    assert again.spec == model.spec
    assert isinstance(again.model.layers[1], TwinBlock)
    ids = torch.tensor([[5, 9, 33, 7, 60, 21]])
    assert torch.equal(again(ids), model(ids))
    engine = puna.Engine(again, cache_tokens=256)
    (said,) = engine.generate([ids[0].tolist()], puna.Sampling(max_tokens=12, temperature=0, ignore_eos=True))
    expected = ids
    with torch.no_grad():
        for _ in range(12):
            expected = torch.cat((expected, model(expected)[:, -1:].argmax(-1)), dim=1)
    assert list(said.ids) == expected[0, ids.shape[1] :].tolist()
    skipping = {"name": "feed-forward-skip", "first": 0, "last": 1, "threshold": 0.9, "budget": 1}
    with pytest.raises(PunaError, match="feed-forwards knows nothing of layers with a twin"):
        engine.generate([ids[0].tolist()], puna.Sampling(max_tokens=4), strategy=skipping)


def test_layers_told_a_mask_tell_their_twins() -> None:
    model = kit.DECODERS["twins"]()
    both_ways = tuple(dataclasses.replace(block, causal=False) for block in model.spec.blocks)
    model.set_blocks(both_ways)
    assert all(
        not layer.twin.self_attn.block.causal for layer in model.model.layers if hasattr(layer, "twin")
    )


def test_what_knows_nothing_of_twins_says_so_in_one_message(tmp_path: Path) -> None:
    model = kit.DECODERS["twins"]()
    hidden = torch.zeros(1, 2, 32)
    refused: dict[str, Callable[[], object]] = {
        "units": lambda: Kept.everything(model.spec),
        "members": lambda: members(model.spec, "channel", 1),
        "matrices": lambda: list(sites(model, 0)),
        "prompts": lambda: add_light(model, LightSettings("llama_adapter", 3, 2), seed=0),
        "a second expansion": lambda: plan(model.spec, (0,), "lerp"),
        "halves": lambda: model.model.layers[1].feed(hidden),
        "gguf": lambda: write_gguf(model, tmp_path / "x.gguf", metadata={}),
    }
    for what, call in refused.items():
        with pytest.raises(PunaError, match="twin") as caught:
            call()
        assert "merge_twins" in str(caught.value), what


def test_the_native_kernels_leave_twins_to_the_plain_stepper() -> None:
    model = kit.DECODERS["twins"]()
    assert make_stepper(model, cache_tokens=32).name == "plain"
    with pytest.raises(PunaError, match="twin"):
        make_stepper(model, cache_tokens=32, kernels="native")
    rounded = make_stepper(model, cache_tokens=32, quantize="int8")
    assert rounded.name == "plain"
    gate = rounded.model.model.layers[3].merger.weight  # type: ignore[attr-defined]
    assert torch.equal(gate, model.model.layers[3].merger.weight)


def test_a_lora_on_an_expanded_model_starts_at_the_same_bits() -> None:
    plain, adapted = kit.DECODERS["twins"](), kit.DECODERS["twins"]()
    report = add_lora(adapted, LoraSettings(r=2, target=("1.twin.self_attn.q_proj",)), seed=0)
    assert len(report.names) == 2
    kit.assert_same_bits(plain, adapted, kit.random_ids(1, 9))


def test_a_damaged_expanded_checkpoint_is_one_clear_error(tmp_path: Path) -> None:
    model = kit.DECODERS["twins"]()
    write_hf(model, tmp_path / "model")
    file = tmp_path / "model" / "puna.json"
    file.write_text(file.read_text().replace('"dlerp"', '"dlerpin"'))
    with pytest.raises(PunaError, match=r"layers\.3\.merger\.weight"):
        read_weights(tmp_path / "model")
