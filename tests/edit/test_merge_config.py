"""mergekit's files: read unchanged, resolved as mergekit resolves them, mistakes told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from puna.core.errors import PunaError
from puna.core.seeds import torch_generator
from puna.edit.merging.config import ModelRef, parse_config, read_config
from puna.edit.merging.plan import Plan, make_plan
from puna.model.checkpoint import read_weights, write_hf
from puna.text import pretrained
from tests.invariants import kit

SLERP = """
slices:
  - sources:
      - model: {base}
        layer_range: [0, 2]
      - model: {one}
        layer_range: [0, 2]
merge_method: slerp
base_model: {base}
parameters:
  t:
    - filter: self_attn
      value: [0, 1]
    - filter: mlp
      value: [1, 0]
    - value: 0.5
dtype: bfloat16
"""
WITH_WEIGHTS = ("linear", "task_arithmetic", "ties", "ties_global", "dare_linear", "dare_ties")
TIES = """
models:
  - model: {base}
  - model: {one}
    parameters:
      density: [1, 0.5]
      weight: 0.5
  - model: {two}
    parameters: {{density: 0.5, weight: [0, 0.3]}}
merge_method: ties
base_model: {base}
parameters: {{normalize: true, int8_mask: true, lambda: 1e-1}}
dtype: float16
"""


@pytest.fixture
def folders(tiny_llama: Callable[..., Any], tmp_path: Path) -> dict[str, str]:
    """A base and two models trained from it, by name."""
    found = {}
    for number, name in enumerate(("base", "one", "two")):
        model = tiny_llama()
        with torch.no_grad():
            for place, weight in enumerate(model.parameters()):
                noise = torch.randn(weight.shape, generator=torch_generator(place, name))
                weight.add_(0.02 * number * noise)
        write_hf(model, tmp_path / name)
        found[name] = str(tmp_path / name)
    return found


def _plan(text: str, folders: dict[str, str], tmp_path: Path) -> Plan:
    (tmp_path / "merge.yml").write_text(text.format(**folders))
    return make_plan(read_config(tmp_path / "merge.yml"), seed=0)


def _whole(plan: Plan) -> dict[str, torch.Tensor]:
    parts: dict[str, list[torch.Tensor]] = {}
    for name, part in plan.merged():
        parts.setdefault(name, []).append(part)
    return {name: torch.cat(found).view(plan.shapes[name]) for name, found in parts.items()}


def test_gradients_and_filters_are_read_layer_by_layer(folders: dict[str, str], tmp_path: Path) -> None:
    plan = _plan(SLERP, folders, tmp_path)
    found = {job.name: job.settings["t"] for job in plan.jobs}
    assert found["model.layers.0.self_attn.q_proj.weight"] == 0
    assert found["model.layers.1.self_attn.q_proj.weight"] == 1
    assert found["model.layers.0.mlp.up_proj.weight"] == 1
    assert found["model.layers.1.input_layernorm.weight"] == 0.5
    merged = _whole(plan)
    for name, folder in (("model.layers.0.self_attn.q_proj.weight", "base"),):
        weights = dict(read_weights(folders[folder]).named_parameters())
        assert torch.equal(merged[name], weights[name])
    one = dict(read_weights(folders["one"]).named_parameters())
    assert torch.equal(merged["model.layers.0.mlp.up_proj.weight"], one["model.layers.0.mlp.up_proj.weight"])


def test_settings_of_a_model_come_before_those_of_all(folders: dict[str, str], tmp_path: Path) -> None:
    plan = _plan(TIES, folders, tmp_path)
    settings = {job.name: job.settings for job in plan.jobs}
    last = settings["model.layers.1.mlp.up_proj.weight"]
    assert last["density"] == [0.5, 0.5] and last["weight"] == [0.5, 0.3]
    assert settings["model.embed_tokens.weight"]["density"] == [1.0, 0.5]  # outside the layers: the beginning
    assert last["lambda"] == 0.1 and last["normalize"] is True and last["rescale"] is False
    assert plan.config.dtype == "float16"


def test_layers_can_be_stacked(folders: dict[str, str], tmp_path: Path) -> None:
    text = """
merge_method: passthrough
slices:
  - sources: [{{model: {one}, layer_range: [0, 2]}}]
  - sources: [{{model: {two}, layer_range: [1, 2]}}]
