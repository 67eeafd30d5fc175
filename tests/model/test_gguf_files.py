"""GGUF files: every tensor type, row order, rope rules, and equality with transformers' reading."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.model.checkpoint import read_gguf_metadata, read_weights, write_gguf
from puna.model.gguf_header import STORAGE, open_gguf
from puna.model.gguf_layout import (
    gguf_name,
    llama3_factors,
    metadata_from_spec,
    row_order,
    spec_from_metadata,
)
from puna.model.llama import Llama
from puna.model.spec import LlamaSpec, RopeRule

IDS = torch.arange(3, 27).view(2, 12)
LLAMA3 = RopeRule(
    "llama3", 5e5, factor=8.0, original_max_positions=64, low_freq_factor=1.0, high_freq_factor=4.0
)
YARN = RopeRule("yarn", 1e4, factor=4.0, original_max_positions=64, beta_fast=16.0)
VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2"},
    "wide heads": {"head_dim": 20},
    "one head": {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 48},
}


def half_precise(model: Llama) -> Llama:
    """Weights that float16 holds exactly, vectors drawn too."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            parameter.copy_(parameter.half().float())
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_f16_written_and_read_again_is_the_same_model(
    variant: str, tiny_llama: Callable[..., Llama], tmp_path: Path
) -> None:
    model = half_precise(tiny_llama(**VARIANTS[variant]))
    write_gguf(model, tmp_path / "m.gguf", kind="f16", metadata={"tokenizer.ggml.bos_token_id": 1})
    again = read_weights(tmp_path / "m.gguf")
    assert again.spec.replace(bos_id=None, eos_ids=(), pad_id=None) == model.spec.replace(
        bos_id=None, eos_ids=(), pad_id=None
    )
    assert again.spec.bos_id == 1
    assert torch.equal(again(IDS), model(IDS))


@pytest.mark.parametrize(
    "rule", [LLAMA3, YARN, RopeRule("linear", 1e4, factor=3.0)], ids=lambda rule: rule.kind
)
def test_rope_rules_survive_the_file(
    rule: RopeRule, tiny_llama: Callable[..., Llama], tmp_path: Path
) -> None:
    model = half_precise(tiny_llama(head_dim=64))
    model = Llama(model.spec.replace(rope=rule))
    write_gguf(half_precise(model), tmp_path / "m.gguf", metadata={})
    again = read_weights(tmp_path / "m.gguf")
    torch.testing.assert_close(again(IDS), model(IDS), atol=1e-5, rtol=0)


@settings(max_examples=40, deadline=None)
@given(
    theta=st.sampled_from([1e4, 1e5, 5e5]),
    factor=st.sampled_from([2.0, 8.0, 32.0]),
    original=st.sampled_from([64, 256, 2048, 8192]),
    low=st.sampled_from([1.0, 1.5, 2.0]),
    high=st.sampled_from([2.1, 4.0, 8.0]),
    head_dim=st.sampled_from([12, 16, 64, 128]),
)
def test_a_llama3_rule_is_recovered_from_its_factors(
    theta: float, factor: float, original: int, low: float, high: float, head_dim: int
) -> None:
    from puna.model.gguf_layout import _llama3_rule, llama3_factors

    rule = RopeRule(
        "llama3",
        theta,
        factor=factor,
        original_max_positions=original,
        low_freq_factor=low,
        high_freq_factor=high,
    )
    factors = llama3_factors(rule, head_dim).astype(numpy.float32)
    found = _llama3_rule(theta, head_dim, factors, "test")
    numpy.testing.assert_allclose(llama3_factors(found, head_dim), factors, rtol=3e-5)


def test_llama_3_itself_is_recovered_to_the_letter() -> None:
    from puna.model.gguf_layout import _llama3_rule, llama3_factors

    for factor, head_dim in ((8.0, 128), (32.0, 64)):
        rule = RopeRule(
            "llama3",
            5e5,
            factor=factor,
            original_max_positions=8192,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
        )
        assert (
            _llama3_rule(5e5, head_dim, llama3_factors(rule, head_dim).astype(numpy.float32), "test") == rule
        )


def test_factors_that_follow_no_rule_are_refused() -> None:
    from puna.model.gguf_layout import _llama3_rule

    with pytest.raises(PunaError, match="follows no rope rule"):
        _llama3_rule(1e4, 16, numpy.array([1, 2, 1, 2, 1, 2, 1, 2], dtype=numpy.float32), "test")


