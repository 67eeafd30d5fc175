"""The reward objective equals trl's RewardTrainer at alpha 0; squared errors count where scores exist."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.core.seeds import torch_generator
from puna.train.reward import RewardSettings, bradley_terry
from tests.train.trl_bodies import logits_model, trainer

NAN = float("nan")


def test_alpha_zero_equals_trl_in_value_and_gradient() -> None:
    trl = pytest.importorskip("trl")
    ours = (3 * torch.randn(14, generator=torch_generator(0, "rewards"))).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    body = trainer(trl.RewardTrainer, args=SimpleNamespace(center_rewards_coefficient=None))
    inputs = {"attention_mask": torch.ones(14, 3)}
    expected = body.compute_loss(logits_model(theirs[:, None]), inputs)
    scores = torch.ones(7)
    for found in (
        bradley_terry(*ours.chunk(2), RewardSettings()),
        bradley_terry(*ours.chunk(2), RewardSettings(), chosen_scores=scores, rejected_scores=scores),
    ):
        assert found.losses.shape == (7,)
        assert abs(float((found.losses.mean() - expected).detach())) < 1e-6
    found.losses.mean().backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-6)


def test_squared_errors_are_added_with_their_weight() -> None:
    found = bradley_terry(
        torch.tensor([2.0]),
        torch.tensor([-1.0]),
        RewardSettings(alpha=0.5),
        chosen_scores=torch.tensor([1.5]),
        rejected_scores=torch.tensor([0.0]),
    )
    assert float(found.losses) == pytest.approx(math.log1p(math.exp(-3)) + 0.5 * (0.25 + 1.0), abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), alpha=st.floats(0.01, 10), absent=st.lists(st.integers(0, 3), min_size=6))
def test_rows_without_a_score_enter_the_ranking_only(seed: int, alpha: float, absent: list[int]) -> None:
    """Each row lacks no score, the chosen's, the rejected's or both: the last three count as unscored."""
    rewards = torch.randn(2, 6, generator=torch_generator(seed, "rewards"), requires_grad=True)
    scores = torch.randn(2, 6, generator=torch_generator(seed, "scores"))
    for row in range(6):
        if absent[row] & 1:
            scores[0, row] = NAN
        if absent[row] & 2:
            scores[1, row] = NAN
    found = bradley_terry(*rewards, RewardSettings(alpha), chosen_scores=scores[0], rejected_scores=scores[1])
    plain = bradley_terry(*rewards, RewardSettings())
    unscored = torch.tensor([kind != 0 for kind in absent[:6]])
    assert torch.equal(found.scored, ~unscored)
    assert torch.equal(found.losses[unscored], plain.losses[unscored])
    gradient = torch.autograd.grad(found.losses.sum(), rewards)[0]
    expected = torch.autograd.grad(plain.losses.sum(), rewards)[0]
    assert gradient.isfinite().all()
    assert torch.equal(gradient[:, unscored], expected[:, unscored])
    errors = 2 * alpha * (rewards.detach() - scores)
    torch.testing.assert_close(
        gradient[:, ~unscored], (expected + errors)[:, ~unscored], rtol=1e-5, atol=1e-5
    )


def test_rewards_of_pairs_alone_are_free_to_shift_and_scores_fix_the_shift() -> None:
    chosen, rejected = torch.tensor([1.0, 0.5]), torch.tensor([0.0, 1.0])
    scores = {"chosen_scores": torch.tensor([1.0, 0.5]), "rejected_scores": torch.tensor([0.0, 1.0])}
    pairs = bradley_terry(chosen, rejected, RewardSettings()).losses
    torch.testing.assert_close(bradley_terry(chosen + 3, rejected + 3, RewardSettings()).losses, pairs)
    near = bradley_terry(chosen, rejected, RewardSettings(1.0), **scores).losses
    far = bradley_terry(chosen + 3, rejected + 3, RewardSettings(1.0), **scores).losses
    torch.testing.assert_close(near, pairs)
    torch.testing.assert_close(far - near, torch.full((2,), 18.0))


def test_bad_settings_and_inputs_are_refused() -> None:
    two, three = torch.zeros(2), torch.zeros(3)
    for alpha in (-0.1, NAN, math.inf):
        with pytest.raises(PunaError, match="alpha"):
            RewardSettings(alpha)
    with pytest.raises(PunaError, match="rejected has another shape"):
        bradley_terry(two, three, RewardSettings())
    with pytest.raises(PunaError, match="no rejected_scores"):
        bradley_terry(two, two, RewardSettings(1.0), chosen_scores=two)
    with pytest.raises(PunaError, match="chosen_scores has another shape"):
        bradley_terry(two, two, RewardSettings(1.0), chosen_scores=three, rejected_scores=two)
    with pytest.raises(PunaError, match="infinite"):
        bradley_terry(two, two, RewardSettings(1.0), chosen_scores=two + math.inf, rejected_scores=two)