"""
    plan = _plan(text, folders, tmp_path)
    merged = _whole(plan)
    assert len(plan.spec.blocks) == 3
    two = dict(read_weights(folders["two"]).named_parameters())
    own, name = "model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"
    assert torch.equal(merged[name], two[own]) and torch.equal(
        merged["model.norm.weight"], two["model.norm.weight"]
    )
    assert plan.write(tmp_path / "deep", torch.float32) == tmp_path / "deep"
    assert len(read_weights(tmp_path / "deep").spec.blocks) == 3


@kit.neutral("a merge that takes one model whole")
def _() -> tuple[kit.Forward, kit.Forward]:
    import tempfile

    model = kit.decoder(kit.spec_of())
    other = kit.decoder(kit.spec_of(), seed=1)
    with tempfile.TemporaryDirectory() as folder:
        write_hf(other, Path(folder) / "base")
        write_hf(model, Path(folder) / "model")
        data = {
            "merge_method": "dare_ties",
            "base_model": f"{folder}/base",
            "models": [{"model": f"{folder}/model", "parameters": {"weight": 1, "density": 1}}],
        }
        make_plan(parse_config(data, where="test"), seed=0).write(Path(folder) / "out", torch.float32)
        return model, read_weights(Path(folder) / "out")


@pytest.mark.parametrize(
    "method", ["linear", "task_arithmetic", "ties", "ties_global", "dare_linear", "dare_ties"]
)
@pytest.mark.parametrize("taken", ["base", "one"])
def test_a_model_taken_whole_keeps_its_bits(folders: dict[str, str], method: str, taken: str) -> None:
    weights = {"base": float(taken == "base"), "one": float(taken == "one"), "two": 0.0}
    names = ("base", "one", "two") if method == "linear" else ("one", "two")
    data = {
        "merge_method": method,
        **({} if method == "linear" else {"base_model": folders["base"]}),
        "models": [{"model": folders[name], "parameters": {"weight": weights[name]}} for name in names],
    }
    merged = _whole(make_plan(parse_config(data, where="test"), seed=0))
    expected = dict(read_weights(folders[taken]).named_parameters())
    for name, tensor in merged.items():
        assert torch.equal(tensor.view(torch.int32), expected[name].detach().view(torch.int32))


def test_random_merges_are_the_same_each_time_and_differ_by_seed(folders: dict[str, str]) -> None:
    data = {
        "merge_method": "dare_linear",
        "base_model": folders["base"],
        "models": [{"model": folders["one"], "parameters": {"weight": 1, "density": 0.5}}],
    }
    config = parse_config(data, where="test")
    first, again, other = (_whole(make_plan(config, seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_global_and_per_tensor_trimming_differ_by_name(folders: dict[str, str]) -> None:
    kept = {}
    for method in ("ties", "ties_global"):
        data = {
            "merge_method": method,
            "base_model": folders["base"],
            "models": [{"model": folders["one"], "parameters": {"weight": 1, "density": 0.3}}],
        }
        merged = _whole(make_plan(parse_config(data, where="test"), seed=0))
        base = dict(read_weights(folders["base"]).named_parameters())
        changed = {name: int((tensor != base[name]).sum()) for name, tensor in merged.items()}
        kept[method] = {name: count / merged[name].numel() for name, count in changed.items()}
        total = sum(changed.values()) / sum(tensor.numel() for tensor in merged.values())
        assert abs(total - 0.3) < 0.01
    assert all(abs(share - 0.3) < 0.02 for share in kept["ties"].values())
    assert max(kept["ties_global"].values()) - min(kept["ties_global"].values()) > 0.02


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"merge_method": "tise"}, "did you mean 'ties'"),
        ({"base_modle": "x"}, "did you mean 'base_model'"),
        ({"parameters": {"densty": 0.5}}, "did you mean 'density'"),
        ({"parameters": {"weight": 1, "density": 1.5}}, "at least 0 and at most 1"),
        ({"parameters": {"weight": 1, "density": "half"}}, "a number"),
        ({"parameters": {"weight": 1, "normalize": 1}}, "true or false"),
        ({"parameters": {"weight": [{"filtr": "mlp", "value": 1}]}}, "did you mean 'filter'"),
        ({"models": [{"model": "{one}", "parameters": {}}], "parameters": {}}, "'weight' is missing"),
        ({"models": [{"modl": "{one}"}]}, "did you mean 'model'"),
        ({"models": None}, "exactly one of models and slices"),
        ({"base_model": None}, "needs a base"),
        ({"base_model": "nowhere/at-all"}, "no model"),
        ({"dtype": "float64"}, "unknown dtype"),
        ({"tokenizer": {"source": "base", "tokens": {"<a>": {"source": "x"}}}}, "single tokens"),
        ({"modules": {"text_decoder": {}}}, "several modules"),
        ({"models": [{"model": "{one}"}, {"model": "{one}"}]}, "named twice"),
        ({"merge_method": "model_stock", "parameters": {}}, "2 or more models beside the base"),
        ({"merge_method": "fisher", "parameters": {}}, "measured of each model"),
        ({"chat_template": "chatml"}, "not a chat template"),
    ],
)
def test_mistakes_are_told(
    folders: dict[str, str], change: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = {
        "merge_method": "ties",
        "base_model": folders["base"],
        "models": [{"model": folders["one"]}],
        "parameters": {"weight": 1.0},
        **change,
    }
    if "chat_template" in change:
        from tests.edit.test_merge_stage import with_tokenizer

        with_tokenizer(folders)
    data = yaml.safe_load(yaml.safe_dump(data).replace("{one}", folders["one"]))
    with pytest.raises(PunaError) as error:
        make_plan(parse_config({k: v for k, v in data.items() if v is not None}, where="merge.yml"), seed=0)
    assert said in str(error.value)


def test_unreadable_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(PunaError, match="file not found"):
        read_config(tmp_path / "none.yml")
    for text in ("a: [", "- 1", "", "merge_method: ties"):
        (tmp_path / "bad.yml").write_text(text)
        with pytest.raises(PunaError):
            read_config(tmp_path / "bad.yml")


def test_an_adapter_stands_behind_a_plus_sign() -> None:
    assert ModelRef.read("a/b+c/d", "x") == ModelRef("a/b", "c/d")
    assert str(ModelRef.read("a+b", "x")) == "a+b" and ModelRef.read("a", "x").adapter is None


def test_the_layers_of_a_slice_must_be_there(folders: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(PunaError, match="no such layers"):
        _plan(SLERP.replace("[0, 2]", "[1, 3]"), folders, tmp_path)
    with pytest.raises(PunaError, match="as many layers each"):
        _plan(SLERP.replace("[0, 2]", "[0, 1]", 1), folders, tmp_path)
    assert pretrained.FORMATS  # the room that opens what is written
