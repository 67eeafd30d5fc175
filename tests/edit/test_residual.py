"""Instruction residuals: the sum, what belongs together, and from which parent the rest comes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import puna
from puna.core.errors import PunaError
from puna.core.files import read_json
from puna.core.seeds import torch_generator
from puna.core.stage import Context, Outcome, get_stage, validate
from puna.text.template import Template

CHAT = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture
def family(tmp_path: Path, tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> dict[str, str]:
    """Base, instruct model and continued base, with a chat template for the second alone."""
    places = {}
    for number, name in enumerate(("base", "instruct", "continued")):
        model = tiny_llama()
        if number:
            move(model, number)
        model.tokenizer = tiny_tokenizer
        if name == "instruct":
            model.template = Template(CHAT, tiny_tokenizer.template_strings)
        places[name] = str(puna.save(model, tmp_path / name))
    return places


@torch.no_grad()
def move(model: Any, seed: int) -> None:
    for number, weight in enumerate(model.parameters()):
        weight.add_(0.01 * torch.randn(weight.shape, generator=torch_generator(seed, "move", number)))


def run(name: str, tmp_path: Path, inputs: dict[str, str], **settings: Any) -> Outcome:
    stage = get_stage(name)
    (tmp_path / "out").mkdir(exist_ok=True)
    parameters = validate(stage.parameters, settings, where="test")
    return stage.function(Context(name, tmp_path / "out", inputs, dtype="float32"), parameters)


def weights(place: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in puna.load(place).named_parameters()}


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_sum_is_continued_and_scaled_difference(
    tmp_path: Path, family: dict[str, str], scale: float
) -> None:
    found = run("instruction_residual", tmp_path, family, scale=scale)
    got, (base, instruct, continued) = weights(found.outputs["model"]), map(weights, family.values())
    for name, weight in got.items():
        assert torch.equal(weight, continued[name] + scale * (instruct[name] - base[name]))
    assert "lm_head.weight" not in got  # tied: the embedding's residual is there once
    assert found.metrics["likeness"] > 0.7 and abs(found.metrics["residual_likeness"]) < 0.1


def test_neutral_settings_change_no_bit(tmp_path: Path, family: dict[str, str]) -> None:
    continued = weights(family["continued"])
    for inputs, scale in ((family, 0.0), ({**family, "instruct": family["base"]}, 1.0)):
        got = weights(run("instruction_residual", tmp_path, inputs, scale=scale).outputs["model"])
        assert all(torch.equal(got[name], continued[name]) for name in continued)


def test_nothing_learnt_is_the_instruct_model(tmp_path: Path, family: dict[str, str]) -> None:
    pair = {name: family[name] for name in ("base", "instruct")}
    found = run("residual_checks", tmp_path, pair).metrics
    assert found["self_residual"] == 0
    assert found["float32"] <= 1e-5 < found["bfloat16_residual"] < found["bfloat16"] < found["largest"]


def test_template_and_tokens_are_the_instruct_models_and_positions_the_continued_bases(
    tmp_path: Path, family: dict[str, str], tiny_llama: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    longer = tiny_llama(rope_scaling={"rope_type": "linear", "factor": 2.0}, max_position_embeddings=512)
    move(longer, 2)
    longer.tokenizer = tiny_tokenizer
    inputs = {**family, "continued": str(puna.save(longer, tmp_path / "longer"))}
    place = run("instruction_residual", tmp_path, inputs).outputs["model"]
    got, instruct = puna.load(place), puna.load(family["instruct"])
    assert got.template is not None and got.template.source == CHAT
    assert got.spec.eos_ids == instruct.spec.eos_ids
    generation = [read_json(Path(each) / "generation_config.json") for each in (place, family["instruct"])]
    assert generation[0] == generation[1]
    assert got.spec.blocks[0].rope.kind == "linear" and got.spec.max_positions == 512


def test_models_that_do_not_belong_together_are_refused(
    tmp_path: Path, family: dict[str, str], tiny_llama: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    strangers = {
        "stranger": tiny_llama(seed=9),
        "rows": tiny_llama(vocab_size=330),
        "head": tiny_llama(tie_word_embeddings=False),
        "turned": tiny_llama(rope_theta=5000.0),
        "wide": tiny_llama(intermediate_size=64),
    }
    for name, model in strangers.items():
        model.tokenizer = tiny_tokenizer
        puna.save(model, tmp_path / name)
    cases = [
        ("continued", "stranger", "does not come from this base"),
        ("instruct", "rows", "vocabularies differ in size"),
        ("continued", "head", "ties its head"),
        ("instruct", "turned", "turn positions in different ways"),
        ("continued", "wide", "not the same in both"),
    ]
    for place, name, message in cases:
        with pytest.raises(PunaError, match=message):
            run("instruction_residual", tmp_path, {**family, place: str(tmp_path / name)})
    assert not (tmp_path / "out" / "model").exists()
