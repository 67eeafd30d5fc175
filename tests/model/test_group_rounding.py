"""What quantisation leaves of weights, against the kernels that pack them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.model.adapters import LoraSettings, add_lora
from puna.model.group_rounding import GROUP, LEVELS, on_grid, rounded_copy
from puna.model.native.build import CompilationError
from puna.model.stepper import Read
from puna.model.steppers import make_stepper


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(1, 100), st.sampled_from([15, 255]), st.integers(0, 9))
def test_a_weight_moves_by_half_a_step_at_most_and_stays_where_it_is_put(
    outputs: int, inputs: int, levels: int, seed: int
) -> None:
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    rounded = on_grid(weight, levels)
    for start in range(0, inputs, GROUP):
        group, left = weight[:, start : start + GROUP], rounded[:, start : start + GROUP]
        width = group.amax(1) - group.amin(1)
        # Half a step, and what half precision does to the step and to the smallest weight.
        bound = width / levels * 0.5 + (width + group.abs().amax(1)) * 2**-10
        assert bool(((group - left).abs().amax(1) <= bound + 1e-6).all())
        assert all(len(row.unique()) <= levels + 1 for row in left)
    assert torch.allclose(on_grid(rounded, levels), rounded, atol=1e-3 * float(weight.abs().max()))


def test_equal_weights_stay_as_half_precision_has_them() -> None:
    assert torch.equal(on_grid(torch.full((2, 40), 0.375), 15), torch.full((2, 40), 0.375))


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_the_plain_stepper_computes_with_the_weights_that_the_kernels_pack(
    tiny_llama: Callable[..., Any], quantize: Any
) -> None:
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    ids = [7 * place % 320 for place in range(60)]

    def logits(stepper: Any) -> torch.Tensor:
        return stepper.logits(stepper.step([Read(stepper.sequence(), ids, 60)])[0])

    plain = make_stepper(model, cache_tokens=64, kernels="plain", quantize=quantize)
    exact = logits(make_stepper(model, cache_tokens=64, kernels="plain"))
    rounded = logits(plain)
    assert (rounded - exact).abs().max() > 1e-4
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert plain.weight_bytes == 4 * model.spec.parameter_count()
    try:
        native = make_stepper(model, cache_tokens=64, kernels="native", quantize=quantize)
    except CompilationError:
        pytest.skip("no compiler here")
    # The kernels also round activations, to int8.
    assert (logits(native) - rounded).abs().mean() < 0.5 * (rounded - exact).abs().mean() + 2e-3


def test_the_head_keeps_eight_bits(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama(tie_word_embeddings=False)
    twin = rounded_copy(model, "int4")
    assert torch.equal(twin.head_weight, on_grid(model.head_weight, LEVELS["int8"]))
    assert torch.equal(twin.model.embed_tokens.weight, model.model.embed_tokens.weight)
    for of in ("self_attn.q_proj", "mlp.down_proj"):
        exact, rounded = (m.model.layers[1].get_submodule(of).weight for m in (model, twin))
        assert torch.equal(rounded, on_grid(exact, LEVELS["int4"]))


def test_an_adapter_has_to_be_merged_first(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    add_lora(model, LoraSettings(r=2), seed=0)
    with pytest.raises(PunaError, match="merge the adapter first"):
        make_stepper(model, cache_tokens=16, kernels="plain", quantize="int8")
