"""Attention prompts on disk: a folder like that of any adapter, of a type that peft does not know and
refuses.

``adapter_config.json`` names the base and the shape, ``adapter_model.safetensors`` has the prompts and
gates of each layer in float32. Scales, biases and norms are never in it: they are folded into the base that
it names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from puna.core.errors import PunaError
from puna.core.files import folder_aside, read_json, write_json
from puna.model.hf import SafetensorsFile
from puna.model.light_adapter import (
    LightSettings,
    LightState,
    prompted_layers,
    put_prompt,
)
from puna.model.llama import Llama
from puna.model.weights import check_finite, check_shapes

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LIGHT_TYPE = "PUNA_LLAMA_ADAPTER"


def holds_prompts(folder: Path) -> bool:
    """Whether an adapter's folder holds attention prompts."""
    stated = read_json(folder / CONFIG)
    return isinstance(stated, dict) and stated.get("peft_type") == LIGHT_TYPE


def write_prompts(model: Llama, folder: Path | str, *, base_name: str) -> None:
    """Write the model's prompts and gates for the base called ``base_name``."""
    state = model.adapter
    assert isinstance(state, LightState)
    if state.scaled:
        raise PunaError(
            "scales and biases belong into the weights",
            where=model.source,
            fix="fold them (puna.model.light_adapter.fold), save that model, and the prompts over it",
        )
    tensors = {
        f"model.layers.{layer}.self_attn.prompt.{name}": tensor.detach().float().cpu().contiguous()
        for layer, prompt in prompted_layers(model)
        for name, tensor in (("embedding", prompt.embedding), ("gate", prompt.gate))
    }
    for name, tensor in tensors.items():
        check_finite(name, tensor, folder)
    layers = [layer for layer, _ in prompted_layers(model)]
    config = {
        "peft_type": LIGHT_TYPE,
        "base_model_name_or_path": base_name,
        "prompt_length": state.settings.prompt_length,
        "prompt_layers": len(layers),
    }
    with folder_aside(folder) as aside:
        write_json(aside / CONFIG, config)
        save_file(tensors, aside / WEIGHTS, metadata={"format": "pt"})


@torch.no_grad()
def read_prompts(model: Llama, folder: Path | str) -> None:
    """Put the prompts of ``folder`` into ``model``, in place, frozen; on an error the model is as before."""
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    try:
        settings = LightSettings("llama_adapter", int(config["prompt_length"]), int(config["prompt_layers"]))
    except (KeyError, TypeError, ValueError) as error:
        raise PunaError("not a usable adapter config", where=folder / CONFIG, found=error) from None
    layers = settings.layers(len(model.spec.blocks))
    file = SafetensorsFile(folder / WEIGHTS)
    expected: dict[str, tuple[int, ...]] = {}
    for layer in layers:
        stem = f"model.layers.{layer}.self_attn.prompt"
        expected[f"{stem}.embedding"] = (settings.prompt_length, model.spec.hidden_size)
        expected[f"{stem}.gate"] = (model.spec.blocks[layer].heads,)
    check_shapes(expected, file.shapes, folder)
    found = {name: file.get(name) for name in expected}
    for name, tensor in found.items():
        check_finite(name, tensor, folder)
    for layer in layers:
        put_prompt(model, layer, settings.prompt_length, None)
    parameters: dict[str, Any] = dict(model.named_parameters())
    for name, tensor in found.items():
        parameters[name].copy_(tensor)
    model.requires_grad_(False)
    model.adapter = LightState(settings, scaled=False)