def test_every_parameter_has_a_name_of_its_own_and_rows_are_only_permuted(
    tiny_llama: Callable[..., Llama],
) -> None:
    model = tiny_llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=False)
    names = [gguf_name(name) for name, _ in model.named_parameters()]
    assert len(set(names)) == len(names)
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, _ in model.named_parameters():
        module, _, kind = name.rpartition(".")
        assert gguf_name(name) == f"{known.get_name(module)}.{kind}"
    for name, parameter in model.named_parameters():
        order = row_order("llama", model.spec, name)
        assert (order is None) != (".q_proj." in name or ".k_proj." in name)
        if order is not None:
            assert torch.equal(order.sort().values, torch.arange(parameter.shape[0]))
        assert row_order("qwen2", model.spec, name) is None


def test_storage_sizes_are_those_of_the_gguf_package() -> None:
    for number, storage in STORAGE.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, gguf.GGML_QUANT_SIZES[kind]) == (storage.name, (storage.block, storage.size))


def random_blocks(
    kind: gguf.GGMLQuantizationType, shape: tuple[int, int], seed: int
) -> numpy.ndarray[Any, Any]:
    """Bytes of a quantised matrix: any bits are valid but for the float16 scales, which are set."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    drawn = numpy.random.default_rng(seed)
    blocks = drawn.integers(0, 256, (shape[0] * shape[1] // block, size), dtype=numpy.uint8)
    scale = numpy.frombuffer(numpy.float16(0.004).tobytes(), dtype=numpy.uint8)
    at = {"Q4_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.get(kind.name, (0,))
    for offset in at:
        blocks[:, offset : offset + 2] = scale
    return blocks.reshape(shape[0], -1)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K"])
def test_every_tensor_type_reads_as_the_gguf_package_dequantises_it(
    kind: str, tiny_llama: Callable[..., Llama], tmp_path: Path
) -> None:
    model = tiny_llama(
        vocab_size=64, hidden_size=256, intermediate_size=512, head_dim=64, num_hidden_layers=1
    )
    number = gguf.GGMLQuantizationType[kind]
    architecture, described, _ = metadata_from_spec(model.spec, "test")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", architecture)
    for key, value in described.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    expected: dict[str, torch.Tensor] = {}
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        values = parameter.detach().numpy()
        if parameter.dim() == 1:
            writer.add_tensor(gguf_name(name), values)
            expected[name] = parameter.detach()
            continue
        if kind.startswith("Q"):
            stored = random_blocks(number, tuple(parameter.shape), seed)
        else:
            stored = gguf.quantize(values, number)
        writer.add_tensor(gguf_name(name), stored, raw_dtype=number)
        whole = torch.from_numpy(gguf.dequantize(stored, number).copy())
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # The inverse of llama.cpp's converter, as a reshape.
            heads = parameter.shape[0] // 64
            whole = whole.view(heads, 32, 2, 256).transpose(1, 2).reshape(parameter.shape)
        expected[name] = whole
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    again = read_weights(tmp_path / "m.gguf")
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_q8_0_is_within_half_a_step_of_a_float16_scale_and_leaves_vectors_exact(
    tiny_llama: Callable[..., Llama], tmp_path: Path
) -> None:
    model = tiny_llama(hidden_size=64, intermediate_size=80, head_dim=16)
    write_gguf(model, tmp_path / "m.gguf", kind="q8_0", metadata={})
    again = dict(read_weights(tmp_path / "m.gguf").named_parameters())
    kinds = {tensor.name: tensor.storage.name for tensor in open_gguf(tmp_path / "m.gguf").tensors.values()}
    assert kinds["blk.0.attn_q.weight"] == "Q8_0" and kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["blk.0.ffn_down.weight"] == "F16"  # rows of 80 are no multiple of 32
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, again[name])
        elif not name.endswith("down_proj.weight"):
            blocks = parameter.view(-1, 32)
            step = blocks.abs().amax(1, keepdim=True) / 127
            assert ((blocks - again[name].view(-1, 32)).abs() <= 0.57 * step).all()


def test_metadata_round_trip_and_its_refusals(tiny_llama: Callable[..., Llama], tmp_path: Path) -> None:
    model = tiny_llama(vocab_size=3, pad_token_id=0)
    given_metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "Ġb", "é"],
        "tokenizer.ggml.token_type": [1, 1, 3],
        "tokenizer.ggml.scores": [0.5, -1.0, 0.0],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ messages }}",
        "general.name": "",
    }
    write_gguf(model, tmp_path / "m.gguf", metadata=given_metadata)
    read = read_gguf_metadata(tmp_path / "m.gguf")
    assert {key: read[key] for key in given_metadata} == given_metadata
    assert read["general.architecture"] == "llama" and read["general.file_type"] == 1
    with pytest.raises(PunaError, match="exactly one token"):
        write_gguf(model, tmp_path / "n.gguf", metadata={"tokenizer.ggml.tokens": ["a"]})
    with pytest.raises(PunaError, match="cannot be given"):
        write_gguf(model, tmp_path / "n.gguf", metadata={"llama.block_count": 7})
    with pytest.raises(PunaError, match="no GGUF type"):
        write_gguf(model, tmp_path / "n.gguf", metadata={"tokenizer.x": object()})
    with pytest.raises(PunaError, match="did you mean 'q8_0'"):
        write_gguf(model, tmp_path / "n.gguf", kind="q8", metadata={})  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_decoders_llama_cpp_cannot_compute_are_refused(
    tiny_llama: Callable[..., Llama], tmp_path: Path
) -> None:
    spec: LlamaSpec = tiny_llama().spec
    dynamic = RopeRule("dynamic", 1e4, factor=2.0, original_max_positions=spec.max_positions)
    for change in ({"window": 8}, {"rope": dynamic}, {"logit_scale": 0.5}):
        with pytest.raises(PunaError, match="no GGUF form"):
            write_gguf(Llama(spec.replace(**change)), tmp_path / "m.gguf", metadata={})


def test_weights_beyond_float16_are_refused(tiny_llama: Callable[..., Llama], tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = 1e6
    for kind in ("f16", "q8_0"):
        with pytest.raises(PunaError, match=r"layers\.1\.mlp\.up_proj.*too large"):
            write_gguf(model, tmp_path / "m.gguf", kind=kind, metadata={})
    assert not list(tmp_path.iterdir())


def test_without_the_gguf_package_the_error_says_what_to_install(
    tiny_llama: Callable[..., Llama], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = half_precise(tiny_llama(hidden_size=64, head_dim=16))
    write_gguf(model, tmp_path / "f16.gguf", metadata={})
    write_gguf(model, tmp_path / "q8.gguf", kind="q8_0", metadata={})
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert torch.equal(read_weights(tmp_path / "f16.gguf")(IDS), model(IDS))  # plain types need no package
    with pytest.raises(PunaError, match=r"pip install puna\[gguf\]"):
        read_weights(tmp_path / "q8.gguf")
    with pytest.raises(PunaError, match=r"pip install puna\[gguf\]"):
        write_gguf(model, tmp_path / "n.gguf", metadata={})


def test_metadata_of_other_writers_is_understood(tiny_llama: Callable[..., Llama]) -> None:
    spec = tiny_llama(tie_word_embeddings=False).spec
    _, described, _ = metadata_from_spec(spec, "test")
    shapes = {"token_embd.weight": (320, 48), "output.weight": (320, 48), "blk.0.x": (1,), "blk.1.x": (1,)}
    lean = {key: value for key, value in described.items() if "length" not in key or "key_length" in key}
    lean |= {"llama.embedding_length": 48, "llama.feed_forward_length": [96, 96], "llama.context_length": 256}
    lean |= {
        "general.architecture": "llama",
        "llama.rope.scaling.type": "none",
        "llama.rope.scaling.factor": 0.0,
    }
    lean |= {"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 7}
    lean |= {"tokenizer.ggml.padding_token_id": 0xFFFFFFFF}
    read = spec_from_metadata(lean, shapes, None, "test")
    assert read == spec.replace(bos_id=None, eos_ids=(2, 7), pad_id=None)
    for key in ("llama.rope.scaling.factor", "llama.rope.scale_linear"):
        del lean["llama.rope.scaling.factor"]
        lean[key] = 2.0
        assert spec_from_metadata(lean, shapes, None, "test").blocks[0].rope == RopeRule("default", 1e4)
        linear = {name: value for name, value in lean.items() if name != "llama.rope.scaling.type"}
        found = spec_from_metadata(linear, shapes, None, "test").blocks[0].rope
        assert found == RopeRule("linear", 1e4, factor=2.0)
    factors = llama3_factors(
        RopeRule("llama3", 1e4, 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0), 12
    )
    assert spec_from_metadata(lean, shapes, factors, "test").blocks[0].rope.kind == "llama3"
    with pytest.raises(PunaError, match="two rope scalings at once"):
        spec_from_metadata(linear, shapes, factors, "test")


@pytest.mark.smollm
@pytest.mark.slow
def test_smollm_has_the_logits_of_transformers_dequantised_model(smollm_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(
        smollm_path.parent, gguf_file=smollm_path.name, dtype=torch.float32
    ).eval()
    ours = read_weights(smollm_path)
    ids = torch.randint(0, 49152, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert all(
            torch.equal(parameter, theirs.get_parameter(name)) for name, parameter in ours.named_parameters()
        )
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=1e-6)
