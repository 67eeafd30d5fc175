"""Adapted and gated projections in one piece: the values, gradients and fallbacks of the composed ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional

from puna.core.seeds import torch_generator
from puna.model.adapted import AdaptedLinear
from puna.model.adapters import LoraSettings, add_lora, lora_layers
from puna.model.llama import FeedForward

Build = Callable[..., Any]


def adapted(tiny_llama: Build, **settings: Any) -> Any:
    """The tiny model, with a LoRA whose B is not zero."""
    model = tiny_llama(**settings.pop("changes", {}))
    add_lora(model, LoraSettings(r=4, **settings), seed=1)
    generator = torch_generator(2, "B")
    for _, layer in lora_layers(model):
        up = layer.lora_B["default"].weight
        up.data.copy_(0.3 * torch.randn(up.shape, generator=generator))
    return model.train()


def composed(layer: Any, hidden: Tensor) -> Tensor:
    """PEFT's own forward pass."""
    found: Tensor = Linear.forward(layer, hidden)
    return found


def gradients(output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    outer = torch.randn(output.shape, generator=torch_generator(3, "outer"))
    return torch.autograd.grad((output * outer).sum(), inputs)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_the_composed_layer(
    tiny_llama: Build, rslora: bool, bias: bool
) -> None:
    model = adapted(tiny_llama, rslora=rslora, changes={"mlp_bias": bias, "attention_bias": bias})
    for name, layer in lora_layers(model):
        assert type(layer) is AdaptedLinear, name
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        width = down.shape[1]
        hidden = torch.randn(2, 5, width, generator=torch_generator(4, "hidden"), requires_grad=True)
        mine, theirs = layer(hidden), composed(layer, hidden)
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
        for one, other in zip(
            gradients(mine, hidden, down, up), gradients(theirs, hidden, down, up), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "frozen", "lora", "bias"])
def test_a_gated_projection_has_the_values_and_gradients_of_the_composed_one(
    tiny_llama: Build, kind: str
) -> None:
    model = tiny_llama(mlp_bias=kind == "bias") if kind != "lora" else adapted(tiny_llama)
    unit = model.model.layers[0].mlp
    if kind == "frozen":
        unit.requires_grad_(False)
    trained = [parameter for parameter in unit.parameters() if parameter.requires_grad]
    hidden = torch.randn(2, 5, 48, generator=torch_generator(5, "hidden"), requires_grad=True)
    mine = unit(hidden)
    seen: list[Tensor] = []
    hook = unit.down_proj.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    theirs = unit(hidden)  # with a hook the product exists, and is shown
    hook.remove()
    expected = functional.silu(unit.gate_proj(hidden)) * unit.up_proj(hidden)
    torch.testing.assert_close(seen[0], expected)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    wanted = [hidden, *trained]
    for one, other in zip(gradients(mine, *wanted), gradients(theirs, *wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_an_untrained_adapter_and_an_adapter_that_is_off_change_no_bit(tiny_llama: Build) -> None:
    ids = torch.arange(12).view(2, 6)
    plain = tiny_llama()
    model = tiny_llama()
    add_lora(model, LoraSettings(r=4), seed=1)
    with torch.no_grad():
        assert torch.equal(model(ids), plain(ids))
    lively = adapted(tiny_llama)
    with torch.no_grad():
        assert not torch.equal(lively(ids), plain(ids))
        for _, layer in lora_layers(lively):
            layer.enable_adapters(False)
        assert torch.equal(lively(ids), plain(ids))


@pytest.mark.parametrize(
    ("change", "covered"),
    [
        (lambda layer: layer.eval(), True),
        (lambda layer: layer.lora_dropout.update({"default": nn.Dropout(0.5)}), False),
        (lambda layer: layer.enable_adapters(False), False),
        (lambda layer: layer.merge(), False),
        (lambda layer: layer.base_layer.weight.requires_grad_(True), False),
        (lambda layer: layer.lora_A.double(), False),
    ],
    ids=["eval", "dropout", "off", "merged", "base trained", "other type"],
)
def test_what_is_not_covered_goes_through_peft(
    tiny_llama: Build, change: Callable[[Any], Any], covered: bool
) -> None:
    (layer,) = (layer for name, layer in lora_layers(adapted(tiny_llama)) if name.endswith("0.mlp.down_proj"))
    assert layer._parts() is not None
    change(layer)
    assert (layer._parts() is not None) == covered


def test_dora_goes_through_peft(tiny_llama: Build) -> None:
    for _, layer in lora_layers(adapted(tiny_llama, dora=True)):
        assert layer._parts() is None


def test_the_product_of_gate_and_up_is_not_kept(tiny_llama: Build) -> None:
    for model in (tiny_llama(), adapted(tiny_llama)):
        unit: FeedForward = model.model.layers[0].mlp
        width = unit.up_proj.weight.shape[0] if hasattr(unit.up_proj, "weight") else 96
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor, kept: dict[int, Tensor] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = unit(torch.randn(1, 11, 48, requires_grad=True))
        assert sum(tensor.shape == (1, 11, width) for tensor in kept.values()) == 2  # gate and up
        assert output.shape == (1, 11, 48)
