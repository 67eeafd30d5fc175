"""What is frozen stays what it was to the bit, through the real loop, for each kind of adapter and base."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from puna.model.adapters import LoraSettings, add_lora
from puna.model.nf4 import quantised_layers
from puna.train.optimizer import OptimizerSettings

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "lora with embeddings": {"full": ("embed_tokens",)},
    "lora on nf4": {"base": "nf4"},
    "rslora on nf4": {"base": "nf4", "rslora": True},
    "dora with dropout on nf4": {"base": "nf4", "dora": True, "dropout": 0.1},
}


def digests(model: Any) -> dict[str, str]:
    """SHA-256 of the bytes of every tensor, buffers included."""
    return {
        name: hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in model.state_dict().items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_training_moves_what_is_trained_and_no_bit_besides(
    make_loop: Callable[..., Any],
    tiny_llama: Callable[..., Any],
    tmp_path: Path,
    kind: str,
    dtype: torch.dtype,
) -> None:
    model = tiny_llama().to(dtype)
    trained = set(add_lora(model, LoraSettings(r=2, **KINDS[kind]), seed=1).names)
    before = digests(model)
    make_loop(tmp_path, model=model, optimizer=OptimizerSettings(2e-2), total_steps=4).run()
    after = digests(model)
    assert before.keys() == after.keys() and trained < before.keys()
    assert {name for name in before if before[name] != after[name]} == trained
    held = [name for name, _ in quantised_layers(model)]
    assert len(held) == (14 if "nf4" in kind else 0)
    for name in held:
        assert {f"{name}.base_layer.codes", f"{name}.base_layer.scale_codes"} < after.keys() - trained
