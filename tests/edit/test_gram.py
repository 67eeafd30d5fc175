"""Sums of X^T X of which half is computed."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.edit.gram import add_gram, mirror


@settings(deadline=None, max_examples=20)
@given(width=st.integers(1, 450), rows=st.integers(1, 5), seed=st.integers(0, 100))
def test_the_mirrored_half_is_the_whole_product(width: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(rows, width, dtype=torch.float64, generator=generator) for _ in range(2))
    sums = torch.zeros(width, width, dtype=torch.float64)
    add_gram(sums, first)
    add_gram(sums, second)
    torch.testing.assert_close(mirror(sums), first.T @ first + second.T @ second, rtol=1e-12, atol=1e-12)
    assert torch.equal(sums, sums.T)
