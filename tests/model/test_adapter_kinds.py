"""LoRA, rsLoRA and DoRA, on a plain base and on one in NF4, against peft on transformers' Llama."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from puna.core.errors import PunaError
from puna.core.seeds import torch_generator
from puna.model.adapter_files import read_adapter, write_adapter
from puna.model.adapters import (
    LoraSettings,
    adapter_disabled,
    adapter_merged,
    add_lora,
    lora_layers,
    merge_lora,
    quantize_for,
)
from puna.model.checkpoint import write_hf
from puna.model.llama import Llama
from puna.model.nf4 import dequantize_base, quantised_layers, quantize_base

IDS = torch.arange(3, 27).view(2, 12)
Build = Callable[..., Llama]
KINDS: dict[str, dict[str, Any]] = {"lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """peft and transformers warn about each other's old names; that is not ours to hear."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def logits(model: Any) -> torch.Tensor:
    output = model(IDS)
    return output if isinstance(output, torch.Tensor) else output.logits


def look(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return logits(model).clone()


def train_a_little(model: Any) -> None:
    generator = torch_generator(1, "trained")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Of a loss of the logits, for each trained tensor, by the name it has in the decoder."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(logits(model).log_softmax(-1)[..., 5].mean(), trained)
    short = [name.removeprefix("base_model.model.") for name in names]
    return dict(zip(short, found, strict=True))


@pytest.mark.parametrize("base", ["as_is", "nf4"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_peft(
    kind: str, base: str, tiny_llama: Build, tmp_path: Path
) -> None:
    """get_peft_model on transformers' LlamaForCausalLM; for a base in NF4 on its decoded weights."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    change = KINDS[kind]
    targets = ("q_proj", "v_proj", "up_proj", "down_proj")
    decoded = tiny_llama().eval()
    if base == "nf4":
        quantize_base(decoded)
        dequantize_base(decoded)
    write_hf(decoded, tmp_path / "base")
    config = LoraConfig(
        r=5,
        lora_alpha=12,
        target_modules=list(targets),
        use_rslora=kind == "rslora",
        use_dora=kind == "dora",
        task_type="CAUSAL_LM",
    )
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config).eval()
    ours = tiny_llama().eval()
    add_lora(ours, LoraSettings(5, 12.0, target=targets, base=base, **change), seed=0)
    train_a_little(ours)
    parameters = {name.removeprefix("base_model.model."): p for name, p in theirs.named_parameters()}
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if parameter.requires_grad:
                parameters[name].copy_(parameter)
    torch.testing.assert_close(look(ours), look(theirs), atol=1e-5, rtol=0)
    assert not torch.allclose(look(ours), look(decoded), atol=1e-3)
    mine, peft_s = gradients(ours), gradients(theirs)
    assert mine.keys() == peft_s.keys()
    assert len(mine) == 2 * 4 * (3 if kind == "dora" else 2)
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, peft_s[name], atol=1e-5, rtol=0)
        assert gradient.abs().max() > 1e-4, name  # a bound that means something


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_on_nf4_changes_no_bit_of_the_quantised_base(
    kind: str, dtype: torch.dtype, tiny_llama: Build
) -> None:
    model = tiny_llama().to(dtype)
    plain = look(model)
    settings = LoraSettings(r=3, base="nf4", **KINDS[kind])
    assert quantize_for(model, settings) == 14 and quantize_for(model, settings) == 0
    quantised = look(model)
    add_lora(model, settings, seed=0)
    assert torch.equal(look(model), quantised) and not torch.equal(quantised, plain)
    train_a_little(model)
    adapted = look(model)
    assert not torch.equal(adapted, quantised)
    with adapter_disabled(model):
        assert torch.equal(look(model), quantised)
    assert torch.equal(look(model), adapted)


@pytest.mark.parametrize("target", [("q_proj", "down_proj"), None], ids=["some", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_on_nf4_the_model_is_plain_and_computes_the_same(
    kind: str, target: tuple[str, ...] | None, tiny_llama: Build, tmp_path: Path
) -> None:
    """Layers without an adapter are decoded too: what is left is a plain model that can be written."""
    model = tiny_llama(attention_bias=True).eval()
    names = [*model.state_dict()]
    aimed = {} if target is None else {"target": target}
    add_lora(model, LoraSettings(r=3, base="nf4", **aimed, **KINDS[kind]), seed=0)
    train_a_little(model)
    adapted = look(model)
    with adapter_merged(model):
        torch.testing.assert_close(look(model), adapted, atol=1e-5, rtol=0)
        assert len(list(quantised_layers(model))) == 14 - len(list(lora_layers(model)))
    assert len(list(quantised_layers(model))) == 14
    assert torch.equal(look(model), adapted)
    merge_lora(model)
    torch.testing.assert_close(look(model), adapted, atol=1e-5, rtol=0)
    assert [*model.state_dict()] == names and all(p.requires_grad for p in model.parameters())
    write_hf(model, tmp_path / "merged")


@pytest.mark.parametrize("base", ["as_is", "nf4"])
@pytest.mark.parametrize("kind", KINDS)
def test_merging_and_taking_back_in_float32(kind: str, base: str, tiny_llama: Build) -> None:
    """peft's own unmerge is within 1e-5 of where it was; ``adapter_merged`` is there to the bit."""
    model = tiny_llama().eval()
    add_lora(model, LoraSettings(r=3, base=base, **KINDS[kind]), seed=0)
    train_a_little(model)
    adapted = look(model)
    with adapter_merged(model):
        merged = look(model)
    torch.testing.assert_close(merged, adapted, atol=1e-5, rtol=0)
    assert torch.equal(look(model), adapted)
    if base == "nf4":
        return
    for _, layer in lora_layers(model):
        layer.merge()
    torch.testing.assert_close(look(model), adapted, atol=1e-5, rtol=0)
    for _, layer in lora_layers(model):
        layer.unmerge()
    torch.testing.assert_close(look(model), adapted, atol=1e-5, rtol=0)


def test_a_merge_on_nf4_is_rounded_once(tiny_llama: Build) -> None:
    model = tiny_llama().to(torch.bfloat16)
    add_lora(model, LoraSettings(r=2, alpha=4.0, base="nf4"), seed=0, dtype=torch.float32)
    train_a_little(model)
    layer = model.model.layers[0].mlp.up_proj
    decoded = layer.base_layer.decoded(torch.float32)
    exact = decoded + 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    merge_lora(model)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, exact.to(torch.bfloat16))
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_trained_on_nf4_opens_in_peft(kind: str, tiny_llama: Build, tmp_path: Path) -> None:
    """Its files are those of any LoRA; on the decoded base and on that in NF4 it gives the same logits."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    decoded = tiny_llama().eval()
    quantize_base(decoded)
    dequantize_base(decoded)
    write_hf(decoded, tmp_path / "decoded")
    model = tiny_llama().eval()
    settings = LoraSettings(r=3, full=("embed_tokens",), base="nf4", **KINDS[kind])
    add_lora(model, settings, seed=0)
    train_a_little(model)
    write_adapter(model, tmp_path / "adapter", base_name=str(tmp_path / "decoded"))
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "decoded")
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(look(model), look(theirs), atol=1e-5, rtol=0)
    again = tiny_llama().eval()
    quantize_base(again)
    read_adapter(again, tmp_path / "adapter")
    assert torch.equal(look(again), look(model))


def test_a_target_that_matches_nothing_names_the_nearest_on_either_base(tiny_llama: Build) -> None:
    for base in ("as_is", "nf4"):
        model = tiny_llama()
        with pytest.raises(PunaError, match="did you mean 'gate_proj'"):
            add_lora(model, LoraSettings(target=("gate_prj",), base=base), seed=0)
        assert model.adapter is None and not list(quantised_layers(model))
    quantize_base(model)
    with pytest.raises(PunaError, match="did you mean 'gate_proj'"):
        add_lora(model, LoraSettings(target=("gate_prj",)), seed=0)
    with pytest.raises(PunaError, match="did you mean 'nf4'"):
        LoraSettings(base="nf3")


def test_modules_trained_in_full_are_not_held_in_nf4(tiny_llama: Build) -> None:
    settings = LoraSettings(target=("q_proj",), full=("layers.0.mlp", "norm"), base="nf4")
    model = tiny_llama()
    report = add_lora(model, settings, seed=0)
    held = {name for name, _ in quantised_layers(model)}
    assert len(held) == 11 and not any("layers.0.mlp" in name for name in held)
    assert {name for name in report.names if ".lora_" not in name} == {
        "model.norm.weight",
        *(f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    }
    assert report.total == model.spec.parameter_count() + 2 * 8 * (48 + 48)
    late = tiny_llama()
    quantize_base(late)
    with pytest.raises(PunaError, match="cannot be trained in full"):
        add_lora(late, settings, seed=0)
