"""Hugging Face folders: what puna writes transformers opens with the same logits, and the other way round."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from puna.core.errors import PunaError
from puna.model.checkpoint import read_weights, write_hf
from puna.model.llama import Llama

IDS = torch.arange(3, 27).view(2, 12)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "wide heads": {"head_dim": 20},
    "llama3 rope": {"rope_scaling": LLAMA3},
    "yarn rope": {"rope_scaling": YARN},
    "several stops": {"eos_token_id": [2, 5]},
}


def draw_vectors(model: Llama) -> Llama:
    """Norms and biases that are not one and zero, so that a swapped one shows."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def same_weights(one: Llama, other: Llama) -> bool:
    ours, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_opens_what_puna_writes_with_the_same_logits(
    variant: str, tiny_llama: Callable[..., Llama], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = draw_vectors(tiny_llama(**VARIANTS[variant]))
    write_hf(model, tmp_path / "out")
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert theirs.dtype == torch.float32
    assert theirs.generation_config.eos_token_id == model.spec.to_config()["eos_token_id"]
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), theirs(IDS).logits, atol=1e-5, rtol=0)
    assert not (tmp_path / "out" / "puna.json").exists()


@pytest.mark.parametrize("variant", VARIANTS)
def test_puna_opens_what_transformers_writes_with_the_same_logits(
    variant: str, tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    changed = {**tiny_config, **VARIANTS[variant]}
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(changed.pop("model_type"), **changed)
    ).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model = read_weights(tmp_path / "theirs")
    assert not model.training
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), theirs(IDS).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_written_and_read_again_is_the_same_model(
    dtype: torch.dtype, tiny_llama: Callable[..., Llama], tmp_path: Path
) -> None:
    model = tiny_llama(tie_word_embeddings=False).to(dtype)
    write_hf(model, tmp_path / "out")
    again = read_weights(tmp_path / "out", dtype=dtype)
    assert again.spec == model.spec and same_weights(model, again)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype)[6:]


def test_dtype_is_converted_while_reading(tiny_llama: Callable[..., Llama], tmp_path: Path) -> None:
    model = tiny_llama()
    write_hf(model, tmp_path / "out")
    half = read_weights(tmp_path / "out", dtype=torch.bfloat16)
    assert same_weights(half, model.to(torch.bfloat16))


def test_shards_hold_each_tensor_once_and_open_in_both(
    tiny_llama: Callable[..., Llama], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_llama(tie_word_embeddings=False)
    write_hf(model, tmp_path / "out", shard_bytes=60_000)
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2
    names = [name for shard in shards for name in load_file(shard)]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(parameter.nbytes for parameter in model.parameters())
    assert same_weights(read_weights(tmp_path / "out"), model)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits
        torch.testing.assert_close(model(IDS), theirs, atol=1e-5, rtol=0)


def test_a_spec_that_is_not_uniform_is_kept_by_puna_json(
    tiny_llama: Callable[..., Llama], tmp_path: Path
) -> None:
    import dataclasses

    plain = tiny_llama()
    first, second = plain.spec.blocks
    linear = dataclasses.replace(first, attention="linear", feed_forward="linear")
    changed = dataclasses.replace(first, feed_forward="none", window=5)
    spec = plain.spec.replace(blocks=(changed, linear, second))
    model = Llama(spec)
    write_hf(model, tmp_path / "out")
    assert (tmp_path / "out" / "puna.json").exists()
    again = read_weights(tmp_path / "out")
    assert again.spec == spec
    assert torch.equal(again(IDS), model(IDS))


def test_extra_config_and_overrides(tiny_llama: Callable[..., Llama], tmp_path: Path) -> None:
    model = tiny_llama()
    write_hf(model, tmp_path / "out", extra_config={"puna_note": "kept"})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["puna_note"] == "kept"
    assert read_weights(tmp_path / "out", overrides={"max_positions": 512}).spec.max_positions == 512
    with pytest.raises(PunaError, match="max_positions"):
        read_weights(tmp_path / "out", overrides={"max_position": 512})


def test_writing_replaces_the_folder_whole(tiny_llama: Callable[..., Llama], tmp_path: Path) -> None:
    model = tiny_llama()
    write_hf(model, tmp_path / "out", shard_bytes=60_000)
    write_hf(model, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_old_rotary_buffers_are_left_aside_and_said(
    tiny_llama: Callable[..., Llama], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama()
    write_hf(model, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    save_file(tensors, file)
    assert same_weights(read_weights(tmp_path / "out"), model)
    assert "2 rotary buffers" in caplog.text


def test_an_equal_head_of_a_tied_model_is_dropped_and_a_different_one_unties(
    tiny_llama: Callable[..., Llama], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_llama()
    write_hf(model, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    assert read_weights(tmp_path / "out").spec.tied and not caplog.text
    tensors["lm_head.weight"] += 0.5
    save_file(tensors, file, metadata={"format": "pt"})
    untied = read_weights(tmp_path / "out")
    assert not untied.spec.tied and "untied" in caplog.text
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits
        torch.testing.assert_close(untied(IDS), theirs, atol=1e-5, rtol=0)


def test_a_model_with_an_adapter_is_not_written_as_a_whole(
    tiny_llama: Callable[..., Llama], tmp_path: Path
) -> None:
    from puna.model.adapters import LoraSettings, add_lora

    model = tiny_llama()
    add_lora(model, LoraSettings(), seed=0)
    with pytest.raises(PunaError, match="carries an adapter"):
        write_hf(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
