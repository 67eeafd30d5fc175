"""Specs: read from and written to configs, checked, counted, printed."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from puna.core.errors import PunaError
from puna.model.llama import Llama
from puna.model.spec import BlockSpec, LlamaSpec, MergerKind, RopeRule

BLOCK = BlockSpec(heads=4, kv_heads=2, head_dim=8, width=16)
SPEC = LlamaSpec(vocab_size=50, hidden_size=32, blocks=(BLOCK, BLOCK))

positive = st.floats(0.01, 100, allow_nan=False)


@st.composite
def rope_rules(draw: st.DrawFn, pairs: int, positions: int) -> RopeRule:
    kind = draw(st.sampled_from(["default", "linear", "dynamic", "yarn", "longrope", "llama3"]))
    fields: dict[str, Any] = {"kind": kind, "theta": draw(st.floats(10, 1e6))}
    if kind != "default":
        fields["factor"] = draw(st.floats(1, 64))
    if kind in ("dynamic", "yarn", "longrope", "llama3"):
        fields["original_max_positions"] = positions if kind == "dynamic" else draw(st.integers(1, 9999))
    if kind == "yarn":
        for name in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            fields[name] = draw(st.none() | positive)
        fields["truncate"] = draw(st.none() | st.booleans())
    if kind == "longrope":
        fields["attention_factor"] = draw(st.none() | positive)
        for name in ("short_factor", "long_factor"):
            fields[name] = tuple(draw(st.lists(positive, min_size=pairs, max_size=pairs)))
    if kind == "llama3":
        fields["low_freq_factor"] = draw(st.floats(0.1, 2))
        fields["high_freq_factor"] = draw(st.floats(2.1, 9))
    return RopeRule(**fields)


@st.composite
def block_specs(draw: st.DrawFn, positions: int) -> BlockSpec:
    kv_heads, pairs = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    causal = draw(st.integers(0, 9)) > 0
    return BlockSpec(
        attention=draw(st.sampled_from(["full", "full", "full", "linear", "none"])),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=2 * pairs,
        window=draw(st.none() | st.integers(1, 99)) if causal else None,
        causal=causal,
        rope=draw(rope_rules(pairs, positions)),
        logit_scale=draw(st.none() | positive),
        feed_forward=draw(st.sampled_from(["swiglu", "swiglu", "swiglu", "linear", "none"])),
        width=draw(st.integers(1, 40)),
        merger=draw(st.sampled_from([None, None, None, *get_args(MergerKind)])),
        series=draw(st.sampled_from([0, 0, 0, 1, 2, 3])),
        shortcut=draw(st.sampled_from([0, 0, 0, 1, 5])),
    )


@st.composite
def specs(draw: st.DrawFn) -> LlamaSpec:
    positions = draw(st.integers(1, 9999))
    layers = draw(st.integers(1, 4))
    same = draw(st.booleans())
    block = draw(block_specs(positions))
    blocks = (block,) * layers if same else tuple(draw(block_specs(positions)) for _ in range(layers))
    token = st.integers(0, 19)
    return LlamaSpec(
        vocab_size=20,
        hidden_size=draw(st.integers(1, 64)),
        blocks=blocks,
        norm_eps=draw(st.floats(1e-8, 1e-3)),
        tied=draw(st.booleans()),
        attention_bias=draw(st.sampled_from(["none", "qkv", "all"])),
        mlp_bias=draw(st.booleans()),
        max_positions=positions,
        bos_id=draw(st.none() | token),
        eos_ids=tuple(draw(st.lists(token, max_size=3))),
        pad_id=draw(st.none() | token),
    )


@settings(max_examples=200, deadline=None)
@given(specs())
def test_every_spec_survives_its_config_as_json(spec: LlamaSpec) -> None:
    again = LlamaSpec.from_config(json.loads(json.dumps(spec.to_config())))
    # A scale that is written out but is the usual one is left out of a plain config.
    if spec.uniform:
        spec = spec.replace(logit_scale=None)
    assert again == spec
    assert hash(again) == hash(spec)


@settings(max_examples=25, deadline=None)
@given(specs())
def test_the_parameter_count_is_the_decoders_own(spec: LlamaSpec) -> None:
    model = Llama(spec, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == spec.parameter_count()


@settings(max_examples=25, deadline=None)
@given(specs())
def test_only_specs_that_transformers_knows_are_called_uniform(spec: LlamaSpec) -> None:
    config = spec.to_config()
    assert (config["model_type"] != "puna") == spec.uniform
    if spec.uniform:
        assert len(set(spec.blocks)) == 1 and "blocks" not in config
        assert config["architectures"][0].lower().startswith(config["model_type"])


def test_old_and_new_rope_keys_are_read_alike(tiny_config: dict[str, Any]) -> None:
    del tiny_config["rope_theta"]
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 64}
    new = LlamaSpec.from_config({**tiny_config, "rope_parameters": {**rope, "rope_theta": 5e5}})
    old = LlamaSpec.from_config({**tiny_config, "rope_theta": 5e5, "rope_scaling": rope})
    older = LlamaSpec.from_config(
        {**tiny_config, "rope_theta": 5e5, "rope_scaling": {**rope, "rope_type": None, "type": "llama3"}}
    )
    assert new == old == older
    assert new.blocks[0].rope == RopeRule("llama3", 5e5, 8.0, 64, low_freq_factor=1.0, high_freq_factor=4.0)
    written = new.to_config()
    assert written["rope_parameters"] == {**rope, "rope_theta": 5e5}
    assert written["rope_theta"] == 5e5 and written["rope_scaling"] == rope


def test_missing_keys_take_transformers_defaults() -> None:
    least = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 8}
    llama = LlamaSpec.from_config({"model_type": "llama", "vocab_size": 50, **least})
    assert llama.blocks[0] == BlockSpec(heads=4, kv_heads=4, head_dim=8, width=8)
    assert (llama.bos_id, llama.eos_ids, llama.pad_id) == (1, (2,), None)
    assert (llama.norm_eps, llama.tied, llama.max_positions) == (1e-6, False, 2048)
    qwen = LlamaSpec.from_config(
        {"model_type": "qwen2", "vocab_size": 50, **least, "num_key_value_heads": None}
    )
    assert (qwen.attention_bias, qwen.bos_id, qwen.eos_ids) == ("qkv", None, ())
    assert qwen.blocks[0].window is None and qwen.max_positions == 32768
    mistral = LlamaSpec.from_config(
        {"model_type": "mistral", "vocab_size": 50, **least, "num_key_value_heads": 2}
    )
    assert mistral.blocks[0].window == 4096


def test_longrope_without_factor_takes_the_ratio_of_lengths(tiny_config: dict[str, Any]) -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
    config = {**tiny_config, "rope_scaling": rope, "max_position_embeddings": 256}
    inside = LlamaSpec.from_config(
        {**config, "rope_scaling": {**rope, "original_max_position_embeddings": 64}}
    )
    outside = LlamaSpec.from_config({**config, "original_max_position_embeddings": 64})
    assert inside == outside
    assert (inside.blocks[0].rope.factor, inside.blocks[0].rope.original_max_positions) == (4.0, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "not of the Llama family"),
        ({"model_type": None}, "not of the Llama family"),
        ({"hidden_act": "gelu"}, "hidden_act is not computed here"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers must be"),
        ({"vocab_size": None}, "vocab_size must be"),
        ({"num_key_value_heads": 3}, "cannot be shared out"),
        ({"head_dim": 7}, "even"),
        ({"eos_token_id": 5000}, "eos_ids is not a token"),
        ({"eos_token_id": "</s>"}, "eos_ids is not a token"),
        ({"rms_norm_eps": "small"}, "norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tied must be true or false"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "unknown rope kind 'spiral'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "at least 1"),
        ({"rope_scaling": {"rope_type": "linear", "factr": 2.0}}, "unknown rope parameter 'factr'"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}},
            "partial_rotary",
        ),
        ({"rope_scaling": [1, 2]}, "rope parameters must be a mapping"),
        ({"rope_theta": -1.0}, "theta must be a positive"),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 6}},
            "short_factor needs one number for each pair",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": "x"}}, "beta_fast must be"),
    ],
    ids=str,
)
def test_what_is_not_computed_is_one_clear_error(
    changes: dict[str, Any], message: str, tiny_config: dict[str, Any]
) -> None:
    with pytest.raises(PunaError, match=message) as caught:
        LlamaSpec.from_config({**tiny_config, **changes}, where="folder/config.json")
    assert str(caught.value).startswith("folder/config.json: ")


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_types": ["sliding_attention"]},
        {"layer_types": ["sideways", "full_attention"]},
        {"layer_types": ["sliding_attention"] * 2, "use_sliding_window": False},
    ],
)
def test_wrong_layer_types_are_refused(changes: dict[str, Any], tiny_config: dict[str, Any]) -> None:
    config = {
        **tiny_config,
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 8,
        **changes,
    }
    with pytest.raises(PunaError, match="layer_types"):
        LlamaSpec.from_config(config)


@pytest.mark.parametrize(
    "fields",
    [
        {"attention": "cubic"},
        {"feed_forward": "gelu"},
        {"heads": 0},
        {"heads": 3},
        {"head_dim": 5},
        {"window": 0},
        {"window": 4, "causal": False},
        {"logit_scale": -1.0},
        {"width": True},
        {"rope": "linear"},
        {"merger": "mean"},
    ],
    ids=str,
)
def test_impossible_blocks_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(PunaError):
        dataclasses.replace(BLOCK, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"blocks": ()},
        {"blocks": [BLOCK]},
        {"vocab_size": 0},
        {"norm_eps": 0.0},
        {"attention_bias": True},
        {"mlp_bias": 1},
        {"pad_id": 50},
        {"eos_ids": [1]},
        {"rope": RopeRule("dynamic", factor=2.0, original_max_positions=7)},
        {"colour": 1},
    ],
    ids=str,
)
def test_impossible_specs_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(PunaError):
        SPEC.replace(**fields)


def test_replace_reaches_into_every_block() -> None:
    changed = SPEC.replace(window=5, tied=True)
    assert changed.tied and all(block.window == 5 for block in changed.blocks)
    assert SPEC.blocks[0].window is None


def test_a_half_that_is_none_forgets_its_settings() -> None:
    odd = dataclasses.replace(BLOCK, attention="none", window=3, feed_forward="none")
    assert odd == BlockSpec(attention="none", feed_forward="none")
    assert odd.parameter_count(32, "all", True) == 0


def test_heads_that_do_not_divide_the_hidden_size_are_written_as_mistral() -> None:
    spec = SPEC.replace(hidden_size=30)
    assert (SPEC.architecture, spec.architecture) == ("llama", "mistral")
    assert spec.replace(attention_bias="all").architecture is None


def test_unknown_fields_in_an_own_config_are_named() -> None:
    config = SPEC.replace(logit_scale=0.9).to_config()
    config["blocks"][1]["widht"] = 3
    with pytest.raises(
        PunaError, match=r"block 1: unknown field of a block 'widht'[\s\S]*did you mean 'width'"
    ):
        LlamaSpec.from_config(config)


def test_a_wrong_value_in_an_own_config_names_the_file() -> None:
    config = SPEC.replace(logit_scale=0.9).to_config()
    config["blocks"][1]["heads"] = -4
    with pytest.raises(PunaError, match=r"^x/config\.json: block: heads must be"):
        LlamaSpec.from_config(config, where="x/config.json")


def test_an_own_config_without_a_key_is_an_error() -> None:
    config = SPEC.replace(logit_scale=0.9).to_config()
    del config["hidden_size"]
    with pytest.raises(PunaError, match="'hidden_size' is missing"):
        LlamaSpec.from_config(config)


def test_the_table_shows_runs_of_equal_blocks() -> None:
    other = dataclasses.replace(BLOCK, window=9, rope=RopeRule("linear", 1e4, factor=4.0))
    spec = dataclasses.replace(
        SPEC, blocks=(BLOCK, BLOCK, BLOCK, other, BlockSpec(attention="none", width=4))
    )
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(spec.table())
    lines = console.export_text().splitlines()
    rows = [line for line in lines if line.strip()[:1].isdigit() and "parameters" not in line]
    assert [row.split()[0] for row in rows] == ["0-2", "3", "4"]
    assert "window 9" in rows[1] and "linear 10000 x4" in rows[1] and "none" in rows[2]


def test_reading_a_spec_needs_no_torch() -> None:
    code = "import sys, puna.model.spec, puna.model.hf_config; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
