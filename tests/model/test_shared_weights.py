"""What two decoders have in common is held once: parameters of an adapter's copy, matrices of steppers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from puna.core.errors import PunaError
from puna.model.adapter_files import merged_copy, read_adapter, write_adapter
from puna.model.adapters import PROJECTIONS, LoraSettings, add_lora, merge_lora
from puna.model.llama import Llama
from puna.model.native.stepper import NativeStepper
from puna.model.steppers import make_stepper
from tests.model.native_models import SPECS, hidden_of, ids_of, little, logits_of

NAMES = ("grouped, tied", "odd sizes, all biases")
SETTINGS = {
    "queries and values": LoraSettings(r=4, target=("q_proj", "v_proj")),
    "all projections": LoraSettings(r=4, target=PROJECTIONS),
    "with the embedding": LoraSettings(r=4, target=("down_proj",), full=("embed_tokens", "norm")),
    "with the head": LoraSettings(r=4, target=("down_proj",), full=("lm_head",)),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft's, about other things
        yield


def written(name: str, settings: LoraSettings, folder: Path) -> Path:
    """An adapter of ``little(SPECS[name])`` that changes everything it is on."""
    model = little(SPECS[name])
    add_lora(model, settings, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    write_adapter(model, folder, base_name="little")
    return folder


def shared_names(one: Llama, other: Llama) -> set[str]:
    theirs = {id(parameter) for parameter in other.parameters()}
    return {name for name, parameter in one.named_parameters() if id(parameter) in theirs}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", SETTINGS)
def test_a_merged_copy_computes_the_same_and_holds_what_is_touched(
    name: str, kind: str, tmp_path: Path
) -> None:
    folder = written(name, SETTINGS[kind], tmp_path / "adapter")
    base, expected = little(SPECS[name]), little(SPECS[name])
    before = {key: parameter.detach().clone() for key, parameter in base.named_parameters()}
    copied = merged_copy(base, folder)
    read_adapter(expected, folder)
    merge_lora(expected)
    ids = ids_of(base.spec, 20)
    assert torch.equal(logits_of(copied, ids), logits_of(expected, ids))
    assert base.adapter is None and all(parameter.requires_grad for parameter in base.parameters())
    assert all(torch.equal(parameter, before[key]) for key, parameter in base.named_parameters())
    touched = SETTINGS[kind].target
    for key in (*touched, *SETTINGS[kind].full):
        assert not [shared for shared in shared_names(copied, base) if f".{key}." in f".{shared}"]
    untouched = [key for key in PROJECTIONS if key not in touched]
    for key in untouched:
        assert f"model.layers.1.{'mlp' if key[0] in 'gud' else 'self_attn'}.{key}.weight" in shared_names(
            copied, base
        )


def test_an_adapter_that_is_none_leaves_the_base_alone(tmp_path: Path) -> None:
    folder = written("odd sizes, all biases", SETTINGS["queries and values"], tmp_path / "adapter")
    base = little(SPECS["grouped, tied"])
    for wrong in (folder, tmp_path / "nowhere"):
        with pytest.raises(PunaError):
            merged_copy(base, wrong)
    assert base.adapter is None and all(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("name", NAMES)
def test_packed_matrices_are_shared_and_give_the_same_bits(name: str, quantize: Any, tmp_path: Path) -> None:
    base = little(SPECS[name])
    model = merged_copy(base, written(name, SETTINGS["queries and values"], tmp_path / "adapter"))
    first = NativeStepper(base, quantize=quantize, cache_tokens=64)
    alone = NativeStepper(model, quantize=quantize, cache_tokens=64)
    shared = NativeStepper(model, quantize=quantize, cache_tokens=64, like=first)
    whole = NativeStepper(base, quantize=quantize, cache_tokens=64, like=first)
    assert (alone.shared_bytes, shared.weight_bytes) == (0, alone.weight_bytes)
    # Of the packed matrices only that of queries, keys and values is another one.
    assert 0.4 * alone.weight_bytes < shared.shared_bytes < whole.shared_bytes
    ids = ids_of(model.spec, 40)
    del first  # what is shared lives on
    assert torch.equal(hidden_of(shared, ids, [40]), hidden_of(alone, ids, [40]))
    assert torch.equal(
        shared.logits(torch.ones(1, base.spec.hidden_size)),
        alone.logits(torch.ones(1, base.spec.hidden_size)),
    )
    assert torch.equal(
        hidden_of(whole, ids, [40]),
        hidden_of(NativeStepper(base, quantize=quantize, cache_tokens=64), ids, [40]),
    )


def test_nothing_is_shared_between_formats_or_with_weights_that_are_gone() -> None:
    model = little(SPECS["grouped, tied"])
    first = NativeStepper(model, cache_tokens=16)
    assert NativeStepper(model, quantize="int8", cache_tokens=16, like=first).shared_bytes == 0
    assert NativeStepper(little(SPECS["grouped, tied"]), cache_tokens=16, like=first).shared_bytes == 0
    plain = make_stepper(model, cache_tokens=16, kernels="plain")
    assert (
        make_stepper(model, cache_tokens=16, kernels="plain", like=plain).shared_bytes == plain.weight_bytes
    )
    assert make_stepper(model, cache_tokens=16, kernels="plain", like=first).shared_bytes == 0
