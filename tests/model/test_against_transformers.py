"""The decoder computes what transformers computes, in float32 to 1e-5, on random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from puna.model.cache import KeyValueCache
from puna.model.llama import Llama
from puna.model.spec import LlamaSpec

TOLERANCE = 1e-5
SHORT = 24  # pre-training length of the stretched rope rules; inputs reach beyond it
CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": SHORT},
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": SHORT,
        "beta_fast": 8.0,
        "beta_slow": 0.5,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
        "truncate": False,
    },
    "yarn-attention-factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": SHORT,
        "attention_factor": 1.25,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": SHORT,
        "short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.4],
        "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0],
    },
    "longrope-attention-factor": {
        "rope_type": "longrope",
        "original_max_position_embeddings": SHORT,
        "attention_factor": 1.1,
        "short_factor": [1.0] * 6,
        "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0],
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "original_max_position_embeddings": SHORT,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}
SHAPES: dict[str, dict[str, Any]] = {
    "multi-head": {"num_key_value_heads": 4},
    "grouped": {"num_key_value_heads": 2},
    "multi-query": {"num_key_value_heads": 1},
    "untied": {"tie_word_embeddings": False},
    "wide-heads": {"head_dim": 20},
    "attention-bias": {"attention_bias": True},
    "mlp-bias": {"mlp_bias": True},
}


def make_pair(config: dict[str, Any], seed: int = 0) -> tuple[Llama, Any]:
    """A transformers model with every weight random, norms and biases too, and ours with the same weights."""
    config_class, model_class = CLASSES[config["model_type"]]
    theirs = model_class(config_class(**{key: config[key] for key in config if key != "model_type"})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            centre = 1.0 if "norm" in name else 0.0
            parameter.copy_(centre + 0.15 * torch.randn(parameter.shape, generator=generator))
    ours = Llama(LlamaSpec.from_config(config))
    weights = theirs.state_dict()
    if ours.spec.tied:
        del weights["lm_head.weight"]
    ours.load_state_dict(weights, strict=True)
    return ours, theirs


def random_ids(batch: int, time: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 320, (batch, time), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[*ROPES])
def rope_config(request: pytest.FixtureRequest, tiny_config: dict[str, Any]) -> dict[str, Any]:
    rope = dict(ROPES[request.param])
    positions = SHORT if request.param == "dynamic" else 4 * SHORT
    del tiny_config["rope_theta"]
    return {
        **tiny_config,
        "rope_parameters": {**rope, "rope_theta": 500.0},
        "max_position_embeddings": positions,
    }


@pytest.mark.parametrize("shape", [*SHAPES])
def test_logits_equal_for_every_shape(shape: str, tiny_config: dict[str, Any]) -> None:
    ours, theirs = make_pair({**tiny_config, **SHAPES[shape]})
    ids = random_ids(2, 50)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("time", [SHORT - 4, SHORT, 3 * SHORT])
def test_logits_equal_for_every_rope_rule_below_and_beyond_its_length(
    rope_config: dict[str, Any], time: int
) -> None:
    ours, theirs = make_pair(rope_config)
    ids = random_ids(2, time)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=TOLERANCE, rtol=0)


def test_logits_equal_step_by_step_with_a_cache_for_every_rope_rule(rope_config: dict[str, Any]) -> None:
    """Dynamic and longrope change frequencies on the way; stored keys keep theirs, on both sides."""
    ours, theirs = make_pair(rope_config)
    ids = random_ids(2, 2 * SHORT)
    cache = KeyValueCache(ours.spec, 2, ids.shape[1])
    their_cache = transformers.DynamicCache()
    with torch.no_grad():
        for start, end in [
            (0, SHORT - 6),
            *((i, i + 1) for i in range(SHORT - 6, SHORT + 9)),
            (SHORT + 9, 2 * SHORT),
        ]:
            part = ids[:, start:end]
            expected = theirs(part, past_key_values=their_cache, use_cache=True).logits
            torch.testing.assert_close(ours(part, cache=cache), expected, atol=TOLERANCE, rtol=0)
    assert cache.length == ids.shape[1]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cached", [False, True])
def test_logits_equal_with_padding(side: str, cached: bool, tiny_config: dict[str, Any]) -> None:
    ours, theirs = make_pair(tiny_config)
    ids = random_ids(3, 30)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 7, 20)):
        mask[row, :padding] = 0
    if side == "right":
        mask = mask.flip(1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    cache = KeyValueCache(ours.spec, 3, 30) if cached else None
    with torch.no_grad():
        got = ours(ids, segments=mask - 1, cache=cache)
        expected = theirs(ids, attention_mask=mask, position_ids=positions).logits
    real = mask.bool()
    torch.testing.assert_close(got[real], expected[real], atol=TOLERANCE, rtol=0)
    assert torch.isfinite(got).all()


def test_decoding_goes_on_after_left_padding(tiny_config: dict[str, Any]) -> None:
    ours, theirs = make_pair(tiny_config)
    ids = random_ids(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    cache = KeyValueCache(ours.spec, 2, 20)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        ours(ids[:, :12], segments=mask[:, :12] - 1, cache=cache)
        got = torch.cat([ours(ids[:, step : step + 1], cache=cache) for step in range(12, 20)], dim=1)
    torch.testing.assert_close(got, expected[:, 12:], atol=TOLERANCE, rtol=0)


def test_packed_documents_equal_transformers_own_packing(tiny_config: dict[str, Any]) -> None:
    ours, theirs = make_pair(tiny_config)
    ids = random_ids(1, 45)
    lengths = torch.tensor([13, 1, 22, 9])
    segments = torch.arange(4).repeat_interleave(lengths)[None]
    positions = torch.cat([torch.arange(length) for length in lengths.tolist()])[None]
    with torch.no_grad():
        got = ours(ids, segments=segments)
        packed = theirs(ids, position_ids=positions, use_cache=False).logits
        alone = torch.cat([theirs(part).logits for part in ids.split(lengths.tolist(), dim=1)], dim=1)
    torch.testing.assert_close(got, alone, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(got, packed, atol=TOLERANCE, rtol=0)


def test_gradients_equal(tiny_config: dict[str, Any]) -> None:
    ours, theirs = make_pair({**tiny_config, "attention_bias": True, "mlp_bias": True})
    ids = random_ids(2, 33)
    ours(ids).pow(2).mean().backward()
    theirs(ids).logits.pow(2).mean().backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    # transformers takes its padding id for no token and gives its row no gradient from the input side.
    pad = tiny_config["pad_token_id"]
    for name, parameter in ours.named_parameters():
        got, wanted = parameter.grad, expected[name]
        assert got is not None and wanted is not None
        if "embed_tokens" in name:
            got, wanted = got.clone(), wanted.clone()
            got[pad] = wanted[pad] = 0
        torch.testing.assert_close(
            got, wanted, atol=TOLERANCE, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_a_padding_id_that_is_a_real_token_still_learns(tiny_config: dict[str, Any]) -> None:
    ours, _ = make_pair({**tiny_config, "tie_word_embeddings": False, "pad_token_id": 2})
    ours(torch.full((1, 4), 2)).pow(2).mean().backward()
    gradient = ours.model.embed_tokens.weight.grad
    assert gradient is not None and gradient[2].abs().sum() > 0


@pytest.mark.parametrize("head_dim", [None, 20])
def test_qwen2_equal(head_dim: int | None, tiny_config: dict[str, Any]) -> None:
    config = {
        key: value
        for key, value in tiny_config.items()
        if key not in ("head_dim", "mlp_bias", "attention_bias")
    }
    config |= {"model_type": "qwen2", "tie_word_embeddings": False} | (
        {"head_dim": head_dim} if head_dim else {}
    )
    ours, theirs = make_pair(config)
    assert "model.layers.0.self_attn.q_proj.bias" in ours.state_dict()
    assert "model.layers.0.self_attn.o_proj.bias" not in ours.state_dict()
    ids = random_ids(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "window",
    [
        {"model_type": "mistral", "sliding_window": 7},
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
        {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 7, "max_window_layers": 1},
        {
            "model_type": "qwen2",
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ],
    ids=lambda window: f"{window['model_type']}-{len(window)}-{window.get('use_sliding_window')}",
)
def test_windows_equal_with_and_without_cache(window: dict[str, Any], tiny_config: dict[str, Any]) -> None:
    config = {key: value for key, value in tiny_config.items() if key not in ("mlp_bias", "attention_bias")}
    ours, theirs = make_pair({**config, **window})
    ids = random_ids(2, 160)  # longer than one band of queries
    cache = KeyValueCache(ours.spec, 2, 160)
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(ours(ids), expected, atol=TOLERANCE, rtol=0)
        parts = [ours(part, cache=cache) for part in ids.split([5, 1, 1, 6, 100, 47], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=TOLERANCE, rtol=0)


def test_our_config_opens_in_transformers_and_gives_the_same_logits(rope_config: dict[str, Any]) -> None:
    ours, theirs = make_pair(rope_config)
    written = ours.spec.to_config()
    again = transformers.LlamaForCausalLM(
        transformers.LlamaConfig.from_dict({key: written[key] for key in written if key != "architectures"})
    )
    again.load_state_dict(theirs.state_dict())
    ids = random_ids(1, 2 * SHORT)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), again(ids).logits, atol=TOLERANCE, rtol=0)


def test_bfloat16_is_as_near_to_float32_as_transformers_bfloat16(tiny_config: dict[str, Any]) -> None:
    ours, theirs = make_pair(tiny_config)
    ids = random_ids(4, 200)
    with torch.no_grad():
        exact = theirs(ids).logits
        their_error = (theirs.bfloat16()(ids).logits.float() - exact).abs().mean()
        our_error = (ours.bfloat16()(ids) - exact).abs().mean()
    assert our_error < 1.2 * their_error
