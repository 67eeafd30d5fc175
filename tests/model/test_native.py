"""The native kernels compute what the decoder computes, to the rounding of their number formats."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from puna.core.errors import PunaError
from puna.model.native.stepper import NativeStepper
from puna.model.rope import depends_on_length
from puna.model.spec import LlamaSpec, RopeRule
from puna.model.stepper import Read
from tests.model.native_models import BLOCK, SPECS, hidden_of, ids_of, little, logits_of

LONG = 330  # beyond one span of keys


def native_logits(model: Any, ids: list[int], **settings: Any) -> Tensor:
    stepper = NativeStepper(model, cache_tokens=len(ids), **settings)
    return stepper.logits(hidden_of(stepper, ids, [len(ids)]))


def error(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of what was expected."""
    return float((found - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt())


@pytest.mark.parametrize("name", SPECS)
def test_float32_gives_the_decoders_logits(name: str) -> None:
    model = little(SPECS[name])
    ids = ids_of(model.spec, LONG)
    expected = logits_of(model, ids)
    assert (native_logits(model, ids) - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize("name", SPECS)
def test_bfloat16_is_as_near_to_the_truth_as_torchs(name: str) -> None:
    exact = little(SPECS[name])
    model = copy.deepcopy(exact).bfloat16()
    exact.load_state_dict(model.state_dict())  # the truth of the rounded weights
    ids = ids_of(model.spec, LONG)
    expected = logits_of(exact, ids)
    assert error(native_logits(model, ids), expected) < 1.1 * error(logits_of(model, ids), expected)


def on_grid(rows: Tensor, steps: int) -> Tensor:
    """Weights [outputs, inputs] as scale * integer + minimum, for each group of 32 inputs."""
    groups = []
    for group in rows.split(32, dim=1):
        low, high = group.amin(1, keepdim=True), group.amax(1, keepdim=True)
        scale, low = ((high - low) / steps).half().float(), low.half().float()
        groups.append(((group - low) / scale).round().clamp(0, steps) * scale + low)
    return torch.cat(groups, dim=1)


def rounded(rows: Tensor) -> Tensor:
    """Activations as int8 with a scale for each group of 32."""
    groups = []
    for group in rows.split(32, dim=-1):
        scale = group.abs().amax(-1, keepdim=True) / 127
        groups.append((group / scale.clamp(min=1e-30)).round() * scale)
    return torch.cat(groups, dim=-1)


class Rounded(nn.Module):
    """A linear layer over weights on a grid and rounded activations."""

    def __init__(self, linear: Any, steps: int) -> None:
        super().__init__()
        self.weight, self.bias = on_grid(linear.weight.data, steps), linear.bias

    def forward(self, rows: Tensor) -> Tensor:
        return nn.functional.linear(rounded(rows), self.weight, self.bias)


def quantised(model: Any, steps: int) -> Any:
    """The decoder in float32 with every matrix as the kernels see it."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, own = name.rpartition(".")
            setattr(twin.get_submodule(parent), own, Rounded(module, 255 if name == "lm_head" else steps))
    if model.spec.tied:
        twin.model.embed_tokens.weight.data = on_grid(model.model.embed_tokens.weight.data, 255)
    return twin


def quantised_error(spec: LlamaSpec, quantize: Any) -> tuple[float, float]:
    """Of the kernels against the decoder with rounded matrices, and of that against the exact one."""
    model = little(spec)
    ids = ids_of(spec, LONG)
    twin = quantised(model, 255 if quantize == "int8" else 15)
    with torch.no_grad():
        hidden = twin.hidden(torch.tensor([ids]))[0]
        expected = twin.logits(rounded(hidden) if spec.tied else hidden)
    return error(native_logits(model, ids, quantize=quantize), expected), error(
        logits_of(model, ids), expected
    )


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("width", [32, 45, 96])
@pytest.mark.parametrize("hidden", [64, 50])
def test_integers_compute_with_the_weights_that_rounding_left(quantize: Any, width: int, hidden: int) -> None:
    """Without attention nothing else is rounded: the kernels' numbers are those of the rounded matrices."""
    block = dataclasses.replace(BLOCK, attention="none", width=width)
    found, moved = quantised_error(LlamaSpec(90, hidden, (block, block), tied=hidden == 50), quantize)
    assert found < 2e-3 < moved


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("name", SPECS)
def test_with_attention_integers_add_the_rounding_of_keys_and_values(name: str, quantize: Any) -> None:
    found, moved = quantised_error(SPECS[name], quantize)
    assert found < (0.05 if quantize == "int8" else 0.3 * moved)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_weights_that_lie_on_the_grid_already_come_out_unchanged(quantize: Any) -> None:
    """A 4-bit file opened and quantised again is the same model."""
    steps = 255 if quantize == "int8" else 15
    exact = little(LlamaSpec(64, 64, (dataclasses.replace(BLOCK, width=64),), tied=False))
    for name, parameter in exact.named_parameters():
        if parameter.dim() == 2 and name != "model.embed_tokens.weight":
            parameter.data = on_grid(parameter.data, 255 if name == "lm_head.weight" else steps)
    again = copy.deepcopy(exact)
    for name, parameter in again.named_parameters():
        if parameter.dim() == 2 and name != "model.embed_tokens.weight":
            parameter.data = on_grid(parameter.data, 255 if name == "lm_head.weight" else steps)
            torch.testing.assert_close(parameter.data, exact.get_parameter(name).data, atol=1e-6, rtol=1e-4)
    ids = ids_of(exact.spec, 40)
    first, second = (native_logits(model, ids, quantize=quantize) for model in (exact, again))
    assert error(first, second) < 1e-3


RULES = {
    "linear": RopeRule("linear", factor=2.0),
    "llama3": RopeRule(
        "llama3", factor=8.0, original_max_positions=64, low_freq_factor=1.0, high_freq_factor=4.0
    ),
    "yarn": RopeRule("yarn", factor=4.0, original_max_positions=64),
}


@pytest.mark.parametrize("rule", RULES)
def test_every_rotation_that_goes_by_position_alone_is_the_decoders(rule: str) -> None:
    model = little(SPECS["grouped, tied"].replace(rope=RULES[rule]))
    ids = ids_of(model.spec, 100)
    assert (native_logits(model, ids) - logits_of(model, ids)).abs().max() < 1e-4


def test_rotations_grow_with_the_text() -> None:
    model = little(SPECS["grouped, tied"].replace(max_positions=64))
    ids = ids_of(model.spec, 300)
    assert (native_logits(model, ids) - logits_of(model, ids)).abs().max() < 1e-4


def test_weight_bytes_are_those_of_the_layout() -> None:
    spec = LlamaSpec(
        64, 64, (dataclasses.replace(BLOCK, heads=4, kv_heads=2, head_dim=16, width=64),), tied=True
    )
    model = little(spec)
    weights = (64 + 32 + 32) * 64 + 64 * 64 + 3 * 64 * 64  # of the layer
    norms = 4 * 3 * 64
    bits = {None: 32, "int8": 9, "int4": 5}
    for quantize, size in bits.items():
        head = 64 * 64 * (32 if quantize is None else 9)
        stepper = NativeStepper(model, cache_tokens=16, quantize=quantize)  # type: ignore[arg-type]
        assert stepper.weight_bytes == (weights * size + head) // 8 + norms
        per_number = 4 if quantize is None else 2
        assert stepper.pool.bytes_per_block == 2 * 16 * 2 * 16 * per_number


def refusals() -> dict[str, Callable[[], Any]]:
    def hooked() -> Any:
        model = little(SPECS["grouped, tied"])
        model.model.layers[0].register_forward_hook(lambda *given: None)
        return model

    def adapted() -> Any:
        model = little(SPECS["grouped, tied"])
        model.model.layers[1].self_attn.q_proj = nn.Sequential(model.model.layers[1].self_attn.q_proj)
        return model

    def stretched() -> Any:
        rule = RopeRule("dynamic", factor=2.0, original_max_positions=2048)
        assert depends_on_length(rule)
        return little(SPECS["grouped, tied"].replace(rope=rule))

    return {
        "run its hooks": hooked,
        "plain linear layers": adapted,
        "float32 or bfloat16": lambda: little(SPECS["grouped, tied"]).half(),
        "run on the CPU": lambda: little(SPECS["grouped, tied"]).to("meta"),
        "rotations that do not depend": stretched,
        "at most 1024": lambda: little(SPECS["wide heads"].replace(head_dim=1026)),
        "attend both ways": lambda: little(SPECS["grouped, tied"].replace(causal=False)),
    }


@pytest.mark.parametrize("message", refusals())
def test_what_the_kernels_cannot_run_is_refused(message: str) -> None:
    with pytest.raises(PunaError, match=message):
        NativeStepper(refusals()[message](), cache_tokens=16)


def test_reads_that_make_no_sense_are_refused_and_change_nothing() -> None:
    model = little(SPECS["grouped, tied"])
    stepper, other = (NativeStepper(model, cache_tokens=64) for _ in range(2))
    sequence = stepper.sequence()
    wrong = {
        "outside the vocabulary": Read(sequence, [5, 320]),
        "needs tokens": Read(sequence, [], 0),
        "at most one hidden state": Read(sequence, [5], 2),
        "another stepper": Read(other.sequence(), [5]),
        "no room": Read(sequence, [5] * 65),
    }
    for message, read in wrong.items():
        with pytest.raises(PunaError, match=message):
            stepper.step([Read(stepper.sequence(), [1]), read])
        assert sequence.length == 0 and stepper.pool.used == 0
