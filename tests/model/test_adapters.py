"""LoRA: neutral at the start, seeded, merged and disabled exactly, the same in peft both ways."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.model.adapter_files import read_adapter, write_adapter
from puna.model.adapters import (
    PROJECTIONS,
    LoraSettings,
    adapter_disabled,
    adapter_merged,
    add_lora,
    merge_lora,
)
from puna.model.checkpoint import read_weights, write_hf
from puna.model.llama import Llama

IDS = torch.arange(3, 27).view(2, 12)
Build = Callable[..., Llama]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """peft and transformers warn about each other's old names; that is not ours to hear."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        output = model(IDS)
    return output if isinstance(output, torch.Tensor) else output.logits


def train_a_little(model: Any, seed: int = 1) -> None:
    """Move everything that is not frozen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def weights_of(model: Llama) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@settings(max_examples=10, deadline=None)
@given(
    r=st.integers(1, 9),
    alpha=st.sampled_from([1.0, 16.0, 7.5]),
    target=st.sets(st.sampled_from(PROJECTIONS), min_size=1).map(lambda names: tuple(sorted(names))),
    rslora=st.booleans(),
    dora=st.booleans(),
    full=st.sampled_from([(), ("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head"), ("norm",)]),
    tied=st.booleans(),
)
def test_a_new_adapter_changes_no_bit_of_the_logits(
    r: int, alpha: float, target: tuple[str, ...], rslora: bool, dora: bool, full: tuple[str, ...], tied: bool
) -> None:
    model = build_tiny(tied)
    before = logits(model)
    add_lora(model, LoraSettings(r, alpha, 0.0, target, rslora, full, dora), seed=0)
    if not dora:  # DoRA divides by a norm it has just computed: equal up to rounding
        assert torch.equal(logits(model), before)
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)


def build_tiny(tied: bool) -> Llama:
    from puna.core.seeds import torch_generator
    from puna.model.spec import BlockSpec, LlamaSpec

    block = BlockSpec(heads=4, kv_heads=2, head_dim=12, width=96)
    return Llama(LlamaSpec(320, 48, (block, block), tied=tied), generator=torch_generator(0, "tiny"))


def test_only_what_is_asked_for_is_trained_and_counted(tiny_llama: Build) -> None:
    model = tiny_llama()
    report = add_lora(model, LoraSettings(r=4, target=("q_proj", "v_proj")), seed=0)
    in_layer = 4 * (48 + 48) + 4 * (48 + 24)
    assert report.trainable == 2 * in_layer
    assert report.total == model.spec.parameter_count() + 2 * in_layer
    assert report.share == report.trainable / report.total
    assert len(report.names) == 8 and all(".lora_" in name for name in report.names)
    assert f"{report.trainable:,}" in str(report)
    model(IDS).sum().backward()
    touched = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert touched == set(report.names)


def test_tied_embedding_and_head_are_one_tensor_trained_once(tiny_llama: Build) -> None:
    size = 320 * 48
    for full in (("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head")):
        model = tiny_llama()
        lora = add_lora(tiny_llama(), LoraSettings(r=4), seed=0).trainable
        report = add_lora(model, LoraSettings(r=4, full=full), seed=0)
        assert report.trainable == lora + size
        assert "model.embed_tokens.weight" in report.names and not hasattr(model, "lm_head")
        model(IDS).sum().backward()
        assert model.model.embed_tokens.weight.grad is not None
    untied = tiny_llama(tie_word_embeddings=False)
    assert (
        add_lora(untied, LoraSettings(r=4, full=("embed_tokens", "lm_head")), seed=0).trainable
        == lora + 2 * size
    )


def test_names_are_matched_whole_and_a_miss_names_the_nearest(tiny_llama: Build) -> None:
    model = tiny_llama()
    report = add_lora(model, LoraSettings(target=("layers.1.self_attn.q_proj",), full=("norm",)), seed=0)
    assert {name.split(".lora_")[0] for name in report.names} == {
        "model.layers.1.self_attn.q_proj",
        "model.norm.weight",  # and not every "...layernorm"
    }
    for change, near in (
        ({"target": ("q_proj", "vproj")}, "v_proj"),
        ({"full": ("embed_token",)}, "embed_tokens"),
    ):
        fresh = tiny_llama()
        with pytest.raises(PunaError, match=f"did you mean '{near}'"):
            add_lora(fresh, LoraSettings(**change), seed=0)  # type: ignore[arg-type]
        assert all(parameter.requires_grad for parameter in fresh.parameters()) and fresh.adapter is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 0}, "rank"),
        ({"alpha": 0.0}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"target": ()}, "needs a target"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PunaError, match=message):
        LoraSettings(**change)


def test_settings_that_contradict_each_other_are_refused(tiny_llama: Build) -> None:
    with pytest.raises(PunaError, match="and be trained in full"):
        add_lora(tiny_llama(), LoraSettings(full=("layers.0.mlp.up_proj",)), seed=0)
    with pytest.raises(PunaError, match=r"full=\('lm_head',\)"):
        add_lora(tiny_llama(tie_word_embeddings=False), LoraSettings(target=("lm_head",)), seed=0)
    model = tiny_llama()
    add_lora(model, LoraSettings(), seed=0)
    with pytest.raises(PunaError, match="adapter already"):
        add_lora(model, LoraSettings(), seed=0)
    for use in (merge_lora, lambda plain: adapter_merged(plain).__enter__()):
        with pytest.raises(PunaError, match="no adapter"):
            use(tiny_llama())


def test_the_draw_depends_on_seed_and_name_alone_and_leaves_global_state(tiny_llama: Build) -> None:
    def drawn(seed: int, target: tuple[str, ...]) -> torch.Tensor:
        model = tiny_llama()
        add_lora(model, LoraSettings(target=target), seed=seed)
        return dict(model.named_parameters())["model.layers.1.mlp.up_proj.lora_A.default.weight"]

    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first = drawn(0, PROJECTIONS)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(12)
    assert torch.equal(drawn(0, ("up_proj",)), first)
    assert not torch.equal(drawn(1, PROJECTIONS), first)
    assert first.abs().max() <= 48**-0.5 < 1.2 * first.abs().max()  # Kaiming uniform with a = sqrt(5)


def test_adapter_parameters_take_the_dtype_asked_for(tiny_llama: Build) -> None:
    for asked, expected in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        model = tiny_llama().to(torch.bfloat16)
        report = add_lora(model, LoraSettings(), seed=0, dtype=asked)
        assert {dict(model.named_parameters())[name].dtype for name in report.names} == {expected}
        assert model(IDS).dtype == torch.float32 and model.dtype == torch.bfloat16


def test_dropout_is_off_in_evaluation_and_on_in_training(tiny_llama: Build) -> None:
    model = tiny_llama().eval()
    add_lora(model, LoraSettings(dropout=0.5), seed=0)
    train_a_little(model)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


@pytest.mark.parametrize("change", [{}, {"rslora": True}, {"dora": True}], ids=["lora", "rslora", "dora"])
@pytest.mark.parametrize("tied", [True, False])
def test_merging_keeps_the_logits_and_leaves_plain_layers(
    change: dict[str, Any], tied: bool, tiny_llama: Build
) -> None:
    model = tiny_llama(tie_word_embeddings=tied).eval()
    names = [name for name, _ in model.named_parameters()]
    before = logits(model)
    add_lora(model, LoraSettings(full=("embed_tokens", "lm_head"), **change), seed=0)
    train_a_little(model)
    adapted = logits(model)
    assert not torch.allclose(adapted, before, atol=1e-3)
    merge_lora(model)
    torch.testing.assert_close(logits(model), adapted, atol=1e-5, rtol=0)
    assert [name for name, _ in model.named_parameters()] == names
    assert {type(module) for name, module in model.named_modules() if name.endswith("_proj")} == {
        torch.nn.Linear
    }
    assert all(parameter.requires_grad for parameter in model.parameters())
    add_lora(model, LoraSettings(), seed=1)  # and it can be adapted again


def test_a_bf16_merge_is_rounded_once(tiny_llama: Build) -> None:
    model = tiny_llama().to(torch.bfloat16)
    add_lora(model, LoraSettings(r=2, alpha=4.0), seed=0, dtype=torch.float32)
    train_a_little(model)
    layer = model.model.layers[0].mlp.up_proj
    exact = (
        layer.base_layer.weight.float() + 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    )
    merge_lora(model)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, exact.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_for_a_while_and_back_bit_for_bit(dtype: torch.dtype, tiny_llama: Build) -> None:
    model = tiny_llama().to(dtype)
    add_lora(model, LoraSettings(), seed=0)
    train_a_little(model)
    weights, adapted = weights_of(model), logits(model)
    with adapter_merged(model):
        torch.testing.assert_close(
            logits(model), adapted, atol=1e-5 if dtype == torch.float32 else 0.05, rtol=0
        )
        assert not torch.equal(
            weights_of(model)["model.layers.0.self_attn.q_proj.base_layer.weight"],
            weights["model.layers.0.self_attn.q_proj.base_layer.weight"],
        )
    after = weights_of(model)
    assert weights.keys() == after.keys() and all(torch.equal(weights[name], after[name]) for name in weights)
    assert torch.equal(logits(model), adapted)
    with pytest.raises(RuntimeError), adapter_merged(model):
        raise RuntimeError
    assert torch.equal(logits(model), adapted)


@pytest.mark.parametrize("tied", [True, False])
def test_disabled_for_a_while_it_is_the_base_and_back(tied: bool, tiny_llama: Build) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    before = logits(model)
    settings_ = LoraSettings(full=("embed_tokens", "lm_head", "norm"))
    trained = set(add_lora(model, settings_, seed=0, keep_base=True).names)
    train_a_little(model)
    adapted, weights = logits(model), weights_of(model)
    with adapter_disabled(model):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), adapted)
    assert all(torch.equal(weights[name], value) for name, value in weights_of(model).items())
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained


def test_disabling_without_the_base_values_says_how_to_keep_them(tiny_llama: Build) -> None:
    model = tiny_llama()
    add_lora(model, LoraSettings(full=("embed_tokens",)), seed=0)
    with pytest.raises(PunaError, match="keep_base=True"), adapter_disabled(model):
        pass


FULL = [
    (),
    ("embed_tokens",),
    ("embed_tokens", "lm_head"),
    ("lm_head",),
    ("norm", "layers.0.input_layernorm"),
]


@pytest.mark.parametrize("change", [{}, {"rslora": True}, {"dora": True}], ids=["lora", "rslora", "dora"])
@pytest.mark.parametrize("full", FULL, ids="+".join)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_peft_opens_what_puna_writes_with_the_same_logits(
    change: dict[str, Any], full: tuple[str, ...], tied: bool, tiny_llama: Build, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = tiny_llama(tie_word_embeddings=tied).eval()
    write_hf(model, tmp_path / "base")
    add_lora(model, LoraSettings(full=full, **change), seed=0)
    train_a_little(model)
    write_adapter(model, tmp_path / "adapter", base_name=str(tmp_path / "base"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=0)
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(logits(model), logits(merged), atol=1e-5, rtol=0)

    again = read_weights(tmp_path / "adapter", open_base=read_weights)
    assert torch.equal(logits(again), logits(model))
    assert again.spec == model.spec


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("ensure", [False, True], ids=["loose", "ensured"])
@pytest.mark.parametrize(
    "modules", [None, ["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"], ["model.norm"]]
)
def test_puna_opens_what_peft_writes_with_the_same_logits(
    tied: bool, ensure: bool, modules: list[str] | None, tiny_llama: Build, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = tiny_llama(tie_word_embeddings=tied).eval()
    write_hf(model, tmp_path / "base")
    config = LoraConfig(
        r=3, target_modules=["q_proj", "up_proj"], modules_to_save=modules, ensure_weight_tying=ensure
    )
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    train_a_little(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    report = read_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(model), logits(theirs.eval()), atol=1e-5, rtol=0)
    assert report.trainable and not any(parameter.requires_grad for parameter in model.parameters())
    merge_lora(model)
    write_hf(model, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(theirs), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True, "r": 5},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 32}},
        {"layers_to_transform": [1]},
        {"target_modules": r".*layers\.0.*(q_proj|down_proj)"},
        {"lora_bias": True},
        {"init_lora_weights": "gaussian"},
        {"target_modules": "all-linear"},
    ],
    ids=str,
)
def test_options_of_peft_that_are_honoured(
    options: dict[str, Any], tiny_llama: Build, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = tiny_llama(attention_bias=True, mlp_bias=True).eval()
    write_hf(model, tmp_path / "base")
    config = LoraConfig(**{"target_modules": ["q_proj", "up_proj"], **options})
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    train_a_little(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    read_adapter(model, tmp_path / "adapter", trainable=True)
    torch.testing.assert_close(logits(model), logits(theirs.eval()), atol=1e-5, rtol=0)
    write_adapter(model, tmp_path / "again", base_name="base")
    fresh = tiny_llama(attention_bias=True, mlp_bias=True).eval()
    read_adapter(fresh, tmp_path / "again")
    assert torch.equal(logits(fresh), logits(model))


def test_a_training_goes_on_from_a_read_adapter(tiny_llama: Build, tmp_path: Path) -> None:
    model = tiny_llama()
    names = add_lora(model, LoraSettings(full=("embed_tokens",)), seed=0).names
    train_a_little(model)
    write_adapter(model, tmp_path / "adapter", base_name="base")
    again = tiny_llama()
    before = logits(again)
    assert read_adapter(again, tmp_path / "adapter", trainable=True, keep_base=True).names == names
    assert {name for name, parameter in again.named_parameters() if parameter.requires_grad} == set(names)
    with adapter_disabled(again):
        assert torch.equal(logits(again), before)


def test_the_config_is_plain_and_always_the_same(tiny_llama: Build, tmp_path: Path) -> None:
    model = tiny_llama()
    add_lora(model, LoraSettings(r=4, alpha=8.0, dropout=0.05, full=("embed_tokens", "lm_head")), seed=0)
    write_adapter(model, tmp_path / "adapter", base_name="some/base")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(PROJECTIONS)
    assert config["modules_to_save"] == ["embed_tokens", "lm_head"] and config["ensure_weight_tying"] is True
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0.05)
    assert config["base_model_name_or_path"] == "some/base" and config["task_type"] == "CAUSAL_LM"


@pytest.fixture
def written(tiny_llama: Build, tmp_path: Path) -> Path:
    """A folder with an adapter that trains the embedding too."""
    model = tiny_llama()
    add_lora(model, LoraSettings(r=2, full=("embed_tokens",)), seed=0)
    write_adapter(model, tmp_path / "adapter", base_name="base")
    return tmp_path / "adapter"


def spoil(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


EMBEDDING = "base_model.model.model.embed_tokens.weight"
DOWN = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(DOWN), r"up_proj\.lora_A\.weight' is missing"),
        (
            lambda tensors: tensors.update({DOWN: torch.zeros(3, 48)}),
            r"another shape(.|\n)*\[3, 48\](.|\n)*\[2, 48\]",
        ),
        (lambda tensors: tensors[DOWN].fill_(float("nan")), "NaN"),
        (lambda tensors: tensors[EMBEDDING].fill_(float("inf")), "infinite"),
        (
            lambda tensors: tensors.update({"base_model.model.model.other.weight": torch.zeros(2)}),
            "no parameter",
        ),
        (lambda tensors: tensors.update({EMBEDDING: torch.zeros(321, 48)}), r"another shape(.|\n)*321"),
        (
            lambda tensors: tensors.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(2, 48)}),
            "embedding or the head",
        ),
        (
            lambda tensors: tensors.update(
                {DOWN.replace("layers.0", "layers.7"): torch.zeros(2, 48)},
            ),
            "no parameter",
        ),
    ],
)
def test_a_spoilt_adapter_is_refused_and_the_model_left_as_it_was(
    change: Callable[[dict[str, torch.Tensor]], object], message: str, written: Path, tiny_llama: Build
) -> None:
    spoil(written, change)
    model = tiny_llama()
    before = weights_of(model)
    with pytest.raises(PunaError, match=message):
        read_adapter(model, written)
    after = weights_of(model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert model.adapter is None and model.spec.tied and not hasattr(model, "lm_head")
    add_lora(model, LoraSettings(), seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "only LoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"bias": "all"}, "'bias'"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"an_option_of_tomorrow": 3}, "an_option_of_tomorrow"),
        ({"target_modules": ["nothing_like_it"]}, "cannot place"),
        ({"r": "many"}, "adapter"),
    ],
)
def test_adapters_that_would_be_computed_wrongly_are_refused(
    changes: dict[str, Any], message: str, written: Path, tiny_llama: Build
) -> None:
    path = written / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(PunaError, match=message):
        read_adapter(tiny_llama(), written)


def test_pickled_adapters_and_nameless_bases_are_refused(written: Path, tiny_llama: Build) -> None:
    with pytest.raises(PunaError, match="which model it belongs to"):
        read_weights(written)
    (written / "adapter_model.safetensors").rename(written / "adapter_model.bin")
    with pytest.raises(PunaError, match="pickle"):
        read_adapter(tiny_llama(), written)
    (written / "adapter_model.bin").unlink()
    with pytest.raises(PunaError, match="file not found"):
        read_adapter(tiny_llama(), written)
