"""The stage ``difference``: equal to the bit or not, by how much, and what cannot be compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import puna
from puna.core.errors import PunaError
from puna.core.stage import Context, get_stage, validate


def compare(first: Path, second: Path, out: Path) -> dict[str, float]:
    stage = get_stage("difference")
    context = Context("difference", out, {"model": first, "other": second})
    return stage.function(context, validate(stage.parameters, {}, where="test")).metrics


def test_one_bit_of_one_weight_is_seen(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_llama()
    puna.save(model, tmp_path / "a")
    puna.save(model, tmp_path / "same")
    weight = model.model.layers[1].mlp.up_proj.weight.detach().view(torch.int32)
    before = float(weight[3, 4].view(torch.float32))
    weight[3, 4] ^= 1
    after = float(weight[3, 4].view(torch.float32))
    puna.save(model, tmp_path / "b")
    count = sum(parameter.numel() for parameter in model.parameters())
    assert compare(tmp_path / "a", tmp_path / "same", tmp_path) == {
        "weights": count,
        "differ": 0,
        "largest": 0.0,
    }
    found = compare(tmp_path / "a", tmp_path / "b", tmp_path)
    assert found["differ"] == 1 and found["largest"] == pytest.approx(abs(after - before))


def test_models_of_other_shapes_are_refused(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    puna.save(tiny_llama(), tmp_path / "a")
    puna.save(tiny_llama(intermediate_size=64), tmp_path / "narrow")
    puna.save(tiny_llama(num_hidden_layers=3), tmp_path / "deep")
    for other in ("narrow", "deep"):
        with pytest.raises(PunaError, match="different shape"):
            compare(tmp_path / "a", tmp_path / other, tmp_path)
