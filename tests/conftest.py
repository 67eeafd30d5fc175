"""Shared fixtures: tiny Llamas made on the spot, and the real one where a test is marked ``smollm``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

# The same examples every time, and no deadline: neither chance nor a busy machine may fail a change that is
# not at fault. `pytest --hypothesis-profile searching` draws others, many more of them.
settings.register_profile("steady", derandomize=True, deadline=None)
settings.register_profile("searching", max_examples=1000, deadline=None)
settings.load_profile("steady")

# Two threads, unless the environment asks for one: threads that share a core with others mostly wait.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture
def tiny_config() -> dict[str, Any]:
    """A Hugging Face config of a 2-layer grouped-query Llama of about 60k parameters."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 320,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


@pytest.fixture
def tiny_llama(tiny_config: dict[str, Any]) -> Callable[..., Any]:
    """``tiny_llama(**config changes)`` builds a random decoder, float32, seeded."""

    def build(seed: int = 0, **changes: Any) -> Any:
        from puna.core.seeds import torch_generator
        from puna.model.llama import Llama
        from puna.model.spec import LlamaSpec

        spec = LlamaSpec.from_config({**tiny_config, **changes})
        return Llama(spec, generator=torch_generator(seed, "tiny"))

    return build


class WithoutFloat64(torch.Tensor):
    """A tensor as on a device that has no float64, such as Apple's: it must come to the CPU first."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function is torch.Tensor.cpu:
            return arguments[0].as_subclass(torch.Tensor)
        result = super().__torch_function__(function, types, arguments, options or {})
        if isinstance(result, cls) and result.dtype == torch.float64:
            raise TypeError("this device has no float64")
        return result


@pytest.fixture
def without_float64() -> Callable[[torch.Tensor], torch.Tensor]:
    """``without_float64(tensor)`` is the tensor as on a device that has no float64."""
    return lambda tensor: tensor.as_subclass(WithoutFloat64)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level tokenizer for ``tiny_llama``: ids 0 to 3 special, 256 bytes, then some English merges."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    from puna.text.tokenizer import Tokenizer

    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "the cat and the other cat sat on that mat in the end, and then it went in again"
    core.train_from_iterator([text] * 9, trainer)
    config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "add_bos_token": True}
    return Tokenizer(core, config, stop_tokens=["<|end|>"])


@pytest.fixture(scope="session")
def smollm_path() -> Path:
    """The GGUF of SmolLM2-135M-Instruct from the assets."""
    from puna.core import assets

    return assets.fetch("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def smollm(smollm_path: Path) -> Any:
    """SmolLM2-135M-Instruct in float32. Tests must not change it."""
    import puna

    return puna.load("smollm2-135m-instruct").eval()
