"""The quick dropout is dropout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from puna.model.adapters import LoraSettings, add_lora
from puna.train.dropout import Dropout, quicken


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_share_and_mean_are_those_of_dropout(p: float, dtype: torch.dtype) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ones = torch.ones(333, 301, dtype=dtype)  # no multiple of four
        out = Dropout(p)(ones)
    count = ones.numel()
    zeros = int((out == 0).sum())
    assert abs(zeros - p * count) < 5 * (p * (1 - p) * count) ** 0.5
    kept = out[out != 0].unique()
    assert kept.tolist() == pytest.approx([1 / (1 - p)], rel=1e-2 if dtype == torch.bfloat16 else 1e-4)
    by_column = (out == 0).float().mean(0)
    assert float((by_column - p).abs().max()) < 6 * (p * (1 - p) / 333) ** 0.5


def test_gradient_passes_where_the_value_did() -> None:
    hidden = torch.randn(5, 7, requires_grad=True)
    out = Dropout(0.4)(hidden)
    out.backward(torch.ones_like(out))
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad * hidden.detach(), out.detach())
    assert (hidden.grad == 0).any() and (hidden.grad != 0).any()


def test_no_dropout_when_evaluating_or_at_zero() -> None:
    hidden = torch.randn(5, 7)
    assert Dropout(0.4).eval()(hidden) is hidden
    assert Dropout(0.0)(hidden) is hidden


def test_draws_follow_the_global_generator() -> None:
    hidden = torch.ones(50, 50)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first, second = Dropout(0.5)(hidden), Dropout(0.5)(hidden)
        torch.manual_seed(3)
        again = Dropout(0.5)(hidden)
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_every_dropout_of_an_adapter_is_replaced(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    add_lora(model, LoraSettings(r=2, dropout=0.25), seed=0)
    model.train()
    before = sum(isinstance(module, nn.Dropout) for module in model.modules())
    quicken(model)
    found = [module for module in model.modules() if isinstance(module, Dropout)]
    assert len(found) == before == 14
    assert all(module.p == 0.25 and module.training for module in found)
    assert not any(isinstance(module, nn.Dropout) for module in model.modules())
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model.eval().hidden(ids), tiny_llama().hidden(ids))
