"""LLaMA-Adapter: prompts, scales and biases start at nothing, stay in their groups and go into weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from little_trainings import train

from puna.core.errors import PunaError
from puna.core.stage import Context, get_stage, validate
from puna.decode.engine import Engine
from puna.decode.sampling import Sampling
from puna.model.adapters import merge_lora
from puna.model.cache import KeyValueCache
from puna.model.light_adapter import (
    KINDS,
    AttentionPrompt,
    LightSettings,
    add_light,
    fold,
    prompted_layers,
)
from puna.model.llama import Llama
from puna.model.steppers import make_stepper
from puna.text import pretrained
from puna.train.light import INSTRUCTIONS_AND_CAPTIONS, Groups
from puna.train.plan import Method, trained_parameters
from tests.invariants import kit

V1 = {"kind": "llama_adapter", "prompt_length": 3}
V2 = {"kind": "llama_adapter_v2", "prompt_length": 3}


def by_hand(model: Llama, layer: int, hidden: torch.Tensor, prompt: AttentionPrompt) -> torch.Tensor:
    """What a layer's attention gets from its prompt, head by head, [time, heads * head_dim]."""
    from puna.model.rope import rotate, rotation

    attention = model.model.layers[layer].self_attn  # type: ignore[union-attr]
    block = attention.block
    turn = rotation(block.rope, block.head_dim, torch.arange(len(hidden))[None], 0, hidden.dtype)
    queries = rotate(attention.q_proj(hidden[None]).view(1, len(hidden), block.heads, -1), turn)[0]
    keys = attention.k_proj(prompt.embedding).view(-1, block.kv_heads, block.head_dim)
    values = attention.v_proj(prompt.embedding).view(-1, block.kv_heads, block.head_dim)
    found = []
    for head in range(block.heads):
        group = head // (block.heads // block.kv_heads)
        weights = (queries[:, head] @ keys[:, group].T * block.scale).softmax(dim=-1)
        found.append(torch.tanh(prompt.gate[head]) * (weights @ values[:, group]))
    return torch.cat(found, dim=1)


@torch.no_grad()
def test_a_head_sees_the_prompt_in_a_softmax_of_its_own_through_its_gate_without_rotation() -> None:
    model = kit.DECODERS["prompted"]()
    ((layer, prompt), *_) = prompted_layers(model)
    attention: Any = model.model.layers[layer].self_attn  # type: ignore[union-attr]
    seen: list[torch.Tensor] = []
    attention.o_proj.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    entering: list[torch.Tensor] = []
    attention.q_proj.register_forward_pre_hook(lambda _module, inputs: entering.append(inputs[0]))
    ids = kit.random_ids(1, 9)
    model(ids)
    gates = prompt.gate.clone()
    prompt.gate.zero_()
    model(ids)
    prompt.gate.copy_(gates)
    expected = by_hand(model, layer, entering[0][0], prompt)
    torch.testing.assert_close((seen[0] - seen[1])[0], expected, atol=1e-5, rtol=0)
    assert len({round(float(gate), 4) for gate in gates}) == len(gates)  # one for each head


@torch.no_grad()
def test_scale_bias_and_norms_go_into_the_weights_and_prompts_stay() -> None:
    model, ids = kit.DECODERS["prompted"](), kit.random_ids(2, 11)
    expected = model(ids)
    scaled: Any = model.model.layers[0].mlp.up_proj  # type: ignore[union-attr]
    row = torch.randn(scaled.in_features)
    exact = scaled.scale * (scaled.base_layer.weight @ row + scaled.shift)
    torch.testing.assert_close(scaled(row), exact, atol=1e-5, rtol=0)
    fold(model)
    assert model.spec.attention_bias == "all" and model.spec.mlp_bias
    torch.testing.assert_close(model(ids), expected, atol=2e-5, rtol=1e-5)
    with pytest.raises(PunaError, match="cannot be merged"):
        merge_lora(model)
    alone = kit.decoder(kit.spec_of())
    add_light(alone, LightSettings("llama_adapter_v2", 0), seed=0)
    merge_lora(alone)
    assert alone.adapter is None and all(parameter.requires_grad for parameter in alone.parameters())
    torch.testing.assert_close(alone(ids), kit.decoder(kit.spec_of())(ids), atol=0, rtol=0)


def test_what_is_trained_is_float32_in_a_bfloat16_model_and_counted_as_planned() -> None:
    for kind in KINDS:
        model = kit.decoder(kit.spec_of()).bfloat16()
        add_light(model, LightSettings(kind, 3, 2), seed=0)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        own = {name: p for name, p in trained.items() if "norm" not in name}
        assert all(parameter.dtype == torch.float32 for parameter in own.values())
        count = sum(parameter.numel() for parameter in trained.values())
        assert count == trained_parameters(model.spec, Method(light=kind, prompt=(3, 2)))
        assert ("norm" in "".join(trained)) == (kind == "llama_adapter_v2")


