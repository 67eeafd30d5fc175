"""AdamW over float32 masters: against torch's own, and what bfloat16 would lose without masters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from puna.core.errors import PunaError
from puna.core.seeds import torch_generator
from puna.train.optimizer import Optimizer, OptimizerSettings


def layer(dtype: torch.dtype = torch.float32) -> nn.Linear:
    made = nn.Linear(6, 4)
    generator = torch_generator(0, "layer")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made.to(dtype)


def inputs(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(8, 6, generator=torch_generator(1, "inputs")).to(dtype)


def test_float32_steps_are_those_of_torch() -> None:
    ours, theirs = layer(), layer()
    optimizer = Optimizer(
        ours.named_parameters(),
        OptimizerSettings(1e-2, weight_decay=0.1, betas=(0.8, 0.95), max_grad_norm=0.5),
    )
    reference = torch.optim.AdamW(
        [{"params": [theirs.weight], "weight_decay": 0.1}, {"params": [theirs.bias], "weight_decay": 0.0}],
        betas=(0.8, 0.95),
    )
    for schedule_factor in (0.5, 1.0, 1.0, 0.3):
        ours(inputs()).square().sum().backward()
        norm = optimizer.gradient_norm(32)
        assert optimizer.step(schedule_factor, 32, norm) == pytest.approx(1e-2 * schedule_factor)
        reference.zero_grad()
        theirs(inputs()).square().sum().div(32).backward()
        assert float(nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)) == pytest.approx(norm, rel=1e-5)
        for group in reference.param_groups:
            group["lr"] = 1e-2 * schedule_factor
        reference.step()
        assert not optimizer.gradient.any()
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.bias, theirs.bias)


def test_no_clipping_at_zero_and_below_the_limit() -> None:
    moved = {}
    for limit in (0.0, 1e6, 1e-3):
        module = layer()
        optimizer = Optimizer(module.named_parameters(), OptimizerSettings(1e-2, max_grad_norm=limit))
        module(inputs()).square().sum().backward()
        optimizer.step(1.0, 1.0, optimizer.gradient_norm(1.0))
        moved[limit] = optimizer.moments()["first/weight"].clone()
    assert torch.equal(moved[0.0], moved[1e6])
    assert float(moved[1e-3].norm()) < 1e-3 < float(moved[0.0].norm())


def test_embeddings_and_head_take_their_own_learning_rate(tiny_llama: Callable[..., Any]) -> None:
    moved = {}
    for factor in (1.0, 0.1):
        model = tiny_llama(tie_word_embeddings=False)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimizer = Optimizer(
            model.named_parameters(), OptimizerSettings(1e-2, embedding_factor=factor, max_grad_norm=0.0)
        )
        ids = torch.arange(20)[None]
        model(ids).square().sum().backward()
        optimizer.step(1.0, 1.0, optimizer.gradient_norm(1.0))
        moved[factor] = {
            name: float((parameter.detach() - before[name]).abs().max())
            for name, parameter in model.named_parameters()
        }
    for name in moved[1.0]:
        scaled = name in ("model.embed_tokens.weight", "lm_head.weight")
        assert moved[0.1][name] == pytest.approx(moved[1.0][name] * (0.1 if scaled else 1.0), rel=1e-3)


def test_bfloat16_updates_too_small_to_round_still_add_up() -> None:
    """A step of 1e-4 on a weight of 1 is lost in bfloat16, whose spacing there is 2 ** -8."""
    module = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.ones_(module.weight)
    optimizer = Optimizer(module.named_parameters(), OptimizerSettings(1e-4))
    for _ in range(50):
        module(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        optimizer.step(1.0, 1.0, optimizer.gradient_norm(1.0))
    assert float(optimizer.weights()["weight"]) == pytest.approx(1 - 50e-4, rel=1e-4)
    assert float(module.weight.detach()) == float(torch.tensor(1 - 50e-4).bfloat16())
    assert module.weight.dtype == torch.bfloat16


def test_bfloat16_gradients_gather_in_float32_and_are_freed() -> None:
    module = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    optimizer = Optimizer(module.named_parameters(), OptimizerSettings(1e-4))
    for _ in range(1000):
        module(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        assert module.weight.grad is None
    assert optimizer.gradient.tolist() == [1000.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restoring_goes_on_bit_for_bit(dtype: torch.dtype) -> None:
    def advance(module: nn.Linear, optimizer: Optimizer, steps: int) -> None:
        for _ in range(steps):
            module(inputs(dtype)).square().sum().backward()
            optimizer.step(1.0, 8.0, optimizer.gradient_norm(8.0))

    whole = layer(dtype)
    straight = Optimizer(whole.named_parameters(), OptimizerSettings(1e-2, weight_decay=0.1))
    advance(whole, straight, 3)
    saved = [{k: v.clone() for k, v in part.items()} for part in (straight.weights(), straight.moments())]
    advance(whole, straight, 3)
    other = nn.Linear(6, 4).to(dtype)
    resumed = Optimizer(other.named_parameters(), OptimizerSettings(1e-2, weight_decay=0.1))
    resumed.restore(*saved, 3)
    advance(other, resumed, 3)
    assert torch.equal(whole.weight, other.weight)
    for name, tensor in straight.moments().items():
        assert torch.equal(tensor, resumed.moments()[name])


def test_frozen_parameters_are_left_out_and_nothing_to_train_is_an_error() -> None:
    module = layer()
    module.weight.requires_grad_(False)
    optimizer = Optimizer(module.named_parameters(), OptimizerSettings(1e-2))
    assert list(optimizer.weights()) == ["bias"] and optimizer.count == 4
    module.bias.requires_grad_(False)
    with pytest.raises(PunaError, match="nothing to train"):
        Optimizer(module.named_parameters(), OptimizerSettings(1e-2))


def test_closing_takes_hooks_and_gradients_off_the_model() -> None:
    module = layer(torch.bfloat16)
    optimizer = Optimizer(module.named_parameters(), OptimizerSettings(1e-2))
    optimizer.close()
    module(inputs(torch.bfloat16)).sum().backward()
    assert module.weight.grad is not None and not optimizer.gradient.any()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_embedding_gathers_the_gradient_that_autograd_gives(
    tiny_llama: Callable[..., Any], tied: bool, dtype: torch.dtype
) -> None:
    """Rows that occur twice, rows of two micro-batches, and the head's part where it is the same matrix."""
    ids = torch.tensor([[5, 6, 5, 7, 9, 5, 300]])

    def losses(model: Any) -> Iterator[torch.Tensor]:
        for part in (ids, ids.flip(1)):
            yield model(part).logsumexp(-1).sum()

    plain = tiny_llama(tie_word_embeddings=tied).to(dtype)
    sum(losses(plain)).backward()
    expected = plain.model.embed_tokens.weight.grad.float()
    model = tiny_llama(tie_word_embeddings=tied).to(dtype)
    optimizer = Optimizer(model.named_parameters(), OptimizerSettings(1e-3))
    for loss in losses(model):
        loss.backward()
    gathered = optimizer.masters["model.embed_tokens.weight"].grad
    assert gathered is not None and bool(gathered[5].any()) and (tied or not gathered[100].any())
    torch.testing.assert_close(gathered, expected, rtol=0.02 if dtype == torch.bfloat16 else 1e-5, atol=1e-3)
    optimizer.close()
    assert not hasattr(model.model.embed_tokens.weight, "gradient_sink")
