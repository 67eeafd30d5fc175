"""Bad checkpoints: each gets its one message, and a damaged file never anything but a PunaError."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from puna.core.errors import PunaError
from puna.model.checkpoint import (
    check_vocabulary,
    detect,
    read_gguf_metadata,
    read_weights,
    write_gguf,
    write_hf,
)
from puna.model.llama import Llama

Build = Callable[..., Llama]
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tiny_llama: Build, tmp_path: Path) -> Path:
    write_hf(tiny_llama(), tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def gguf_file(tiny_llama: Build, tmp_path: Path) -> Path:
    write_gguf(tiny_llama(), tmp_path / "m.gguf", metadata={"tokenizer.ggml.model": "gpt2"})
    return tmp_path / "m.gguf"


def refused(path: Path, message: str) -> PunaError:
    with pytest.raises(PunaError, match=message) as caught:
        read_weights(path)
    assert str(path.name) in str(caught.value) or str(path.parent) in str(caught.value)
    return caught.value


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_each_form_is_detected_by_content_and_the_decision_can_be_printed(
    folder: Path, gguf_file: Path, tmp_path: Path
) -> None:
    assert detect(folder).kind == "hf" and "config.json" in str(detect(folder))
    renamed = gguf_file.rename(tmp_path / "model.safetensors")
    assert detect(renamed).kind == "gguf" and "GGUF" in str(detect(renamed))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert detect(tmp_path / "adapter").kind == "adapter"


def test_what_is_no_checkpoint_is_said(folder: Path, gguf_file: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no such file or folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "empty")
    (tmp_path / "notes.txt").write_text("hello")
    refused(tmp_path / "notes.txt", "not a checkpoint")
    assert "the folder that holds the file" in str(refused(folder / "model.safetensors", "not a checkpoint"))
    assert str(gguf_file) in str(refused(tmp_path, "no checkpoint in this folder"))
    (folder / "config.json").unlink()
    assert "config.json" in str(refused(folder, "no checkpoint in this folder"))


def test_folders_without_weights_and_with_strange_ones(folder: Path) -> None:
    weights = (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    assert "consolidated" in str(refused(folder, "no weights in this folder"))
    weights.unlink()
    refused(folder, "no weights in this folder")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused_and_never_opened(name: str, folder: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (pytest.fail, ("the pickle was opened",))

    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    assert "safetensors" in str(refused(folder, "pickle"))
    refused(folder / name, "pickle")
    (folder / "config.json").unlink()
    refused(folder, "pickle")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda tensors: tensors.pop(UP), [f"'{UP}' is missing", "[96, 48]"]),
        (
            lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.1." in name],
            ["layers.1", "(and 8 more)"],
        ),
        (
            lambda tensors: tensors.update({"model.extra": torch.zeros(3)}),
            ["'model.extra' is no parameter", "[3]"],
        ),
        (lambda tensors: tensors.update({UP: torch.zeros(96, 47)}), [UP, "[96, 47]", "[96, 48]"]),
        (lambda tensors: tensors[UP].view(-1)[7].fill_(float("nan")), [UP, "NaN or infinite", "1 of 4,608"]),
        (lambda tensors: tensors[UP].fill_(float("-inf")), [UP, "4,608 of 4,608"]),
        (lambda tensors: tensors.update({UP: tensors[UP].to(torch.int8)}), [UP, "I8", "no plain weights"]),
        (lambda tensors: tensors.update({UP: tensors[UP].to(torch.float8_e4m3fn)}), [UP, "F8"]),
        (lambda tensors: tensors.clear(), ["more layers than"]),
    ],
)
def test_wrong_tensors_are_named_with_what_was_found_and_expected(
    change: Callable[[dict[str, torch.Tensor]], object], parts: list[str], folder: Path
) -> None:
    change_tensors(folder, change)
    error = str(refused(folder, ".*"))
    assert all(part in error for part in parts), error


def test_numbers_too_large_for_float16_say_so(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors[UP].fill_(1e6))
    assert read_weights(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(PunaError, match="bfloat16 if its numbers are too large"):
        read_weights(folder, dtype=torch.float16)
    with pytest.raises(PunaError, match="floating-point dtype"):
        read_weights(folder, dtype=torch.int8)


def test_a_finite_tensor_whose_sum_overflows_is_fine(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors[UP].fill_(1e38))
    assert read_weights(folder).model.layers[1].mlp.up_proj.weight[0, 0] == 1e38


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]}, "gpt_neox"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_hidden_layers": 3}, "missing"),
        ({"num_hidden_layers": 1}, "no parameter"),
        ({"num_hidden_layers": 10**12}, "more layers than"),
        ({"vocab_size": 321}, "another shape"),
        ({"hidden_size": 2**40, "intermediate_size": 2**40}, "impossibly large"),
        ({"tie_word_embeddings": False}, "'lm_head.weight' is missing"),
    ],
)
def test_configs_that_do_not_fit_are_refused(changes: dict[str, Any], message: str, folder: Path) -> None:
    change_config(folder, **changes)
    refused(folder, message)


def test_shards_must_be_where_the_index_says(tiny_llama: Build, tmp_path: Path) -> None:
    def fresh() -> tuple[Path, dict[str, Any]]:
        write_hf(tiny_llama(), tmp_path / "s", shard_bytes=60_000)
        return tmp_path / "s", json.loads((tmp_path / "s" / "model.safetensors.index.json").read_text())

    def with_index(index: Any, message: str) -> None:
        (tmp_path / "s" / "model.safetensors.index.json").write_text(json.dumps(index))
        refused(tmp_path / "s", message)

    folder, index = fresh()
    (folder / index["weight_map"][UP]).unlink()
    refused(folder, "file not found")
    folder, index = fresh()
    moved = {**index["weight_map"], UP: index["weight_map"]["model.embed_tokens.weight"]}
    with_index({"weight_map": moved}, "disagree")
    with_index({"weight_map": {**index["weight_map"], UP: "../model.safetensors"}}, "no shard of this folder")
    with_index({"weight_map": {**index["weight_map"], UP: "pytorch_model.bin"}}, "pickle")
    with_index({"weight_map": [1]}, "not an index")
    with_index([], "not an index")


def test_nan_weights_are_not_written(tiny_llama: Build, tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(PunaError, match=r"model\.norm\.weight.*NaN"):
        write_hf(model, tmp_path / "hf")
    with pytest.raises(PunaError, match=r"model\.norm\.weight.*NaN"):
        write_gguf(model, tmp_path / "m.gguf", metadata={})
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_larger_than_the_embedding_is_refused(tiny_llama: Build) -> None:
    check_vocabulary(tiny_llama(), 300)
    check_vocabulary(tiny_llama(), 320)
    with pytest.raises(PunaError, match=r"larger than the embedding(.|\n)*321(.|\n)*320"):
        check_vocabulary(tiny_llama(), 321)


# --- GGUF headers made by hand ---


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def header(*values: bytes, tensors: tuple[bytes, ...] = (), version: int = 3) -> bytes:
    counts = struct.pack("<IQQ", version, len(tensors), len(values))
    body = b"GGUF" + counts + b"".join(values) + b"".join(tensors)
    return body + bytes(-len(body) % 32) + bytes(64)


def tensor(name: str = "t", shape: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


LLAMA = text("general.architecture") + struct.pack("<I", 8) + text("llama")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF", "runs past the end"),
        (header(version=1), "version"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(16), "big-endian"),
        (header(struct.pack("<Q", 2**62) + b"key"), "runs past the end"),
        (header(text("k") + struct.pack("<I", 99)), "unknown type"),
        (header(text("k") + struct.pack("<IIQ", 9, 4, 2**61)), "runs past the end"),
        (header(text("k") + struct.pack("<IIQ", 9, 8, 2**61)), "runs past the end"),
        (header(text("k") + struct.pack("<IIQ", 9, 9, 1)), "array of an unknown type"),
        (header(struct.pack("<Q", 1) + b"\xff" + struct.pack("<II", 4, 1)), "not UTF-8"),
        (header(LLAMA, LLAMA), "twice"),
        (header(text("split.count") + struct.pack("<IH", 2, 3)), "one part of several"),
        (header(text("general.alignment") + struct.pack("<II", 4, 3)), "power of two"),
        (header(tensors=(tensor(), tensor())), "twice"),
        (header(tensors=(tensor(shape=(1,) * 5),)), "5 dimensions"),
        (header(tensors=(tensor(kind=99),)), "type puna cannot read"),
        (header(tensors=(tensor(shape=(33,), kind=8),)), "impossible shape"),
        (header(tensors=(tensor(shape=(0,)),)), "impossible shape"),
        (header(tensors=(tensor(shape=(2**40, 2**40)),)), "runs past the end"),
        (header(tensors=(tensor(offset=2**63),)), "runs past the end"),
        (header(), "general.architecture None"),
        (header(text("general.architecture") + struct.pack("<I", 8) + text("gemma")), "gemma"),
        (header(LLAMA, text("llama.expert_count") + struct.pack("<II", 4, 8)), "mixture of experts"),
        (header(LLAMA), r"llama\.block_count"),
        (header(LLAMA, text("llama.block_count") + struct.pack("<II", 4, 2**31)), "number of layers"),
    ],
)
def test_a_gguf_that_lies_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    refused(tmp_path / "m.gguf", message)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama.block_count", 3, "number of layers"),
        ("llama.embedding_length", 64, "another shape"),
        ("llama.embedding_length", 2**31, "another shape|impossibly large"),
        ("llama.attention.head_count", 0, "heads must be positive"),
        ("llama.attention.head_count_kv", 3, "key-value heads"),
        ("llama.attention.key_length", 24, "differs from the head dimension"),
        ("llama.rope.dimension_count", 6, "differs from the head dimension"),
        ("llama.feed_forward_length", 64, "another shape"),
    ],
)
def test_gguf_metadata_that_does_not_fit_the_tensors_is_refused(
    key: str, value: int, message: str, gguf_file: Path
) -> None:
    content = bytearray(gguf_file.read_bytes())
    at = content.index(key.encode() + struct.pack("<I", 4)) + len(key) + 4
    content[at : at + 4] = struct.pack("<I", value)
    gguf_file.write_bytes(content)
    refused(gguf_file, message)


def test_nan_in_a_gguf_is_named(gguf_file: Path) -> None:
    content = bytearray(gguf_file.read_bytes())
    content[-4:] = b"\xff\xff\xff\xff"
    gguf_file.write_bytes(content)
    refused(gguf_file, "NaN")


# --- damage at random ---

DAMAGE = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def damaged(whole: bytes, cut: float, flips: list[tuple[float, int]], reach: int) -> bytes:
    """``whole`` cut at a share of its length, with bits flipped within its first ``reach`` bytes."""
    content = bytearray(whole[: int(len(whole) * cut)])
    for place, bit in flips:
        if content:
            content[int(place * min(len(content), reach))] ^= 1 << bit
    return bytes(content)


CUTS = st.one_of(st.just(1.0), st.floats(0, 1, exclude_max=True))
FLIPS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), max_size=4)


def opens_or_is_refused(path: Path) -> None:
    try:
        model = read_weights(path)
    except PunaError as error:
        assert str(error)
    else:
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@DAMAGE
@given(cut=CUTS, flips=FLIPS)
def test_a_damaged_gguf_opens_or_is_refused(
    cut: float, flips: list[tuple[float, int]], gguf_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damaged(gguf_file.read_bytes(), cut, flips, reach=2600))
    opens_or_is_refused(path)
    try:
        read_gguf_metadata(path)
    except PunaError as error:
        assert str(error)


@DAMAGE
@given(cut=CUTS, flips=FLIPS)
def test_a_damaged_safetensors_folder_opens_or_is_refused(
    cut: float, flips: list[tuple[float, int]], folder: Path
) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    try:
        (folder / "model.safetensors").write_bytes(damaged(whole, cut, flips, reach=2400))
        opens_or_is_refused(folder)
    finally:
        (folder / "model.safetensors").write_bytes(whole)


@DAMAGE
@given(cut=CUTS, flips=FLIPS)
def test_a_damaged_config_opens_or_is_refused(
    cut: float, flips: list[tuple[float, int]], folder: Path
) -> None:
    whole = (folder / "config.json").read_bytes()
    try:
        (folder / "config.json").write_bytes(damaged(whole, cut, flips, reach=10**6))
        opens_or_is_refused(folder)
    finally:
        (folder / "config.json").write_bytes(whole)
