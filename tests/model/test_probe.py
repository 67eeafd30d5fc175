"""The probe tells whether a model still computes the same function."""

from typing import Any

import torch

from puna.model.adapters import LoraSettings, add_lora
from puna.model.probe import difference, probe


def test_the_same_model_gives_the_same_bits(tiny_llama: Any) -> None:
    assert difference(probe(tiny_llama()), probe(tiny_llama())) == 0.0


def test_a_changed_weight_shows(tiny_llama: Any) -> None:
    model = tiny_llama()
    before = probe(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 0.5
    assert difference(before, probe(model)) > 0.0


def test_dropout_is_off_and_the_mode_comes_back(tiny_llama: Any) -> None:
    model = tiny_llama().train()
    before = probe(model)
    add_lora(model, LoraSettings(r=2, dropout=0.5), seed=0)
    model.train()
    assert difference(before, probe(model)) == 0.0
    assert model.training
