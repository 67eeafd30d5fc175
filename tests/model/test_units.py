"""Units of a decoder: masked is sliced, slices come back to their places, counts are those of the weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.core.seeds import torch_generator
from puna.model.checkpoint import read_weights
from puna.model.hf import write_hf
from puna.model.llama import Llama
from puna.model.plain_stepper import PlainStepper
from puna.model.slicing import Masks, scatter_back, slice_tensors, sliced, soft_mask
from puna.model.spec import BlockSpec, LlamaSpec
from puna.model.stepper import Read
from puna.model.steppers import make_stepper
from puna.model.units import (
    KINDS,
    Kept,
    Unit,
    block_parameters,
    count,
    layers_of,
    number_of,
    sliced_spec,
    sum_over_units,
    unit_parameters,
)
from tests.invariants import kit


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids)
    return found


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-5 * max(1.0, float(expected.abs().max())), rtol=0)


@st.composite
def decoders_and_kept(draw: Any) -> tuple[LlamaSpec, Kept]:
    """Decoders whose layers differ, multi-head, grouped or multi-query, and any part of them."""
    blocks = []
    for _ in range(draw(st.integers(1, 3))):
        kv_heads = draw(st.integers(1, 3))
        blocks.append(
            BlockSpec(
                attention=draw(st.sampled_from(["full", "full", "linear", "none"])),
                heads=kv_heads * draw(st.integers(1, 3)),
                kv_heads=kv_heads,
                head_dim=2 * draw(st.integers(1, 4)),
                window=draw(st.sampled_from([None, None, 3])),
                feed_forward=draw(st.sampled_from(["swiglu", "swiglu", "linear", "none"])),
                width=draw(st.integers(1, 12)),
                series=draw(st.sampled_from([0, 0, 1, 3])),
                shortcut=draw(st.sampled_from([0, 0, 2])),
            )
        )
    bias, mlp_bias = draw(st.sampled_from(["none", "qkv", "all"])), draw(st.booleans())
    spec = LlamaSpec(
        kit.VOCABULARY,
        draw(st.integers(6, 16)),
        tuple(blocks),
        norm_eps=draw(st.sampled_from([1e-3, 0.3])),  # large: a norm that is not corrected shows
        tied=draw(st.booleans()),
        attention_bias=bias,
        mlp_bias=mlp_bias,
    )

    def part(total: int, least: int) -> tuple[int, ...]:
        chosen = draw(st.sets(st.integers(0, total - 1), min_size=least)) if total else ()
        return tuple(sorted(chosen))

    kept = Kept(
        tuple(part(block.kv_heads, int(bias == "all" or block.shortcut > 0)) for block in spec.blocks),
        tuple(part(block.width, int(mlp_bias)) for block in spec.blocks),
        part(spec.hidden_size, 4),
        part(len(spec.blocks), 1),
    )
    return spec, kept


@settings(max_examples=60)
@given(decoders_and_kept())
def test_masked_is_sliced(given_: tuple[LlamaSpec, Kept]) -> None:
    spec, kept = given_
    model = kit.decoder(spec)
    ids = kit.random_ids(2, 9)
    with soft_mask(model, Masks.of(spec, kept)):
        masked = logits(model, ids)
    close(logits(sliced(model, kept), ids), masked)
    kit.assert_same_bits(kit.decoder(spec), model, ids)  # the mask is gone


@settings(max_examples=40)
@given(decoders_and_kept())
def test_scattered_back_a_slice_lies_at_its_places_and_all_else_is_zero(
    given_: tuple[LlamaSpec, Kept],
) -> None:
    spec, kept = given_
    weights = {name: weight.detach() for name, weight in kit.decoder(spec).named_parameters()}
    small = slice_tensors(weights, spec, kept)
    back = scatter_back(small, spec, kept)
    ones = scatter_back(
        {name: torch.ones_like(weight) for name, weight in small.items()}, spec, kept, correct=False
    )
    for name, tensor in back.items():
        torch.testing.assert_close(tensor, weights[name] * ones[name])
        assert int(ones[name].sum()) == ones[name].count_nonzero()
    restored = scatter_back(small, spec, kept, onto=weights)
    assert restored.keys() == weights.keys()
    for name, tensor in restored.items():
        torch.testing.assert_close(tensor, weights[name])


@settings(max_examples=40)
@given(decoders_and_kept())
def test_counts_are_those_of_the_weights(given_: tuple[LlamaSpec, Kept]) -> None:
    spec, kept = given_
    model = kit.decoder(spec)
    small = sliced(model, kept)
    counts = count(spec, kept)
    assert counts.parameters == sum(weight.numel() for weight in small.parameters())
    assert counts.block_parameters == sum(
        weight.numel() for name, weight in small.named_parameters() if ".layers." in name
    )
    for kind in KINDS:
        for layer in layers_of(spec, kind):
            units = number_of(spec, kind, layer)
            if kind == "block" and len(spec.blocks) > 1:
                fewer = sliced_spec(spec, Kept.everything(spec).without([Unit("block", layer)]))
                assert spec.parameter_count() - fewer.parameter_count() == unit_parameters(spec, kind, layer)
            elif kind != "block" and units > 1:
                fewer = sliced_spec(spec, Kept.everything(spec).without([Unit(kind, layer, units - 1)]))
                assert spec.parameter_count() - fewer.parameter_count() == unit_parameters(spec, kind, layer)


@settings(max_examples=30)
@given(decoders_and_kept(), st.data())
def test_two_cuts_are_one(given_: tuple[LlamaSpec, Kept], data: st.DataObject) -> None:
    spec, first = given_
    between = sliced_spec(spec, first)
    everything = Kept.everything(between)
    some = data.draw(st.sets(st.integers(1, max(1, between.hidden_size - 1))))
    second = everything.without([Unit("hidden", -1, index) for index in some if index < between.hidden_size])
    model = kit.decoder(spec)
    twice = sliced(sliced(model, first), second)
    once = sliced(model, first.then(second))
    assert once.spec.replace(norm_eps=1e-6) == twice.spec.replace(norm_eps=1e-6)
    assert once.spec.norm_eps == pytest.approx(twice.spec.norm_eps)
    close(logits(once, kit.random_ids(1, 5)), logits(twice, kit.random_ids(1, 5)))


@kit.neutral("every unit kept")
def _() -> tuple[kit.Forward, kit.Forward]:
    model = kit.decoder(kit.spec_of())
    return model, sliced(model, Kept.everything(model.spec))


@kit.neutral("masks of ones")
def _() -> tuple[kit.Forward, kit.Forward]:
    model, changed = kit.decoder(kit.spec_of()), kit.decoder(kit.spec_of())
    ones = Masks.of(changed.spec, Kept.everything(changed.spec))

    def masked(ids: torch.Tensor) -> torch.Tensor:
        with soft_mask(changed, ones):
            assert changed.model.layers[1].mlp.down_proj._forward_pre_hooks
            return changed(ids)

    return model, masked


THINNED = Kept(((1,), (0, 1), ()), ((0, 3, 4, 30), tuple(range(40)), (7,)), tuple(range(32)), (0, 1, 2))


def thinned() -> Llama:
    """Layers of unequal heads and widths, one without attention."""
    return sliced(kit.decoder(kit.spec_of(kit.BLOCK, kit.BLOCK, kit.BLOCK)), THINNED)


@pytest.mark.parametrize("setting", ["every unit kept", "masks of ones"])
def test_nothing_taken_out_changes_no_bit(setting: str) -> None:
    plain, changed = kit.NEUTRAL[setting]()
    kit.assert_same_bits(plain, changed, kit.random_ids(2, 17))


def test_unequal_layers_are_saved_loaded_and_decoded(tmp_path: Path) -> None:
    model = thinned()
    write_hf(model, tmp_path / "thin")
    loaded = read_weights(tmp_path / "thin")
    assert loaded.spec == model.spec
    ids = kit.random_ids(1, 40)
    kit.assert_same_bits(model, loaded, ids)
    for stepper in (PlainStepper(loaded, cache_tokens=64), make_stepper(loaded, cache_tokens=64)):
        text = stepper.sequence()
        rows = [
            stepper.step([Read(text, part.tolist(), len(part))])[0] for part in ids[0].split([23, 1, 1, 15])
        ]
        close(stepper.logits(torch.cat(rows)), logits(model, ids)[0])


def test_a_soft_mask_lets_gradients_through_to_its_factors() -> None:
    model = kit.decoder(kit.spec_of())
    ones = Masks.of(model.spec, Kept.everything(model.spec))
    for tensor in (ones.hidden, ones.blocks, *ones.head_groups.values(), *ones.channels.values()):
        assert tensor is not None
        tensor.requires_grad_()
    half = dataclasses.replace(ones, blocks=ones.blocks)
    with soft_mask(model, half):
        model(kit.random_ids(1, 9)).square().mean().backward()
    for layer in range(2):
        assert (half.head_groups[layer].grad != 0).all()  # type: ignore[union-attr]
        assert (half.channels[layer].grad != 0).all()  # type: ignore[union-attr]
    assert (half.hidden.grad != 0).all() and (half.blocks.grad != 0).all()  # type: ignore[union-attr]


def test_low_rank_factors_come_back_to_the_rows_and_columns_they_were_trained_on() -> None:
    """The recovered update is the small one at its places: what LoRAM merges into the whole model."""
    spec = kit.spec_of(kit.BLOCK, kit.BLOCK, kit.BLOCK)
    kept = Kept(((1,), (0,), (0, 1)), ((0, 5), (1,), (2, 3)), tuple(range(4, 32)), (0, 2))
    generator = torch_generator(0, "factors")
    small = sliced_spec(spec, kept)
    name = "model.layers.1.self_attn.o_proj."  # of the whole decoder's layer 2
    down = torch.randn(3, small.blocks[1].heads * 8, generator=generator)
    up = torch.randn(small.hidden_size, 3, generator=generator)
    back = scatter_back({name + "lora_A.weight": down, name + "lora_B.weight": up}, spec, kept)
    whole = "model.layers.2.self_attn.o_proj."
    update = scatter_back({name + "weight": up @ down}, spec, kept)[whole + "weight"]
    assert back.keys() == {whole + "lora_A.weight", whole + "lora_B.weight"}
    torch.testing.assert_close(back[whole + "lora_B.weight"] @ back[whole + "lora_A.weight"], update)
    assert update[:4].count_nonzero() == 0


def test_sums_over_units_are_those_of_slices() -> None:
    spec = kit.spec_of().replace(attention_bias="qkv", mlp_bias=True)
    weights = {name: weight.detach().abs() for name, weight in kit.decoder(spec).named_parameters()}
    for kind in KINDS:
        for layer in layers_of(spec, kind):
            sums = sum_over_units(spec, kind, layer, weights)
            for index in range(number_of(spec, kind, layer)):
                without = Kept.everything(spec).without([Unit(kind, layer, index)])
                left = slice_tensors(weights, spec, without, correct=False)
                expected = sum(float(w.sum()) for w in weights.values()) - sum(
                    float(w.sum()) for w in left.values()
                )
                assert float(sums[index]) == pytest.approx(expected, rel=1e-3)


def test_units_of_another_decoder_are_refused() -> None:
    spec = kit.spec_of()
    everything = Kept.everything(spec)
    for kept, where in (
        (dataclasses.replace(everything, hidden=()), "hidden"),
        (dataclasses.replace(everything, blocks=(0, 2)), "blocks"),
        (dataclasses.replace(everything, channels=((1, 0), (0,))), "channels of layer 0"),
        (dataclasses.replace(everything, head_groups=((0,),)), None),
    ):
        with pytest.raises(PunaError) as error:
            sliced_spec(spec, kept)
        assert error.value.where == where


def test_a_half_with_an_output_bias_keeps_a_unit() -> None:
    spec = kit.spec_of().replace(attention_bias="all")
    with pytest.raises(PunaError, match="bias"):
        sliced_spec(spec, Kept.everything(spec).without([Unit("head_group", 1, 0), Unit("head_group", 1, 1)]))


def test_json_holds_all_that_is_kept() -> None:
    import json

    assert Kept.from_json(json.loads(json.dumps(dataclasses.asdict(THINNED)))) == THINNED


def test_weights_of_the_layers_are_counted() -> None:
    spec = kit.spec_of()
    assert (
        block_parameters(spec)
        == spec.parameter_count() - spec.vocab_size * spec.hidden_size - spec.hidden_size
    )
