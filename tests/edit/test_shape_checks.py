"""Counts of the papers' shapes, key-value heads written out, and what an export says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import puna
from puna.core.errors import PunaError
from puna.core.files import read_json, write_json
from puna.core.stage import Context, get_stage, validate
from puna.edit import export_checks, shape_checks
from puna.edit.new_stages import Sizes
from puna.model.grouped_heads import expanded, multi_head_logits
from puna.run import shapes
from puna.run.recipe import load

PAPERS = {
    "dmas-lite": ("dmas-llama-lite-1.7b", 1_716_144_128),
    "geb": ("geb-1.3b", 1_348_044_800),
    "pints": ("pints-1.5b", 1_565_886_464),
}


@pytest.mark.parametrize("system", PAPERS)
def test_the_papers_shapes_have_as_many_weights_as_their_formulas_say(system: str) -> None:
    name, count = PAPERS[system]
    told = load(system).stages["shape"].parameters
    found = shape_checks.of_shape(told.sizes, told.vocab_size)
    assert found["parameters"] == found["parameters.tensors"] == count
    known = shapes.known(name)
    assert known is not None and known.parameter_count() == count
    assert known.replace(bos_id=None, eos_ids=(), pad_id=None) == told.sizes.spec(told.vocab_size).replace(
        bos_id=None, eos_ids=(), pad_id=None, max_positions=known.max_positions
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [None, 1, 2])
def test_the_formula_counts_a_small_decoder_too(tied: bool, kv_heads: int | None) -> None:
    sizes = Sizes(
        hidden_size=32, intermediate_size=48, num_key_value_heads=kv_heads, tie_word_embeddings=tied
    )
    assert shape_checks.formula(sizes, 100) == sizes.spec(100).parameter_count()


def test_heads_written_out_say_the_same_and_are_multi_head_attention_to_the_bit(
    tiny_llama: Callable[..., Any],
) -> None:
    model = tiny_llama(attention_bias=True).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.k_proj.bias)
    wide = expanded(model)
    assert [block.kv_heads for block in wide.spec.blocks] == [4, 4]
    ids = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), wide(ids), atol=1e-5, rtol=0)
        assert torch.equal(wide(ids), multi_head_logits(wide, ids))
    with pytest.raises(PunaError, match="share keys and values"):
        multi_head_logits(model, ids)


def test_a_cache_with_half_the_heads_takes_half_the_bytes(tiny_llama: Callable[..., Any]) -> None:
    found = shape_checks.of_model(tiny_llama(), 20)
    assert found["mha.cache_share"] == 0.5 and found["mha.differ"] == 0 and found["mha.difference"] < 1e-5


def test_an_export_is_compared_with_transformers_its_tokenizer_and_its_cut(
    tmp_path: Path, tiny_llama: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_llama(vocab_size=tiny_tokenizer.vocab_size + 21)
    model.tokenizer = tiny_tokenizer
    folder = puna.save(model, tmp_path / "padded")
    stage = get_stage("vocabulary")
    parameters = validate(stage.parameters, {"builder": "unpadded", "dtype": "float32"}, where="test")
    cut = stage.function(Context("cut", tmp_path / "cut", {"model": str(folder)}), parameters)
    found = export_checks.check(folder, cut.outputs["model"], 12)
    assert found["cut.rows"] == tiny_tokenizer.vocab_size == found["rows"] - 21
    assert max(found["difference"], found["cut.difference"]) < 1e-5 and found["cut.moved"] < 1e-6
    assert found["roles_differ"] == 0
    file = folder / "generation_config.json"
    write_json(file, {**read_json(file), "eos_token_id": 7})
    assert export_checks.check(folder, None, 12)["roles_differ"] == 1


def test_an_export_that_others_read_otherwise_is_noticed(
    tmp_path: Path, tiny_llama: Callable[..., Any], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    model = tiny_llama()
    model.tokenizer = tiny_tokenizer
    folder = puna.save(model, tmp_path / "model")
    read = transformers.AutoModelForCausalLM.from_pretrained

    def otherwise(*given: Any, **named: Any) -> Any:
        theirs = read(*given, **named)
        with torch.no_grad():
            theirs.model.layers[0].self_attn.k_proj.weight.add_(0.1)
        return theirs

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", otherwise)
    assert export_checks.check(folder, None, 12)["difference"] > 1e-4


def test_rows_of_a_new_model_are_padded_to_a_multiple(tiny_tokenizer: Any, tmp_path: Path) -> None:
    tiny_tokenizer.save(tmp_path / "tokenizer")
    stage = get_stage("initialise")
    settings = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings |= {"pad_vocabulary_to_multiple": 64, "rms_norm_eps": 1e-5}
    context = Context("new", tmp_path / "new", {"tokenizer": str(tmp_path / "tokenizer")})
    made = stage.function(context, validate(stage.parameters, settings, where="test")).outputs["model"]
    spec = puna.load(made).spec
    assert spec.vocab_size % 64 == 0 and spec.vocab_size - tiny_tokenizer.vocab_size < 64
    assert spec.norm_eps == 1e-5