def test_a_folded_model_opens_in_transformers_and_its_prompts_over_it_here(
    places: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    outcome, _ = train(places, tmp_path / "run", adapter=V2, learning_rate=3e-2, max_steps=6)
    assert outcome.metrics["start_difference"] == 0.0
    assert set(outcome.outputs) == {"model", "adapter"}
    ids = torch.arange(5, 40)[None]
    theirs = AutoModelForCausalLM.from_pretrained(outcome.outputs["model"], dtype=torch.float32)
    folded = pretrained.load(outcome.outputs["model"]).eval()
    whole = pretrained.load(outcome.outputs["adapter"]).eval()
    with torch.no_grad():
        torch.testing.assert_close(folded(ids), theirs(ids).logits, atol=1e-5, rtol=0)
        assert (whole(ids) - folded(ids)).abs().max() > 1e-4  # the prompts say something
    assert folded.spec.mlp_bias and not pretrained.load(places["model"]).spec.mlp_bias
    from peft import PeftModel

    with pytest.raises((KeyError, ValueError)):
        PeftModel.from_pretrained(theirs, outcome.outputs["adapter"])
    with pytest.raises(PunaError, match="carries an adapter"):
        pretrained.save(whole, tmp_path / "plain")
    pretrained.save(whole, tmp_path / "again", "adapter")
    again = pretrained.load(tmp_path / "again").eval()
    kit.assert_same_bits(whole, again, ids)


def test_prompts_alone_lie_over_the_model_as_it_was(places: dict[str, Path], tmp_path: Path) -> None:
    outcome, _ = train(places, tmp_path / "run", adapter=V1)
    assert set(outcome.outputs) == {"adapter"}
    model, base = pretrained.load(outcome.outputs["adapter"]), pretrained.load(places["model"])
    own = dict(model.named_parameters())
    assert all(torch.equal(own[name], parameter) for name, parameter in base.named_parameters())
    assert all(bool(prompt.gate.any()) for _, prompt in prompted_layers(model))
    assert [layer for layer, _ in prompted_layers(model)] == [1]  # all but the first


def test_the_engine_writes_what_the_forward_pass_says_and_native_kernels_refuse(
    places: dict[str, Path], tmp_path: Path
) -> None:
    outcome, _ = train(places, tmp_path / "run", adapter=V2, learning_rate=5e-2, max_steps=8)
    model = pretrained.load_merged(outcome.outputs["adapter"])
    assert [layer for layer, _ in prompted_layers(model)]
    text = model.tokenizer.encode("the cat sat")
    engine = Engine(model, max_batch_tokens=64, cache_tokens=128)
    (found,) = engine.generate([text], Sampling(max_tokens=8, temperature=0, ignore_eos=True))
    ids, cache = torch.tensor([text]), KeyValueCache(model.spec, 1, 64)
    with torch.no_grad():
        logits = model(ids, cache=cache)
        plain = []
        for _ in range(8):
            plain.append(int(logits[0, -1].argmax()))
            logits = model(torch.tensor([plain[-1:]]), cache=cache)
    assert found.ids == plain
    with pytest.raises(PunaError, match="attention prompts"):
        make_stepper(model, cache_tokens=64, kernels="native")


@pytest.mark.parametrize("corpus", ["documents", "messages"])
def test_a_batch_of_one_kind_changes_no_bit_of_the_other_kinds_parameters(
    places: dict[str, Path], tmp_path: Path, corpus: str
) -> None:
    stage = get_stage("adapter_checks")
    inputs = {"model": str(places["model"]), "corpus": places[corpus]}

    def run(**adapter: Any) -> dict[str, float]:
        parameters = validate(stage.parameters, {"adapter": {**V2, **adapter}, "rounds": 3}, where="test")
        return stage.function(Context("checks", tmp_path, inputs, seed=0), parameters).metrics

    figures = run(prompt_layers=2)
    assert figures["start_differ"] == figures["caption.others_changed"] == 0
    assert figures["instruction.others_changed"] == 0
    assert figures["caption.own_changed"] > 0 < figures["instruction.own_changed"]
    assert figures["moved"] > 1e-3
    assert figures["cached_difference"] < 1e-5 and figures["folded_difference"] < 1e-5
    with pytest.raises(PunaError, match="both must be there"):
        run(prompt_layers=1)


def test_groups_own_every_parameter_once() -> None:
    model = kit.DECODERS["prompted"]()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    owned = INSTRUCTIONS_AND_CAPTIONS.of(names)
    assert owned["caption"] | owned["instruction"] == set(names)
    assert owned["caption"] == {f"model.layers.0.self_attn.prompt.{name}" for name in ("embedding", "gate")}
    assert INSTRUCTIONS_AND_CAPTIONS.held("caption", names) == owned["instruction"]
    with pytest.raises(PunaError, match="belongs to one group"):
        Groups({"caption": ("*.gate",), "instruction": ("*prompt*",)}).of(names)
    with pytest.raises(PunaError, match="unknown kind of batch"):
        INSTRUCTIONS_AND_CAPTIONS.held("captions", names)


@pytest.mark.parametrize(("flip", "trainable"), [({"kind": "llama_adapter"}, 1), ({"prompt_length": 0}, 1)])
def test_options_of_the_adapter_change_what_is_trained(
    places: dict[str, Path], tmp_path: Path, flip: dict[str, Any], trainable: int
) -> None:
    whole = train(places, tmp_path / "whole", adapter=V2, max_steps=1)[0].metrics["trainable"]
    less = train(places, tmp_path / "less", adapter={**V2, **flip}, max_steps=1)[0].metrics["trainable"]
    both = train(places, tmp_path / "both", adapter={**V2, "prompt_layers": 2}, max_steps=1)[0]
    assert less < whole < both.metrics["trainable"]


def test_what_does_not_go_together_is_told(places: dict[str, Path], tmp_path: Path) -> None:
    for wrong, words in (
        ({"adapter": {"kind": "llama_adapter", "prompt_length": 0}}, "prompt_length of at least 1"),
        ({"adapter": V1, "lora": {"r": 2}}, "does not go with lora"),
        ({"adapter": V1, "save_adapter": False}, "does not go with"),
        ({"adapter": {**V1, "prompt_layers": 9}}, "more layers with a prompt"),
    ):
        with pytest.raises(PunaError, match=words):
            train(places, tmp_path / "wrong", **wrong)
