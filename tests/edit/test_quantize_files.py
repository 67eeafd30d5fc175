"""What was quantised keeps its levels in the engine, in packed checkpoints and in GGUF, and in the stages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from puna.core.errors import PunaError
from puna.core.stage import Context, get_stage, validate
from puna.data.corpus import write_corpus
from puna.data.ledger import Ledger
from puna.edit.quantize.checks import engine_differences
from puna.edit.quantize.quantize import quantize
from puna.edit.quantize.settings import Gptq, Nf4, Quantization, Uniform
from puna.model.group_rounding import rounded_copy
from puna.model.hf import read_hf, write_hf
from puna.model.llama import Llama
from puna.model.native.weights import DOWN, GATE_UP, QKV
from puna.model.packed_files import pack_columns, unpack_columns
from puna.model.steppers import make_stepper
from puna.text import pretrained

Build = Callable[..., Any]
WIDE = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}


def quantised(tiny_llama: Build, bits: int = 4, group: int | None = 32, symmetric: bool = False) -> Llama:
    model: Llama = tiny_llama(**WIDE).eval()
    grid = Uniform(bits=bits, group=group, symmetric=symmetric)
    quantize(model, Quantization(grid=grid, rounding=Gptq()), torch.arange(4, 260).view(4, 64))
    return model


def same_weights(one: Llama, other: Llama) -> bool:
    theirs = dict(other.named_parameters())
    return all(torch.equal(weight, theirs[name]) for name, weight in one.named_parameters())


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_words_hold_every_level(bits: int) -> None:
    levels = torch.arange(7 * 45).view(7, 45).remainder(2**bits).to(torch.uint8)
    words = pack_columns(levels, bits)
    assert words.dtype == torch.int32
    assert words.shape == (7, -(-45 * bits // 32))
    assert torch.equal(unpack_columns(words, bits, 45), levels)


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"),
    [(4, 32, False), (4, 64, True), (3, 32, False), (2, None, False), (8, None, True), (8, 32, True)],
)
def test_a_packed_checkpoint_gives_the_same_bits_again(
    bits: int, group: int | None, symmetric: bool, tiny_llama: Build, tmp_path: Path
) -> None:
    model = quantised(tiny_llama, bits, group, symmetric)
    write_hf(model, tmp_path / "packed", packed=True)
    again = read_hf(tmp_path / "packed", dtype=torch.float32, device="cpu")
    assert same_weights(model, again)
    for name, grid in model.grids.items():
        theirs = again.grids[name]
        assert torch.equal(theirs.step, grid.step) and torch.equal(theirs.zero, grid.zero)
        assert (theirs.bits, theirs.symmetric) == (grid.bits, grid.symmetric)
    # Read and written once more, nothing changes: even from bfloat16 the levels are the same.
    half = read_hf(tmp_path / "packed", dtype=torch.bfloat16, device="cpu")
    write_hf(half, tmp_path / "twice", packed=True)
    assert all(
        torch.equal(grid.step, half.grids[name].step)
        for name, grid in read_hf(tmp_path / "twice", dtype=torch.float32, device="cpu").grids.items()
    )
    weight = dict(read_hf(tmp_path / "twice", dtype=torch.float32, device="cpu").named_parameters())
    assert all(torch.equal(weight[name], dict(model.named_parameters())[name]) for name in model.grids)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (3, None), (8, None)])
def test_transformers_opens_a_packed_checkpoint(
    bits: int, group: int | None, tiny_llama: Build, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    model = quantised(tiny_llama, bits, group, symmetric=True)
    write_hf(model, tmp_path / "packed", packed=True)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids), opened(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("bits", "group", "symmetric"), [(4, 32, False), (3, None, False), (2, 64, True)])
def test_compressed_tensors_decodes_the_same_weights(
    bits: int, group: int | None, symmetric: bool, tiny_llama: Build, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from safetensors.torch import load_file

    model = quantised(tiny_llama, bits, group, symmetric)
    write_hf(model, tmp_path / "packed", packed=True)
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    scheme = QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    for name in model.grids:
        module = name.removesuffix(".weight")
        start = f"{module}."
        parts = {key.removeprefix(start): each for key, each in tensors.items() if key.startswith(start)}
        # It multiplies in the dtype of the steps, which are stored in half precision: float32 rounds nothing.
        parts["weight_scale"] = parts["weight_scale"].float()
        found = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
        assert torch.equal(found, model.get_parameter(name))


def test_integers_for_rounded_activations_open_in_transformers(tiny_llama: Build, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    from puna.edit.quantize.calibration import rounded_activations
    from puna.edit.quantize.methods import setting

    model: Llama = tiny_llama(**WIDE).eval()
    quantize(model, setting("smooth-8").quantization, torch.arange(4, 260).view(4, 64))
    write_hf(model, tmp_path / "packed", packed=True)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    ids = torch.arange(4, 40)[None]
    with torch.no_grad(), rounded_activations(model, 8):
        torch.testing.assert_close(model(ids), opened(ids).logits, atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "kernels"),
    [
        (4, 64, False, "int4"),
        (3, 32, False, "int4"),
        (2, None, False, "int4"),
        (8, None, True, "int8"),
        (4, 32, True, "int8"),
    ],
)
def test_the_engine_multiplies_with_the_very_weights(
    bits: int, group: int | None, symmetric: bool, kernels: Any, tiny_llama: Build
) -> None:
    model = quantised(tiny_llama, bits, group, symmetric)
    assert engine_differences(model, kernels) == 0
    stepper: Any = make_stepper(model, quantize=kernels, cache_tokens=16, kernels="native")
    layer: Any = model.model.layers[1]
    assert torch.equal(stepper.stored_row(1, QKV, 70), layer.self_attn.k_proj.weight[6])
    assert torch.equal(stepper.stored_row(1, GATE_UP, 16 + 3), layer.mlp.up_proj.weight[3])
    rounded = rounded_copy(model, kernels)  # what the plain kernels compute with
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(rounded.get_parameter(name), model.get_parameter(name))


def test_weights_that_left_their_grid_are_rounded_as_ever(tiny_llama: Build) -> None:
    model, plain = quantised(tiny_llama, 4, 64), quantised(tiny_llama, 4, 64)
    plain.grids = {}
    with torch.no_grad():
        for each in (model, plain):
            each.model.layers[0].mlp.down_proj.weight.mul_(1.01).add_(1e-3)
    steppers: list[Any] = [make_stepper(each, quantize="int4", cache_tokens=16) for each in (model, plain)]
    rows = [stepper.stored_row(0, DOWN, 5) for stepper in steppers]
    assert torch.equal(rows[0], rows[1])
    weight = model.model.layers[0].mlp.down_proj.weight
    assert not torch.equal(rows[0], weight[5])
    with pytest.raises(PunaError, match="cannot be packed"):
        write_hf(model, Path("nowhere"), packed=True)


def test_grids_of_bfloat16_weights_are_kept_too(tiny_llama: Build) -> None:
    model = quantised(tiny_llama, 4, 32)
    exact = model.model.layers[0].mlp.down_proj.weight.detach().clone()
    stepper: Any = make_stepper(model.bfloat16(), quantize="int4", cache_tokens=16, kernels="native")
    assert torch.equal(stepper.stored_row(0, DOWN, 7), exact[7])


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "storage"),
    [(4, 32, True, "Q4_0"), (4, 64, False, "Q4_1"), (2, 32, False, "Q4_1"), (8, None, True, "Q8_0")],
)
def test_gguf_blocks_hold_the_grid(
    bits: int,
    group: int | None,
    symmetric: bool,
    storage: str,
    tiny_llama: Build,
    tiny_tokenizer: Any,
    tmp_path: Path,
) -> None:
    from puna.model.gguf_header import open_gguf

    model = quantised(tiny_llama, bits, group, symmetric)
    model.tokenizer = tiny_tokenizer
    file = pretrained.save(model, tmp_path / "model.gguf", "gguf", kind="packed")
    tensors = open_gguf(file).tensors
    found = {each.storage.name for name, each in tensors.items() if name.endswith("ffn_down.weight")}
    assert found == {storage}
    again = dict(pretrained.load(file, dtype="float32").named_parameters())
    for name in model.grids:
        torch.testing.assert_close(again[name], model.get_parameter(name), atol=0, rtol=3e-7)


def test_a_packed_folder_is_converted_to_gguf_level_by_level(
    tiny_llama: Build, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    from puna.run.convert import convert

    model = quantised(tiny_llama, 4, 32)
    model.tokenizer = tiny_tokenizer
    pretrained.save(model, tmp_path / "packed", packed=True)
    file, _ = convert(tmp_path / "packed", tmp_path / "model.gguf", kind="packed")
    again = pretrained.load(file, dtype="float32")
    for name in model.grids:
        torch.testing.assert_close(again.get_parameter(name), model.get_parameter(name), atol=0, rtol=3e-7)


def test_llama_cpp_opens_a_packed_gguf(tiny_llama: Build, tiny_tokenizer: Any, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    model = quantised(tiny_llama, 4, 32)
    model.tokenizer = tiny_tokenizer
    file = pretrained.save(model, tmp_path / "model.gguf", "gguf", kind="packed")
    opened = llama_cpp.Llama(str(file), n_ctx=64, logits_all=True, verbose=False)
    ids = list(range(4, 36))
    opened.eval(ids)
    theirs = torch.tensor(opened.scores[: len(ids)])
    with torch.no_grad():
        ours = model(torch.tensor([ids]))[0]
    # llama.cpp rounds activations to 8 bits and the embedding to half precision.
    assert torch.cosine_similarity(ours, theirs, dim=-1).min() > 0.99


def test_nothing_on_a_grid_is_not_packed(tiny_llama: Build, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_llama(**WIDE)
    quantize(model, Quantization(grid=Nf4()))
    model.tokenizer = tiny_tokenizer
    with pytest.raises(PunaError, match="grids of one kind"):
        pretrained.save(model, tmp_path / "packed", packed=True)
    with pytest.raises(PunaError, match="no matrix of this model lies on a grid"):
        pretrained.save(model, tmp_path / "model.gguf", "gguf", kind="packed")
    assert not list(tmp_path.iterdir())


def test_groups_that_do_not_divide_a_width_are_not_packed(tiny_llama: Build, tmp_path: Path) -> None:
    with pytest.raises(PunaError, match="cannot be packed") as error:
        write_hf(quantised(tiny_llama, 4, 96), tmp_path / "packed", packed=True)
    assert "divides" in str(error.value)


def _change(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.update(quant_method="gptq"),
        lambda config: config.update(format="marlin-24"),
        lambda config: config["config_groups"].update(more=config["config_groups"]["group_0"]),
        lambda config: config["config_groups"]["group_0"]["weights"].update(actorder="group"),
        lambda config: config["config_groups"]["group_0"]["weights"].update(type="float"),
        lambda config: config["config_groups"]["group_0"].pop("weights"),
    ],
)
def test_packings_that_are_not_known_are_refused(
    change: Callable[[dict[str, Any]], object], tiny_llama: Build, tmp_path: Path
) -> None:
    write_hf(quantised(tiny_llama), tmp_path / "packed", packed=True)
    _change(tmp_path / "packed", change)
    with pytest.raises(PunaError, match="quantised checkpoint is not read"):
        read_hf(tmp_path / "packed", dtype=torch.float32, device="cpu")


def _corpus(folder: Path, name: str, texts: int = 60) -> str:
    words = [*["the", "cat", "and", "that", "mat", "went", "in", "again"], "end", "then", "other", "sat"]
    rows = [
        {
            "id": f"{name}-{row}",
            "source": "made",
            "language": "en",
            "text": " ".join(words[(row * 7 + step * (row % 5 + 1)) % len(words)] for step in range(60)),
        }
        for row in range(texts)
    ]
    ledger = Ledger()
    tally = ledger.step("made", "rows")
    for _ in rows:
        tally.keep()
    write_corpus(folder / name, "documents", rows, provenance=[], ledger=ledger)
    return str(folder / name)


@pytest.fixture
def source(tiny_llama: Build, tiny_tokenizer: Any, tmp_path: Path) -> str:
    model = tiny_llama(**WIDE)
    model.tokenizer = tiny_tokenizer
    return str(pretrained.save(model, tmp_path / "exact"))


def _run(name: str, parameters: dict[str, Any], inputs: dict[str, Any], out: Path) -> Any:
    stage = get_stage(name)
    return stage.function(Context(name, out, inputs), validate(stage.parameters, parameters, where="test"))


def test_the_stage_writes_what_it_counted(source: str, tmp_path: Path) -> None:
    inputs = {"model": source, "corpus": _corpus(tmp_path, "pages")}
    parameters = {
        "quantization": {"grid": {"kind": "uniform", "bits": 4, "group": 32}, "rounding": {"kind": "gptq"}},
        "calibration_rows": 4,
        "calibration_tokens": 64,
    }
    outcome = _run("quantize", parameters, inputs, tmp_path / "a")
    again = pretrained.load(outcome.outputs["model"], dtype="float32")
    assert outcome.metrics["bits"] == 4 + (16 + 4) / 32
    assert len(again.grids) == outcome.metrics["on_a_grid"] == 14
    dense = _run("quantize", parameters | {"format": "dense"}, inputs, tmp_path / "b")
    assert same_weights(again, pretrained.load(dense.outputs["model"], dtype="float32"))
    gguf = _run("quantize", parameters | {"format": "gguf"}, inputs, tmp_path / "c")
    assert gguf.outputs["model"].suffix == ".gguf"
    with pytest.raises(PunaError, match="no text to make them from"):
        _run("quantize", parameters, {"model": source}, tmp_path / "d")


def test_names_of_the_study_are_settings_of_the_stage(source: str, tmp_path: Path) -> None:
    outcome = _run("quantize", {"quantization": "rtn-4"}, {"model": source}, tmp_path / "a")
    assert outcome.metrics["nominal_bits"] == 4
    for name in ("rtn-5", "qlora-4"):
        with pytest.raises(PunaError, match=name):
            validate(get_stage("quantize").parameters, {"quantization": name}, where="test")


def test_the_table_measures_each_setting_once_and_goes_on(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from puna.edit.quantize import study

    corpus, other = _corpus(tmp_path, "pages"), _corpus(tmp_path, "others")
    parameters = {
        "settings": ["rtn-4", "gptq-2", "smooth-4", "db-2"],
        "calibration_rows": 4,
        "calibration_tokens": 64,
        "evaluation_bytes": 600,
        "task_items": 8,
        "decoded_tokens": 4,
        "training_rows": 4,
        "training_tokens": 32,
        "training_steps": 2,
        "lora_rank": 8,
    }
    inputs = {"model": source, "corpus": corpus, "texts": {"own": corpus, "other": other}}
    first = _run("low_bit_table", parameters, inputs, tmp_path / "run")
    for name in ("exact", "rtn-4", "gptq-2", "smooth-4", "db-2"):
        assert first.metrics[f"{name}.bpb.other"] > 0 and 0 <= first.metrics[f"{name}.task"] <= 1
        assert first.metrics[f"{name}.rate"] > 0
    assert first.metrics["rtn-4.engine_bits"] == 4 and first.metrics["db-2.engine_bits"] == 16
    assert first.metrics["smooth-4.bpb.own"] != first.metrics["rtn-4.bpb.own"]

    def never(*_: object) -> None:
        raise AssertionError("a row was measured again")

    monkeypatch.setattr(study, "_row", never)
    assert _run("low_bit_table", parameters, inputs, tmp_path / "run").metrics == first.metrics
    with pytest.raises(PunaError, match="gptq-7"):
        validate(get_stage("low_bit_table").parameters, {"settings": ["gptq-7"]}, where="test")


def test_the_checks_hold_on_a_small_model(source: str, tmp_path: Path) -> None:
    inputs = {"model": source, "corpus": _corpus(tmp_path, "pages")}
    parameters: dict[str, Any] = {
        "calibration_rows": 4,
        "calibration_tokens": 64,
        "layers": [1],
        "shift_points": 3,
        "shares": [0, 0.3],
    }
    found = _run("low_bit_checks", parameters, inputs, tmp_path / "run").metrics
    assert found["gptq_without_moments"] == found["nf4_zero"] == 0
    assert found["gptq_against_ldlq"] < 0.01
    assert found["rotation"] < 1e-4
    assert found["packed_differ.int4"] == found["engine_differs.int8"] == 0
    assert found["entropy_least_gain"] >= 0
    assert found["salient_falls"] == 1
    assert not (tmp_path / "run" / "packed").exists()
    with pytest.raises(PunaError, match="a layer to look at"):
        _run("low_bit_checks", parameters | {"layers": [9]}, inputs, tmp_path / "b")


def test_too_little_text_is_told(source: str, tmp_path: Path) -> None:
    corpus = _corpus(tmp_path, "few", 3)
    with pytest.raises(PunaError, match="too small to calibrate on"):
        _run("quantize", {"quantization": "gptq-4"}, {"model": source, "corpus": corpus}, tmp_path / "a")
