"""The chunked loss equals the plain formula, in value and in every gradient."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from puna.core.seeds import torch_generator
from puna.train.objectives import IGNORED, linear_cross_entropy, linear_log_probs


def make(rows: int, width: int, vocabulary: int, share: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch_generator(seed, "objectives")
    hidden = torch.randn(rows, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) >= share] = IGNORED
    return hidden, weight, labels


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(
        (hidden @ weight.T).float(), labels, ignore_index=IGNORED, reduction="sum"
    )


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 70),
    vocabulary=st.integers(2, 60),
    chunk=st.integers(1, 40),
    share=st.floats(0.0, 1.0),
    seed=st.integers(0, 1000),
)
def test_value_and_gradients_equal_the_plain_formula(
    rows: int, vocabulary: int, chunk: int, share: float, seed: int
) -> None:
    hidden, weight, labels = make(rows, 8, vocabulary, share, seed)
    ours = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    theirs = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = linear_cross_entropy(*ours, labels, chunk=chunk)
    expected = plain(*theirs, labels)
    (3 * loss.total).backward()
    (3 * expected).backward()
    assert loss.targets == int((labels != IGNORED).sum())
    scale = max(1.0, float(expected.detach()))
    assert abs(float(loss.total.detach() - expected.detach())) / scale < 1e-6
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.grad is not None
        reference = torch.zeros_like(mine) if other.grad is None else other.grad
        torch.testing.assert_close(mine.grad, reference, rtol=1e-5, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 70),
    vocabulary=st.integers(2, 60),
    chunk=st.integers(1, 40),
    share=st.floats(0.0, 1.0),
    seed=st.integers(0, 1000),
    needs=st.sampled_from([(True, True), (True, False), (False, True)]),
)
def test_log_probs_and_their_gradients_equal_the_plain_formula_token_by_token(
    rows: int, vocabulary: int, chunk: int, share: float, seed: int, needs: tuple[bool, bool]
) -> None:
    tensors = make(rows, 8, vocabulary, share, seed)
    labels = tensors[2]
    ours = [tensor.clone().requires_grad_(need) for tensor, need in zip(tensors, needs, strict=False)]
    theirs = [tensor.clone().requires_grad_(need) for tensor, need in zip(tensors, needs, strict=False)]
    found = linear_log_probs(*ours, labels, chunk=chunk)
    every = (theirs[0] @ theirs[1].T).log_softmax(-1)
    wanted = every.gather(1, labels.clamp(min=0)[:, None])[:, 0][labels != IGNORED]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    scales = torch.linspace(-2, 3, len(wanted))  # every token its own
    (found * scales).sum().backward()
    (wanted * scales).sum().backward()
    for mine, other, need in zip(ours, theirs, needs, strict=True):
        assert (mine.grad is not None) == need
        if need:
            reference = torch.zeros_like(other) if other.grad is None else other.grad
            torch.testing.assert_close(mine.grad, reference, rtol=1e-5, atol=1e-5)


def test_log_probs_are_the_losses_of_the_fused_cross_entropy_to_the_bit() -> None:
    hidden, weight, labels = make(40, 16, 97, 0.7, 1)
    assert torch.equal(
        -linear_log_probs(hidden, weight, labels, chunk=7),
        linear_cross_entropy(hidden, weight, labels, chunk=7).tokens,
    )


def test_float32_gradients_agree_to_a_millionth() -> None:
    hidden, weight, labels = make(40, 16, 97, 0.7, 1)
    ours = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    theirs = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    linear_cross_entropy(*ours, labels, chunk=7).total.div(40).backward()
    plain(*theirs, labels).div(40).backward()
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.grad is not None and other.grad is not None
        assert (mine.grad - other.grad).abs().max() < 1e-6


def test_token_losses_come_in_reading_order_and_sum_to_the_total() -> None:
    hidden, weight, labels = make(30, 8, 20, 0.5, 2)
    loss = linear_cross_entropy(hidden.view(5, 6, 8), weight, labels.view(5, 6), chunk=4)
    each = functional.cross_entropy(hidden @ weight.T, labels.clamp(min=0), reduction="none")[
        labels != IGNORED
    ]
    torch.testing.assert_close(loss.tokens, each)
    torch.testing.assert_close(loss.total, each.sum())


def test_frozen_weight_gets_no_gradient_and_no_work() -> None:
    hidden, weight, labels = make(20, 8, 30, 1.0, 3)
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels)
    assert loss.total.grad_fn is not None
    saved = loss.total.grad_fn.saved_tensors  # type: ignore[attr-defined]
    assert saved[0] is not None
    assert saved[1] is None, "the head's gradient was made although the head is frozen"
    loss.total.backward()
    assert hidden.grad is not None and weight.grad is None


def test_unlabelled_positions_get_exactly_zero_gradient() -> None:
    hidden, weight, labels = make(50, 8, 30, 0.5, 4)
    hidden.requires_grad_()
    linear_cross_entropy(hidden, weight, labels, chunk=8).total.backward()
    assert hidden.grad is not None
    assert not hidden.grad[labels == IGNORED].any()
    assert hidden.grad[labels != IGNORED].abs().sum(dim=1).min() > 0


def test_extreme_logits_stay_finite_and_right() -> None:
    hidden = torch.tensor([[300.0, 0.0], [0.0, 300.0]])
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0, 0]))
    assert loss.tokens.tolist() == [0.0, 300.0]


def test_bfloat16_takes_its_softmax_in_float32() -> None:
    hidden, weight, labels = make(64, 32, 500, 1.0, 5)
    hidden, weight = (hidden / 4).bfloat16(), weight.bfloat16()
    exact = functional.cross_entropy((hidden @ weight.T).float(), labels, reduction="none")
    loss = linear_cross_entropy(hidden, weight, labels, chunk=16)
    assert loss.tokens.dtype == torch.float32
    torch.testing.assert_close(loss.tokens, exact, rtol=1e-6, atol=1e-6)


def test_bfloat16_sums_the_heads_gradient_over_chunks_in_float32() -> None:
    """A thousand equal small contributions: a bfloat16 sum would stall at 256 times one of them."""
    hidden = torch.ones(1024, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    linear_cross_entropy(hidden, weight, torch.zeros(1024, dtype=torch.int64), chunk=1).total.backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[-512.0], [512.0]]


def test_tied_embeddings_get_both_gradients(tiny_llama: Any) -> None:
    ids = torch.randint(320, (2, 12), generator=torch_generator(0, "ids"))
    labels = torch.roll(ids, -1, dims=1)
    labels[:, -1] = IGNORED
    grads = []
    for tied in (True, False):
        model = tiny_llama(tie_word_embeddings=tied)
        if not tied:
            model.load_state_dict({**tiny_llama().state_dict(), "lm_head.weight": tiny_llama().head_weight})
        loss = linear_cross_entropy(model.hidden(ids), model.head_weight, labels)
        loss.total.backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    embedding = "model.embed_tokens.weight"
    torch.testing.assert_close(grads[0][embedding], grads[1][embedding] + grads[1]["lm_head.weight"])
    reference = tiny_llama()
    plain(reference.hidden(ids).flatten(0, 1), reference.head_weight, labels.flatten()).backward()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(grads[0][name], parameter.grad, rtol=1e-4, atol=1e-5)
