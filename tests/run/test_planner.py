from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from puna.core.errors import PunaError
from puna.model.spec import LlamaSpec
from puna.run import devices, shapes
from puna.run.devices import DeviceProfile, profile
from puna.run.planner import duration, plan, quantity, size

pytestmark = pytest.mark.usefixtures("little")
Recipe = Callable[..., Path]
WITH_MODEL = ("in: {corpus: dutch.train,", "in: {model: smollm2-135m-instruct, corpus: dutch.train,")


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("smollm2-135m", 0.1345),
        ("tinyllama-1.1b", 1.1),
        ("llama-3.2-1b", 1.236),
        ("llama-3.2-3b", 3.213),
        ("llama-2-7b", 6.738),
        ("llama-2-13b", 13.016),
        ("llama-2-70b", 68.977),
        ("llama-3-8b", 8.030),
        ("llama-3-70b", 70.554),
    ],
)
def test_built_in_shapes_have_the_published_number_of_parameters(name: str, billions: float) -> None:
    spec = shapes.known(name)
    assert spec is not None
    assert spec.parameter_count() / 1e9 == pytest.approx(billions, rel=1e-3)
    assert name in shapes.names()


def test_an_id_on_a_hub_has_the_shape_it_is_known_for() -> None:
    assert shapes.of_model("meta-llama/Llama-2-7b-hf") == shapes.known("llama-2-7b")


