"""NF4: published tables, exact accounting, bounds of its error, and a layer that computes as if decoded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from puna.core.errors import PunaError
from puna.core.seeds import torch_generator
from puna.model.adapters import LoraSettings, add_lora
from puna.model.gguf_writer import write_gguf
from puna.model.hf import write_hf
from puna.model.llama import Llama
from puna.model.nf4 import (
    NF4Linear,
    decode,
    decode_blocks,
    decode_scales,
    dequantize_base,
    dynamic_map,
    encode,
    encode_blocks,
    levels,
    parameter_count,
    quantised_layers,
    quantize_base,
    take_quantised,
)
from puna.model.nf4_layout import BLOCK, bits

Build = Callable[..., Llama]
# The table that bitsandbytes publishes for "nf4".
PUBLISHED = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
LARGEST_HALF_GAP = (1 - 0.6961928009986877) / 2  # at the negative end
SCALE_HALF_GAP = 0.9 / 64 / 2  # of the dynamic map, among its largest values


def test_levels_are_the_published_ones() -> None:
    found = levels()
    torch.testing.assert_close(found, torch.tensor(PUBLISHED), atol=1e-6, rtol=0)
    assert found[0] == -1 and found[7] == 0 and found[15] == 1
    assert float((found[1:] - found[:-1]).max() / 2) == pytest.approx(LARGEST_HALF_GAP, abs=1e-6)


def test_the_dynamic_map_is_the_published_one() -> None:
    found = dynamic_map()
    assert len(found.unique()) == 256 and torch.equal(found, found.sort().values)
    assert found[127] == 0 and found[255] == 1 and found[0] == pytest.approx(-0.992968738079071, abs=1e-7)
    expected = [5.500000384017767e-07, 3.250000190746505e-06, 7.749999895168003e-06]
    assert found[128:131].tolist() == pytest.approx(expected, rel=1e-6)
    assert torch.equal(found[1:127], -found[128:254].flip(0))


def test_bytes_are_those_of_bitsandbytes() -> None:
    """Where it is installed: its codes, means and sizes; a scale on a tie may fall on the neighbour."""
    theirs = pytest.importorskip("bitsandbytes").functional
    assert torch.equal(dynamic_map(), theirs.create_dynamic_map())
    for size in (19200, 65920, 342):
        weight = 0.03 * torch.randn(size, generator=torch_generator(size, "nf4"))
        codes, state = theirs.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        ours = encode(weight)
        assert torch.equal(codes.flatten(), ours.codes)
        assert torch.equal(state.state2.absmax, ours.scale_sizes) and state.offset == ours.scale_mean
        apart = (state.absmax.int() - ours.scale_codes.int()).abs()
        assert apart.max() <= 1 and (apart > 0).float().mean() < 0.01


@given(st.lists(st.integers(1, 300), min_size=1, max_size=3))
def test_bits_are_exactly_what_is_held(shape: list[int]) -> None:
    shape = shape[:2] if len(shape) == 3 else shape
    packed = encode(torch.ones(shape))
    payload, overhead = bits(shape)
    assert payload == 8 * packed.codes.nbytes
    assert payload + overhead == 8 * packed.nbytes


def test_a_weight_takes_4_127_bits() -> None:
    payload, overhead = bits((4096, 4096))
    weights = 4096 * 4096
    assert payload == 4 * weights
    assert overhead == 8 * weights // 64 + 32 * weights // (64 * 256) + 32
    assert (payload + overhead) / weights == pytest.approx(4.127, abs=1e-4)
    assert bits((3, 5)) == (64, 8 + 32 + 32)  # 15 codes take 8 bytes, one block has one scale


def random_weight(size: int, seed: int, spread: float, zeros: bool) -> torch.Tensor:
    generator = torch_generator(seed, "weights")
    weight = spread * torch.randn(size, generator=generator)
    # Blocks of very different size, as a matrix with outliers has them.
    weight *= (3 * torch.randn(-(-size // BLOCK), generator=generator)).exp().repeat_interleave(BLOCK)[:size]
    if zeros:
        weight[: size // 2] = 0
    return weight


WEIGHTS = st.builds(
    random_weight,
    st.integers(1, 700),
    st.integers(0, 10_000),
    st.sampled_from([1e-6, 0.02, 1.0, 3e4]),
    st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(WEIGHTS)
def test_the_error_of_a_block_is_bounded(weight: torch.Tensor) -> None:
    """By half the largest gap times its scale, and by what the scale itself is off in 8 bits."""
    codes, scales = encode_blocks(weight)
    blocks = weight.split(BLOCK)
    assert torch.equal(scales, torch.stack([block.abs().max() for block in blocks]))
    exact = decode_blocks(codes, scales, tuple(weight.shape), torch.float32)
    wide = scales.repeat_interleave(BLOCK)[: len(weight)]
    assert ((weight - exact).abs() <= wide * (LARGEST_HALF_GAP + 1e-6)).all()

    packed = encode(weight)
    rounded = decode_scales(packed.scale_codes, packed.scale_sizes, packed.scale_mean)
    apart = (rounded - scales).abs()
    sizes = packed.scale_sizes.repeat_interleave(256)[: len(scales)]
    slack = 1e-6 * (sizes + packed.scale_mean)
    assert (rounded >= 0).all() and (apart <= sizes * SCALE_HALF_GAP + slack).all()
    bound = wide * (LARGEST_HALF_GAP + 1e-6) + apart.repeat_interleave(BLOCK)[: len(weight)]
    assert ((weight - decode(packed)).abs() <= bound * (1 + 1e-6)).all()


@settings(max_examples=60, deadline=None)
@given(WEIGHTS)
def test_what_was_decoded_is_encoded_the_same_again(weight: torch.Tensor) -> None:
    """Codes and scales to the bit; with scales in 8 bits, whose mean moves, the codes."""
    codes, scales = encode_blocks(weight)
    exact = decode_blocks(codes, scales, tuple(weight.shape), torch.float32)
    again, same_scales = encode_blocks(exact)
    assert torch.equal(again, codes) and torch.equal(same_scales, scales)

    packed = encode(weight)
    second = encode(decode(packed))
    rounded = decode_scales(packed.scale_codes, packed.scale_sizes, packed.scale_mean)
    alive = (rounded > 0).repeat_interleave(BLOCK // 2)[: len(packed.codes)]
    assert torch.equal(second.codes[alive], packed.codes[alive])


@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 127, 64 * 4096 + 3, 64 * 4096 * 2])
def test_every_size_comes_back_whole(size: int) -> None:
    """Short last blocks, an odd number of codes, more blocks than are worked on at once."""
    weight = torch.randn(size, generator=torch_generator(size, "sizes"))
    packed = encode(weight)
    found = decode(packed)
    assert found.shape == weight.shape and packed.codes.dtype == torch.uint8
    assert (weight - found).abs().max() < 0.2 * weight.abs().max()
    tail = weight[-(size % BLOCK or BLOCK) :]
    codes, scales = encode_blocks(tail)  # a block alone has the codes it has among others
    assert torch.equal(packed.codes[-len(codes) :], codes)
    assert scales[0] == tail.abs().max()


def test_zero_stays_zero_and_dtypes_are_rounded_once() -> None:
    assert torch.equal(decode(encode(torch.zeros(3, 70))), torch.zeros(3, 70))
    weight = torch.randn(5, 80, generator=torch_generator(0, "zeros"))
    weight[2] = 0
    packed = encode(weight)
    assert (decode(packed)[2, 48:] == 0).all()  # a block of nothing else
    assert torch.equal(decode(packed, torch.bfloat16), decode(packed).bfloat16())


def test_a_scale_never_turns_a_block_around() -> None:
    """A tiny scale beside a huge one: less the mean, both are rounded to the size of the huge one."""
    for share in range(1, 60):
        weight = torch.full((64 * 60,), 1e-3)
        weight[: 64 * share] = 100.0
        found = decode(encode(weight))
        assert (found >= 0).all()


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.tensor([1.0, float("nan")]), "NaN"),
        (torch.tensor([1.0, float("inf")]), "infinite"),
        (torch.ones(3, dtype=torch.int64), "floating-point weights"),
        (torch.ones(0), "floating-point weights"),
    ],
)
def test_what_nf4_cannot_hold_is_refused(weight: torch.Tensor, message: str) -> None:
    with pytest.raises(PunaError, match=message):
        encode(weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(7, 96), (2, 5, 96), (96,)])
def test_the_layer_computes_as_a_plain_one_with_the_decoded_matrix(
    dtype: torch.dtype, biased: bool, shape: tuple[int, ...]
) -> None:
    """Outputs and gradients, of the input and of a bias, to the bit."""
    torch_linear = nn.Linear(96, 40, bias=biased)
    held = NF4Linear(torch_linear.to(dtype))
    plain = held.plain()
    found = []
    for layer in (held, plain):
        hidden = torch.randn(shape, generator=torch_generator(1, "hidden")).to(dtype).requires_grad_()
        output = layer(hidden)
        bias = [layer.bias] if biased else []
        found.append([output, *torch.autograd.grad(output.float().square().sum(), [hidden, *bias])])
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == dtype and torch.equal(ours, theirs)
    assert torch.equal(plain.weight, held.weight) and not any(
        "weight" in n for n, _ in held.named_parameters()
    )


def test_the_layer_keeps_no_decoded_matrix_and_gives_it_no_gradient() -> None:
    held = NF4Linear(nn.Linear(96, 40))
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    hidden = torch.randn(3, 96, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = held(hidden)
    assert not kept
    output.sum().backward()
    assert hidden.grad is not None and held.bias is not None and held.bias.grad is not None
    assert not any(buffer.requires_grad for buffer in held.buffers())


def test_scales_stay_exact_whatever_the_model_is_moved_to() -> None:
    held = NF4Linear(nn.Linear(96, 40))
    before = held.decoded(torch.float32)
    for moved in (copy.deepcopy(held).to(torch.bfloat16), copy.deepcopy(held).half().float()):
        assert torch.equal(moved.decoded(torch.float32), before)
        assert moved.bias is not None and moved.weight.dtype == moved.bias.dtype == moved.dtype
    fresh = NF4Linear(nn.Linear(96, 40))
    fresh.load_state_dict(held.state_dict(), strict=True)
    assert torch.equal(fresh.decoded(torch.float32), before)


@pytest.mark.parametrize("tied", [True, False])
def test_the_projections_alone_are_held_in_nf4(tied: bool, tiny_llama: Build) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bytes_before = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert quantize_base(model, leave=frozenset({"model.layers.0.mlp.up_proj"})) == 13
    names = [name for name, _ in quantised_layers(model)]
    assert len(names) == 13 and all(name.endswith("_proj") for name in names)
    after = model.state_dict()
    for name in before.keys() & after.keys():
        assert torch.equal(before[name], after[name])
    assert {name.removesuffix(".weight") for name in before.keys() - after.keys()} == set(names)
    saved = sum(
        before[f"{name}.weight"].nbytes - sum(bits(before[f"{name}.weight"].shape)) // 8 for name in names
    )
    assert sum(tensor.nbytes for tensor in after.values()) == bytes_before - saved
    assert parameter_count(model) == model.spec.parameter_count()
    assert quantize_base(model) == 1  # the one that was left


def test_decoded_again_the_model_is_plain_and_computes_the_same(tiny_llama: Build) -> None:
    ids = torch.arange(3, 27).view(2, 12)
    model = tiny_llama(attention_bias=True)
    plain = model(ids)
    quantize_base(model)
    held = model(ids)
    dequantize_base(model)
    assert torch.equal(model(ids), held) and not torch.equal(held, plain)
    assert not list(quantised_layers(model))
    assert [*model.state_dict()] == [*tiny_llama(attention_bias=True).state_dict()]


def test_codes_can_be_taken_from_another_model(tiny_llama: Build) -> None:
    """What was trained in bfloat16 is merged in float32: the codes must be those of the training."""
    trained = tiny_llama().to(torch.bfloat16)
    quantize_base(trained)
    add_lora(trained, LoraSettings(r=2), seed=0)
    exact = tiny_llama()
    take_quantised(exact, trained)
    ours, theirs = dict(quantised_layers(exact)), dict(quantised_layers(trained))
    assert ours.keys() == theirs.keys() and len(ours) == 14
    for name, layer in ours.items():
        assert layer.dtype == torch.float32 and layer is not theirs[name]
        assert torch.equal(layer.decoded(torch.float32), theirs[name].decoded(torch.float32))


def test_weights_in_nf4_are_not_written_as_if_they_were_all(tiny_llama: Build, tmp_path: Path) -> None:
    model = tiny_llama()
    quantize_base(model)
    with pytest.raises(PunaError, match=r"not written(.|\n)*q_proj"):
        write_hf(model, tmp_path / "folder")
    with pytest.raises(PunaError, match="not written"):
        write_gguf(model, tmp_path / "file.gguf", metadata={})
    add_lora(model, LoraSettings(r=2), seed=0)
    with pytest.raises(PunaError, match="not written"):
        write_hf(model, tmp_path / "folder")
    with pytest.raises(PunaError, match="before it gets an adapter"):
        quantize_base(model)
