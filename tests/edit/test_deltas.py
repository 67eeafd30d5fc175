"""Deltas over a base: full and of low rank, in parts, on disk, and refused on another base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from puna.core.errors import PunaError
from puna.core.files import read_json, write_json
from puna.core.seeds import torch_generator
from puna.edit.merging.delta import DeltaSet
from puna.model.adapter_files import write_adapter
from puna.model.adapters import LoraSettings, add_lora
from puna.model.checkpoint import write_hf
from puna.model.llama import Llama
from puna.model.tensor_writer import TensorWriter
from puna.text import pretrained, stored_weights
from puna.text.stored_weights import Weights


@pytest.fixture
def pair(tiny_llama: Callable[..., Any], tmp_path: Path) -> tuple[Path, Path]:
    """Folders of a base and of a model that was trained from it."""
    base, child = tiny_llama(), tiny_llama()
    with torch.no_grad():
        for number, weight in enumerate(child.parameters()):
            weight.add_(0.01 * torch.randn(weight.shape, generator=torch_generator(number, "child")))
    write_hf(base, tmp_path / "base")
    write_hf(child, tmp_path / "child")
    return tmp_path / "base", tmp_path / "child"


def _lora(model: Llama, folder: Path, base: Path, **settings: Any) -> Llama:
    add_lora(model, LoraSettings(**{"r": 3, "alpha": 7.0, **settings}), seed=0)
    with torch.no_grad():
        for number, weight in enumerate(w for w in model.parameters() if w.requires_grad):
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch_generator(number, "lora")))
    write_adapter(model, folder, base_name=str(base))
    return model


def test_a_delta_is_the_difference_whatever_the_parts(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, child = Weights.open(pair[0]), Weights.open(pair[1])
    one, other = (load_file(folder / "model.safetensors") for folder in pair)
    taken = DeltaSet.between(base, child)
    for size in (stored_weights.PART, 100):
        monkeypatch.setattr(stored_weights, "PART", size)
        assert all(torch.equal(taken.tensor(name), other[name] - one[name]) for name in one)
    assert set(taken.shapes) == set(one)


def test_a_model_minus_itself_is_zero(pair: tuple[Path, Path]) -> None:
    base = Weights.open(pair[0])
    taken = DeltaSet.between(base, Weights.open(pair[0]))
    assert not any(taken.tensor(name).any() for name in taken.shapes)


@pytest.mark.parametrize("settings", [{}, {"rslora": True}, {"full": ("embed_tokens", "norm")}])
def test_an_adapter_is_the_delta_of_its_merged_model(
    tiny_llama: Callable[..., Any], pair: tuple[Path, Path], tmp_path: Path, settings: dict[str, Any]
) -> None:
    _lora(tiny_llama(), tmp_path / "adapter", pair[0], **settings)
    base = Weights.open(pair[0])
    taken = DeltaSet.of_adapter(base, tmp_path / "adapter")
    opened = Weights.open(tmp_path / "adapter")
    merged = dict(pretrained.load_merged(tmp_path / "adapter").named_parameters())
    start = dict(pretrained.load(pair[0]).named_parameters())
    for name in taken.shapes:
        got = torch.cat([opened.part(name, *place) for place in stored_weights.parts_of(opened.shapes[name])])
        torch.testing.assert_close(got.view_as(merged[name]), merged[name].detach(), atol=1e-6, rtol=1e-6)
        expected = (merged[name] - start[name]).detach()
        torch.testing.assert_close(taken.tensor(name), expected, atol=1e-6, rtol=0)
    between = DeltaSet.between(base, opened)
    assert between.changed == taken.changed  # of low rank still, not subtracted
    assert ("model.embed_tokens.weight" in taken.changed) == bool(settings.get("full"))


def test_rows_of_a_product_are_those_of_the_whole(
    tiny_llama: Callable[..., Any], pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _lora(tiny_llama(), tmp_path / "adapter", pair[0])
    taken = DeltaSet.of_adapter(Weights.open(pair[0]), tmp_path / "adapter")
    name = "model.layers.0.mlp.down_proj.weight"
    whole = taken.tensor(name)
    monkeypatch.setattr(stored_weights, "PART", 300)
    torch.testing.assert_close(taken.tensor(name), whole, atol=1e-7, rtol=0)
    assert torch.linalg.matrix_rank(whole) == 3


def test_adapters_that_are_no_product_are_refused(
    tiny_llama: Callable[..., Any], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    _lora(tiny_llama(), tmp_path / "dora", pair[0], dora=True)
    with pytest.raises(PunaError, match="no difference of low rank"):
        DeltaSet.of_adapter(Weights.open(pair[0]), tmp_path / "dora")


def test_a_written_delta_comes_back_on_its_base_alone(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base = Weights.open(pair[0])
    taken = DeltaSet.between(base, Weights.open(pair[1]))
    taken.write(tmp_path / "delta")
    back = DeltaSet.read(base, tmp_path / "delta")
    assert all(torch.equal(back.tensor(name), taken.tensor(name)) for name in taken.shapes)
    with pytest.raises(PunaError, match="another base"):
        DeltaSet.read(Weights.open(pair[1]), tmp_path / "delta")
    write_json(tmp_path / "delta" / "delta.json", {"base": "?"})
    with pytest.raises(PunaError, match="not a delta's description"):
        DeltaSet.read(base, tmp_path / "delta")


def test_an_adapter_of_another_base_is_refused(
    tiny_llama: Callable[..., Any], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    _lora(tiny_llama(), tmp_path / "adapter", pair[0])
    with pytest.raises(PunaError, match="belongs to another base"):
        DeltaSet.of_adapter(Weights.open(pair[1]), tmp_path / "adapter")
    write_hf(tiny_llama(), tmp_path / "copy")  # the same weights elsewhere
    assert DeltaSet.of_adapter(Weights.open(tmp_path / "copy"), tmp_path / "adapter").changed


def test_a_fingerprint_is_of_weights_and_not_of_files(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_llama()
    write_hf(model, tmp_path / "whole")
    write_hf(model, tmp_path / "shards", shard_bytes=60_000)
    model.tokenizer = tiny_tokenizer
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.half())
    write_hf(model, tmp_path / "rounded")
    pretrained.save(model, tmp_path / "f16.gguf", "gguf")
    places = {name: Weights.open(tmp_path / name).fingerprint for name in ("whole", "shards", "rounded")}
    assert places["whole"] == places["shards"] != places["rounded"]
    assert Weights.open(tmp_path / "f16.gguf").fingerprint == places["rounded"]


def test_a_tied_head_counts_once(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_llama()
    write_hf(model, tmp_path / "tied")
    tensors = load_file(tmp_path / "tied" / "model.safetensors")
    from safetensors.torch import save_file

    twice = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    (tmp_path / "twice").mkdir()
    write_json(tmp_path / "twice" / "config.json", read_json(tmp_path / "tied" / "config.json"))
    save_file(twice, tmp_path / "twice" / "model.safetensors")
    base, child = Weights.open(tmp_path / "tied"), Weights.open(tmp_path / "twice")
    assert "lm_head.weight" not in DeltaSet.between(base, child).shapes


def test_models_of_other_shapes_are_refused(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    write_hf(tiny_llama(), tmp_path / "base")
    write_hf(tiny_llama(num_hidden_layers=3), tmp_path / "deep")
    write_hf(tiny_llama(vocab_size=330), tmp_path / "words")
    base = Weights.open(tmp_path / "base")
    with pytest.raises(PunaError, match="not the same in both") as error:
        DeltaSet.between(base, Weights.open(tmp_path / "deep"))
    assert "model.layers.2" in str(error.value)
    with pytest.raises(PunaError, match="tokenizer_source"):
        DeltaSet.between(base, Weights.open(tmp_path / "words"))
    writer = TensorWriter(tmp_path, {"a": (2,)}, torch.float16)
    with pytest.raises(PunaError, match="NaN or infinite"), writer:
        writer.add("a", torch.tensor([1.0, 1e6]))


def test_base_plus_residual_is_the_model(pair: tuple[Path, Path]) -> None:
    base, child = Weights.open(pair[0]), Weights.open(pair[1])
    taken = DeltaSet.between(base, child)
    for name, shape in child.shapes.items():
        count = torch.Size(shape).numel()
        residual = taken.part(name, 0, count)
        expected = child.part(name, 0, count)
        torch.testing.assert_close(base.part(name, 0, count) + residual, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("limit", [1e9, 3000])
def test_written_in_parts_is_what_safetensors_writes(
    tiny_llama: Callable[..., Any], tmp_path: Path, limit: float
) -> None:
    tensors = {name: weight.detach() for name, weight in tiny_llama().named_parameters()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    with TensorWriter(tmp_path, shapes, torch.bfloat16, shard_bytes=limit) as writer:
        for name, tensor in tensors.items():
            for part in tensor.reshape(-1).split(500):
                writer.add(name, part)
    files = sorted(tmp_path.glob("*.safetensors"))
    back = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert {name: tensor.shape for name, tensor in back.items()} == {n: t.shape for n, t in tensors.items()}
    assert all(torch.equal(back[name], tensor.bfloat16()) for name, tensor in tensors.items())
    assert (len(files) > 1) == (limit < 1e9) == (tmp_path / "model.safetensors.index.json").exists()


def test_parts_of_a_gguf_are_its_tensors(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_llama(hidden_size=64, head_dim=16, intermediate_size=96)
    model.tokenizer = tiny_tokenizer
    file = pretrained.save(model, tmp_path / "q8.gguf", "gguf", kind="q8_0")
    opened = Weights.open(file)
    whole = dict(pretrained.load(file).named_parameters())
    for name, shape in opened.shapes.items():
        assert torch.equal(opened.part(name, 5, 40), whole[name].detach().reshape(-1)[5:40]), (name, shape)