def test_the_shape_of_a_folder_and_of_an_adapter_on_it_come_from_their_configs(
    tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    folder, adapter = tmp_path / "model", tmp_path / "adapter"
    for path in (folder, adapter):
        path.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny_config))
    expected = LlamaSpec.from_config(tiny_config)
    assert shapes.of_model(str(folder)) == expected
    for base in (str(folder), "../model"):
        (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
        assert shapes.of_model(str(adapter)) == expected


def test_an_unknown_model_has_the_shape_the_recipe_assumes_or_none() -> None:
    assert shapes.of_model("someone/their-model", assumed="llama-3-8b") == shapes.known("llama-3-8b")
    with pytest.raises(PunaError, match="shape of model 'someone/their-model' is not known"):
        shapes.of_model("someone/their-model")
    with pytest.raises(PunaError, match="did you mean 'llama-2-7b'"):
        shapes.of_model("llama-2-7")


def test_a_plan_follows_tokens_and_shapes_through_the_recipe(recipe: Recipe) -> None:
    made = plan(recipe(WITH_MODEL), device="h100")
    by_name = {stage.stage: stage for stage in made.stages}
    lora = by_name["lora"].cost
    smollm = shapes.known("smollm2-135m")
    assert lora is not None and smollm is not None
    assert lora.tokens == 5 * 2  # The corpus has 5 tokens, the demo takes 2 steps.
    assert lora.flops == 6 * 10 * smollm.parameter_count()
    assert lora.spec.vocab_size == smollm.vocab_size + 64
    h100 = devices.published()["cuda:h100"]
    assert by_name["lora"].memory == lora.memory + h100.process
    assert by_name["lora"].seconds == pytest.approx(lora.flops / (989e12 * 0.35))
    assert by_name["scores"].cost is None
    assert "not predicted, and not in the total: scores" in made.assumptions[-1]
    assert made.flops == lora.flops
    assert made.fits


def test_scale_settings_and_another_model_change_the_plan(recipe: Recipe) -> None:
    path = recipe(WITH_MODEL)
    small = plan(path, device="a100")
    large = plan(path, "paper", device="a100", model="llama-2-7b", set={"dutch.count": 50})
    ratio = large.flops / small.flops
    assert ratio == pytest.approx(10 * 4.5 * 6738.4 / 134.5, rel=1e-3)
    assert any("the shape of llama-2-7b" in line for line in large.assumptions)
    assert not large.fits  # 16 bytes a parameter of 6.7 billion.


def test_a_model_that_is_not_here_takes_the_shape_of_the_scale(recipe: Recipe) -> None:
    strange = ("in: {corpus: dutch.train,", "in: {model: someone/theirs, corpus: dutch.train,")
    with pytest.raises(PunaError, match="is not known here"):
        plan(recipe(strange), device="h100")
    path = recipe(strange, ("demo: {set", "demo: {shape: llama-3-8b, set"))
    made = plan(path, device="h100")
    assert any("8,030.3M parameters" in line for line in made.assumptions)
    with pytest.raises(PunaError, match="shape of model 'nothing' is not known here"):
        plan(path, device="h100", model="nothing")


def test_a_corpus_that_lies_here_counts_by_its_bytes(recipe: Recipe, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "corpus.json").write_text(json.dumps({"kind": "documents", "counts": {"bytes": 4000}}))
    made = plan(recipe(WITH_MODEL, ("corpus: dutch.train", f"corpus: {corpus}")), device="h100")
    cost = next(stage.cost for stage in made.stages if stage.stage == "lora")
    assert cost is not None and cost.tokens == 2000
    assert any("bytes of text a token" in line for line in made.assumptions)


def test_devices_are_found_by_short_names_and_unknown_ones_tell_the_nearest() -> None:
    assert profile("h100") is profile("cuda:h100")
    assert profile("laptop").name == "cpu:laptop"
    with pytest.raises(PunaError, match="did you mean 'cuda:h100'"):
        profile("cuda:h10")


@pytest.mark.parametrize("name", sorted(devices.published()))
def test_published_devices_are_plausible(name: str) -> None:
    found = devices.published()[name]
    assert found.flops["bfloat16"] >= found.flops["float32"] > 1e11
    assert 0 < found.share["bfloat16"] < 1
    assert found.memory > 8e9 and found.bandwidth > 1e10
    assert found.seconds(found.rate("bfloat16") * 7, "bfloat16") == pytest.approx(7)
    assert found.read_seconds(found.bandwidth * 3) == pytest.approx(3)
    assert "assumed share" in found.assumptions("bfloat16")


def test_this_machine_is_measured_once_and_then_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def measure(device: str, name: str) -> DeviceProfile:
        measured.append(device)
        rates = {"float32": 1e11, "bfloat16": 2e11, "float16": 2e11}
        return DeviceProfile("this", name, rates, dict.fromkeys(rates, 0.5), 8e9, 1e10, 3e8, measured=True)

    monkeypatch.setattr(devices, "_measure", measure)
    first = devices.this_machine("cpu")
    assert devices.this_machine("cpu") == first
    assert measured == ["cpu"]
    devices.this_machine("cpu", again=True)
    assert measured == ["cpu", "cpu"]
    assert "measured here" in first.assumptions("float32")


@pytest.mark.slow
def test_the_measurement_gives_rates_and_a_share_of_them() -> None:
    found = devices._measure("cpu", "processor")
    for dtype in ("float32", "bfloat16"):
        assert found.flops[dtype] > 1e8
        assert 0 < found.share[dtype] <= 1
    assert found.bandwidth > 1e8
    assert found.memory > found.process > 1e7


def test_auto_plans_bfloat16_only_where_it_is_quicker() -> None:
    for name, found in devices.published().items():
        assert found.quicker_dtype == ("bfloat16" if name.startswith("cuda") else "float32")


def test_figures_are_written_for_people() -> None:
    assert [quantity(value) for value in (0, 12, 1234, 5.6e9, 7e21)] == [
        "-",
        "12",
        "1.23 k",
        "5.6 G",
        "7e+03 E",
    ]
    assert [size(value) for value in (3e6, 2.5e9)] == ["3 MB", "2.50 GB"]
    assert [duration(value) for value in (3, 600, 36000, 1e6)] == ["3.0 s", "10.0 min", "10.0 h", "11.6 days"]
