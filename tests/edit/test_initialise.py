"""The stage ``initialise``: a new Llama of given sizes, the same for the same seed, open to transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from puna.core.errors import PunaError
from puna.core.stage import Context, get_stage, validate
from puna.run.planner import plan
from puna.text import pretrained

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def _made(tokenizer: Any, out: Path, seed: int = 0, **settings: Any) -> tuple[Any, Any]:
    tokenizer.save(out / "tokenizer")
    stage = get_stage("initialise")
    parameters = validate(stage.parameters, {**SIZES, **settings}, where="test")
    context = Context("new", out / "new", {"tokenizer": str(out / "tokenizer")}, seed=seed)
    outcome = stage.function(context, parameters)
    return pretrained.load(outcome.outputs["model"]), outcome


def test_a_new_model_has_the_sizes_and_opens_in_transformers(tiny_tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, outcome = _made(tiny_tokenizer, tmp_path, num_key_value_heads=2)
    assert outcome.metrics["parameters"] == model.spec.parameter_count()
    assert (len(model.spec.blocks), model.spec.hidden_size, model.spec.blocks[0].kv_heads) == (2, 32, 2)
    assert model.spec.vocab_size == tiny_tokenizer.vocab_size and model.spec.tied
    assert model.tokenizer.fingerprint == tiny_tokenizer.fingerprint
    ids = torch.arange(4, 30)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(outcome.outputs["model"], dtype=torch.float32)
        torch.testing.assert_close(model.eval()(ids), theirs(ids).logits, atol=1e-5, rtol=0)


def test_weights_are_a_matter_of_the_seed(tiny_tokenizer: Any, tmp_path: Path) -> None:
    one, again, other = (
        _made(tiny_tokenizer, tmp_path / name, seed=seed)[0].state_dict()
        for name, seed in (("one", 0), ("again", 0), ("other", 1))
    )
    assert all(torch.equal(one[name], again[name]) for name in one)
    drawn = [name for name in one if one[name].dim() == 2]
    assert not any(torch.equal(one[name], other[name]) for name in drawn)
    assert all(0.015 < float(one[name].std()) < 0.025 for name in drawn)


def test_heads_that_do_not_share_out_the_width_are_refused(tiny_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(PunaError, match="cannot be shared out"):
        _made(tiny_tokenizer, tmp_path, num_key_value_heads=3)


def test_a_new_model_may_have_series_and_a_shortcut(tiny_tokenizer: Any, tmp_path: Path) -> None:
    model, outcome = _made(tiny_tokenizer, tmp_path, series=2, shortcut=3)
    assert {(block.series, block.shortcut) for block in model.spec.blocks} == {(2, 3)}
    plain, without = _made(tiny_tokenizer, tmp_path / "plain")
    assert outcome.metrics["parameters"] - without.metrics["parameters"] == 2 * (2 * 32 * 3 + 4 * 64)
    assert plain.spec == model.spec.replace(series=0, shortcut=0)


@pytest.mark.parametrize(
    ("hidden", "heads", "layers", "width", "billions"),
    [(2048, 16, 12, 5632, 1.03), (4096, 32, 29, 11008, 6.72)],
)
def test_shapes_of_the_paper_are_planned(
    hidden: int, heads: int, layers: int, width: int, billions: float
) -> None:
    """PanGu-pi-1B and 7B with a vocabulary of about 100,000: added are 2 d^2 / 32 a layer and 4 a channel."""
    stage = get_stage("initialise")
    sizes = {"hidden_size": hidden, "num_attention_heads": heads, "num_hidden_layers": layers}
    sizes |= {"intermediate_size": width, "tie_word_embeddings": False}
    plain, rich = (
        validate(stage.parameters, {**sizes, **more}, where="test").spec(100_096)
        for more in ({}, {"series": 2, "shortcut": hidden // 32})
    )
    added = rich.parameter_count() - plain.parameter_count()
    assert added == layers * (2 * hidden**2 // 32 + 2 * 2 * width)
    assert rich.parameter_count() / 1e9 == pytest.approx(billions, abs=0.01)


def test_a_plan_knows_how_many_rows_a_new_tokenizer_asks_for() -> None:
    planned = plan("pangu-pi", "paper", device="h100", dtype="bfloat16")
    trained = {stage.stage: stage.cost.trainable for stage in planned.stages if stage.cost is not None}
    assert trained["pangu"] / 1e9 == pytest.approx(6.72, abs=0.01)
    assert trained["pangu"] < trained["vanilla"]
