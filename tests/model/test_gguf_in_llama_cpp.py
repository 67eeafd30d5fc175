"""The GGUF files puna writes, opened by llama.cpp itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from puna.model.checkpoint import read_gguf_metadata, read_weights, write_gguf
from puna.model.llama import Llama
from puna.model.spec import RopeRule

llama_cpp = pytest.importorskip("llama_cpp")

LLAMA3 = RopeRule(
    "llama3", 1e4, factor=8.0, original_max_positions=64, low_freq_factor=1.0, high_freq_factor=4.0
)
VARIANTS: dict[str, tuple[dict[str, Any], RopeRule | None]] = {
    "tied": ({}, None),
    "untied, all biases": ({"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}, None),
    "qwen2": ({"model_type": "qwen2"}, None),
    "wide heads": ({"head_dim": 32}, None),
    "linear rope": ({}, RopeRule("linear", 1e4, factor=4.0)),
    "yarn rope": ({}, RopeRule("yarn", 1e4, factor=4.0, original_max_positions=64)),
    "llama3 rope": ({}, LLAMA3),
}


def byte_vocabulary() -> dict[str, Any]:
    """A SentencePiece-like vocabulary of 320 tokens: three special, 256 bytes, the rest never used."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [f"▁word{number}" for number in range(320 - len(tokens))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * len(tokens),
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def engine_on(file: Path, **settings: Any) -> Any:
    """llama.cpp on one thread: its threads spin, which starves whatever else runs."""
    quiet = {"n_threads": 1, "n_threads_batch": 1, "verbose": False, "seed": 1}
    return llama_cpp.Llama(str(file), n_ctx=128, **quiet, **settings)


def logits_of(file: Path, ids: list[int]) -> torch.Tensor:
    """Logits [time, vocab] that llama.cpp computes, with keys and values in float32."""
    engine = engine_on(file, logits_all=True, type_k=0, type_v=0)
    engine.eval(ids)
    scores = torch.from_numpy(numpy.array(engine.scores[: len(ids)], dtype=numpy.float32))
    engine.close()
    return scores


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Root mean square of the difference, in standard deviations."""
    return float((one - other).pow(2).mean().sqrt() / one.std())


@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_cpp_computes_the_same_logits(
    variant: str, tiny_llama: Callable[..., Llama], tmp_path: Path
) -> None:
    changes, rule = VARIANTS[variant]
    model = tiny_llama(**{"hidden_size": 64, "head_dim": 16, **changes})
    plain = model.spec
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            # Large enough that positions, biases and row order show in the logits.
            drawn = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_((parameter + drawn).half().float())
    if rule is not None:
        model.spec = plain.replace(rope=rule)
        for block, spec in zip(model.model.layers, model.spec.blocks, strict=True):
            block.block = block.self_attn.block = spec
    write_gguf(model, tmp_path / "m.gguf", kind="f16", metadata=byte_vocabulary())
    ids = torch.randint(3, 320, (1, 100), generator=generator)
    theirs = logits_of(tmp_path / "m.gguf", ids[0].tolist())
    with torch.no_grad():
        assert distance(model(ids)[0], theirs) < 0.002  # llama.cpp multiplies in float16
        if rule is not None:  # and the rule is seen at all
            unstretched = read_weights(tmp_path / "m.gguf", overrides={"rope": RopeRule()})
            assert distance(unstretched(ids)[0], theirs) > 0.01


def greedy(model: Llama, ids: list[int], count: int) -> list[int]:
    from puna.model.cache import KeyValueCache

    cache = KeyValueCache(model.spec, 1, len(ids) + count)
    new, step = list[int](), torch.tensor([ids])
    with torch.no_grad():
        for _ in range(count):
            new.append(int(model(step, cache=cache)[0, -1].argmax()))
            step = torch.tensor([new[-1:]])
    return new


@pytest.mark.smollm
@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_smollm_written_anew_answers_with_the_same_greedy_text(
    kind: Any, smollm_path: Path, tmp_path: Path
) -> None:
    model = read_weights(smollm_path)
    tokenizer = {
        key: value for key, value in read_gguf_metadata(smollm_path).items() if key.startswith("tokenizer.")
    }
    write_gguf(model, tmp_path / "m.gguf", kind=kind, metadata=tokenizer)
    if kind == "q8_0":
        model = read_weights(tmp_path / "m.gguf")
    engine = engine_on(tmp_path / "m.gguf")
    prompt = engine.tokenize(
        b"<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n", special=True
    )
    theirs = []
    for token in engine.generate(prompt, temp=0.0, repeat_penalty=1.0):
        theirs.append(token)
        if len(theirs) == 12:
            break
    text = engine.detokenize(theirs).decode()
    engine.close()
    assert theirs == greedy(model, prompt, 12)
    assert "Paris" in text
