"""Preference objectives equal trl's own code to a millionth, in value and gradient, and keep their laws.

trl 1.16 has DPO, IPO and length-normalised DPO (as ``sigmoid_norm``) in its DPOTrainer and KTO in its
KTOTrainer; ORPO, CPO and SimPO (a loss type of CPO) in ``trl.experimental``. It has no label smoothing of
DPO's sigmoid any more: its ``aot`` loss on a batch of one pair is that formula and stands in for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from puna.core.errors import PunaError
from puna.core.seeds import torch_generator
from puna.train.preference import (
    AnswerPairs,
    CpoSettings,
    DpoSettings,
    IpoSettings,
    KtoSettings,
    LengthNormalisedDpoSettings,
    OrpoSettings,
    PreferenceLoss,
    SimpoSettings,
    cpo,
    dpo,
    ipo,
    kto,
    kto_baseline,
    length_normalised_dpo,
    orpo,
    simpo,
)
from tests.train.trl_bodies import logits_model, scored_model, trainer

LENGTHS = [(1, 1), (3, 7), (7, 3), (5, 5), (2, 9)]
WIDTH = 10  # positions of a row in trl's batches: a prompt of one token, then at most nine of the answer
VOCABULARY = 13
REFERENCE_FREE: list[tuple[Callable[..., PreferenceLoss], Any]] = [
    (orpo, OrpoSettings()),
    (simpo, SimpoSettings()),
    (cpo, CpoSettings()),
]
WITH_REFERENCE: list[tuple[Callable[..., PreferenceLoss], Any]] = [
    (dpo, DpoSettings()),
    (dpo, DpoSettings(label_smoothing=0.2)),
    (length_normalised_dpo, LengthNormalisedDpoSettings()),
    (ipo, IpoSettings()),
]
ALL = [*REFERENCE_FREE, *WITH_REFERENCE]


def answer_mask(lengths: tuple[int, int]) -> Tensor:
    """[2, WIDTH]: 1 at the tokens of the chosen and of the rejected answer."""
    places = torch.arange(WIDTH)
    return torch.stack([(places >= 1) & (places <= length) for length in lengths]).long()


def token_log_probs(pair: int, mask: Tensor, who: str) -> Tensor:
    """Log-probabilities [2, WIDTH - 1] of predicted tokens, 0 elsewhere, as trl's head gives them."""
    drawn = -3 * torch.rand(2, WIDTH - 1, generator=torch_generator(pair, who))
    return drawn * mask[:, 1:]


def summed(policy: Tensor, reference: Tensor | None, mask: Tensor) -> AnswerPairs:
    """The same numbers as puna's arguments: one pair."""
    chosen, rejected = policy.sum(dim=1)[:, None]
    tokens = mask.sum(dim=1)[:, None]
    if reference is None:
        return AnswerPairs(chosen, rejected, chosen_tokens=tokens[0], rejected_tokens=tokens[1])
    return AnswerPairs(chosen, rejected, *reference.sum(dim=1)[:, None], tokens[0], tokens[1])


def of_trl_dpo(
    loss_type: str, beta: float, smoothing: float, policy: Tensor, ref: Tensor, mask: Tensor
) -> Any:
    trl = pytest.importorskip("trl")
    body = trainer(
        trl.DPOTrainer,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=smoothing,
        use_weighting=False,
    )
    reference = ref.sum(dim=1)
    inputs = {
        "input_ids": torch.ones(2, WIDTH, dtype=torch.int64),
        "attention_mask": torch.ones(2, WIDTH),
        "completion_mask": mask,
        "ref_chosen_logps": reference[:1],
        "ref_rejected_logps": reference[1:],
    }
    loss = body._compute_loss(scored_model(policy), inputs, return_outputs=False)
    return loss, body._metrics["train"]


@pytest.mark.parametrize(
    ("objective", "chosen_settings", "loss_type"),
    [
        (dpo, DpoSettings(beta=0.3), "sigmoid"),
        (dpo, DpoSettings(beta=0.3, label_smoothing=0.2), "aot"),
        (length_normalised_dpo, LengthNormalisedDpoSettings(beta=4.0), "sigmoid_norm"),
        (ipo, IpoSettings(beta=0.7), "ipo"),
    ],
)
@pytest.mark.parametrize("pair", range(len(LENGTHS)))
def test_objectives_with_a_reference_equal_trl(
    objective: Callable[..., PreferenceLoss], chosen_settings: Any, loss_type: str, pair: int
) -> None:
    mask = answer_mask(LENGTHS[pair])
    reference = token_log_probs(pair, mask, "reference")
    ours = token_log_probs(pair, mask, "policy").requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    smoothing = getattr(chosen_settings, "label_smoothing", 0.0)
    expected, metrics = of_trl_dpo(loss_type, chosen_settings.beta, smoothing, theirs, reference, mask)
    found = objective(summed(ours, reference, mask), chosen_settings)
    assert found.losses.shape == (1,)
    assert abs(float((found.losses[0] - expected).detach())) < 1e-6
    found.losses.sum().backward()
    expected.backward()
    assert ours.grad is not None and theirs.grad is not None
    asked = mask[:, 1:].bool()
    torch.testing.assert_close(ours.grad[asked], theirs.grad[asked], rtol=1e-6, atol=1e-6)
    assert ours.grad[asked].abs().min() > 0
    if objective is dpo:
        assert abs(float(found.margins) - metrics["rewards/margins"][0]) < 1e-6
        assert abs(float(found.chosen_rewards) - metrics["rewards/chosen"][0]) < 1e-6


def of_trl_experimental(kind: type, logits: Tensor, mask: Tensor, **attributes: Any) -> Any:
    ids = torch.arange(2 * WIDTH).view(2, WIDTH) % VOCABULARY
    attended = mask.clone()
    attended[:, 0] = 1
    labels = torch.where(mask.bool(), ids, -100)
    batch = {}
    for row, side in enumerate(("chosen", "rejected")):
        part = slice(row, row + 1)
        batch |= {
            f"{side}_input_ids": ids[part],
            f"{side}_attention_mask": attended[part],
            f"{side}_labels": labels[part],
        }
    body = trainer(kind, is_encoder_decoder=False, padding_value=0, pad_token_id=0, **attributes)
    loss, metrics = body.get_batch_loss_metrics(logits_model(logits), batch)
    return loss, metrics, ids


def experimental(name: str) -> type:
    pytest.importorskip("trl")
    if name == "orpo":
        from trl.experimental.orpo import ORPOTrainer

        return ORPOTrainer
    from trl.experimental.cpo import CPOTrainer

    return CPOTrainer


@pytest.mark.parametrize(
    ("objective", "chosen_settings", "attributes"),
    [
        (orpo, OrpoSettings(beta=0.4), {"beta": 0.4}),
        (
            simpo,
            SimpoSettings(beta=2.5, gamma=1.25),
            {"beta": 2.5, "simpo_gamma": 1.25, "loss_type": "simpo", "cpo_alpha": 0.0},
        ),
        (
            cpo,
            CpoSettings(beta=0.2, likelihood_weight=0.7),
            {"beta": 0.2, "loss_type": "sigmoid", "cpo_alpha": 0.7},
        ),
        (
            cpo,
            CpoSettings(beta=0.2, likelihood_weight=0.0, label_smoothing=0.1),
            {"beta": 0.2, "loss_type": "sigmoid", "cpo_alpha": 0.0, "label_smoothing": 0.1},
        ),
    ],
)
@pytest.mark.parametrize("pair", range(len(LENGTHS)))
def test_objectives_without_a_reference_equal_trl_from_logits_on(
    objective: Callable[..., PreferenceLoss], chosen_settings: Any, attributes: dict[str, Any], pair: int
) -> None:
    """The prompt is one token, so trl's likelihood over prompt and answer (ORPO) is that of the answer."""
    mask = answer_mask(LENGTHS[pair])
    ours = torch.randn(2, WIDTH, VOCABULARY, generator=torch_generator(pair, "logits")).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    kind = experimental("orpo" if objective is orpo else "cpo")
    extra = {} if objective is orpo else {"alpha": 0.0, "label_smoothing": 0.0}
    expected, metrics, ids = of_trl_experimental(kind, theirs, mask, **{**extra, **attributes})
    log_probs = ours[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0] * mask[:, 1:]
    found = objective(summed(log_probs, None, mask), chosen_settings)
    assert abs(float((found.losses[0] - expected).detach())) < 1e-6
    assert abs(float(found.margins) - metrics["rewards/margins"]) < 1e-6
    found.losses.sum().backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kl", [-0.8, 0.9])
def test_kto_equals_trl_with_its_baseline(kl: float) -> None:
    trl = pytest.importorskip("trl")
    answers, asked = 6, torch.ones(6, WIDTH, dtype=torch.int64)
    asked[:, 0] = 0
    ours = (-torch.rand(answers, WIDTH - 1, generator=torch_generator(1, "kto"))).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    reference = -torch.rand(answers, WIDTH - 1, generator=torch_generator(2, "kto")).sum(dim=1)
    mismatched = -torch.rand(answers, generator=torch_generator(3, "kto"))
    desirable = torch.tensor([True, False, True, True, False, True])
    body = trainer(
        trl.KTOTrainer,
        calculate_KL=True,
        precompute_ref_logps=True,
        loss_type="kto",
        beta=0.3,
        desirable_weight=1.5,
        undesirable_weight=0.8,
        _compute_kl_logps=lambda model, batch: mismatched + kl,
    )
    inputs = {
        "input_ids": torch.ones(answers, WIDTH, dtype=torch.int64),
        "attention_mask": torch.ones(answers, WIDTH),
        "completion_mask": asked,
        "label": desirable,
        "ref_logps": reference,
        "ref_KL_logps": mismatched,
    }
    expected = body._compute_loss(scored_model(theirs), inputs, return_outputs=False)
    baseline = kto_baseline(mismatched + kl, mismatched)
    found = kto(
        ours.sum(dim=1),
        reference,
        desirable,
        baseline,
        KtoSettings(beta=0.3, desirable_weight=1.5, undesirable_weight=0.8),
    )
    assert abs(float(baseline) - body._metrics["train"]["kl"][0]) < 1e-6
    assert abs(float((found.losses.mean() - expected).detach())) < 1e-6
    found.losses.mean().backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-6)
    chosen = found.rewards[desirable].mean()
    assert abs(float(chosen) - body._metrics["train"]["rewards/chosen"][0]) < 1e-6


def make_pairs(seed: int, pairs: int = 5, dtype: torch.dtype = torch.float32) -> AnswerPairs:
    generator = torch_generator(seed, "pairs")
    tokens = torch.randint(1, 40, (2, pairs), generator=generator)
    policy, reference = (
        -(tokens * (0.1 + 2 * torch.rand(2, pairs, generator=generator))).to(dtype) for _ in range(2)
    )
    return AnswerPairs(policy[0], policy[1], reference[0], reference[1], tokens[0], tokens[1])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), beta=st.floats(0.01, 20), smoothing=st.floats(0, 0.49))
def test_a_policy_that_is_its_reference_loses_exactly_log_two(
    seed: int, beta: float, smoothing: float
) -> None:
    pairs = make_pairs(seed)
    same = AnswerPairs(
        pairs.chosen, pairs.rejected, pairs.chosen, pairs.rejected, pairs.chosen_tokens, pairs.rejected_tokens
    )
    log_two = torch.full((5,), math.log(2))
    for found in (
        dpo(same, DpoSettings(beta)),
        length_normalised_dpo(same, LengthNormalisedDpoSettings(beta)),
    ):
        assert torch.equal(found.losses, log_two)
        assert not found.margins.any() and not found.chosen_rewards.any()
    torch.testing.assert_close(dpo(same, DpoSettings(beta, smoothing)).losses, log_two, rtol=0, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), tokens=st.integers(1, 500), beta=st.floats(0.1, 20))
def test_length_normalised_dpo_of_equal_lengths_is_dpo_with_beta_over_the_length(
    seed: int, tokens: int, beta: float
) -> None:
    pairs = make_pairs(seed)
    counts = torch.full((5,), tokens)
    equal = AnswerPairs(
        pairs.chosen / 50,
        pairs.rejected / 50,
        pairs.reference_chosen / 50,  # type: ignore[operator]
        pairs.reference_rejected / 50,  # type: ignore[operator]
        counts,
        counts,
    )
    normalised = length_normalised_dpo(equal, LengthNormalisedDpoSettings(beta))
    plain = dpo(equal, DpoSettings(beta / tokens))
    scale = plain.losses.clamp(min=1)
    assert ((normalised.losses - plain.losses) / scale).abs().max() < 1e-6
    assert ((normalised.margins - plain.margins) / plain.margins.abs().clamp(min=1)).abs().max() < 1e-6


@pytest.mark.parametrize(("objective", "chosen_settings"), ALL)
def test_a_pair_does_not_depend_on_the_pairs_beside_it(objective: Any, chosen_settings: Any) -> None:
    pairs = make_pairs(3)
    together = objective(pairs, chosen_settings).losses
    assert together.shape == (5,)
    for index in range(5):
        alone = AnswerPairs(**{name: value[index : index + 1] for name, value in vars(pairs).items()})
        assert torch.equal(objective(alone, chosen_settings).losses, together[index : index + 1])


@pytest.mark.parametrize(("objective", "chosen_settings"), ALL)
def test_gradients_raise_the_chosen_answer_and_lower_the_rejected(
    objective: Any, chosen_settings: Any
) -> None:
    pairs = make_pairs(4)
    chosen, rejected = pairs.chosen.clone().requires_grad_(), pairs.rejected.clone().requires_grad_()
    reference = pairs.chosen.detach(), pairs.rejected.detach()  # start: no log ratio yet
    found = objective(
        AnswerPairs(chosen, rejected, *reference, pairs.chosen_tokens, pairs.rejected_tokens), chosen_settings
    )
    found.losses.sum().backward()
    assert chosen.grad is not None and rejected.grad is not None
    assert (chosen.grad < 0).all() and (rejected.grad > 0).all()
    assert not found.chosen_rewards.requires_grad and not found.rejected_rewards.requires_grad


def test_no_gradient_reaches_the_reference_even_if_it_asks_for_one() -> None:
    pairs = make_pairs(5)
    asking = {name: getattr(pairs, name).clone().requires_grad_() for name in ("chosen", "reference_chosen")}
    found = dpo(
        AnswerPairs(asking["chosen"], pairs.rejected, asking["reference_chosen"], pairs.reference_rejected),
        DpoSettings(),
    )
    found.losses.sum().backward()
    assert asking["chosen"].grad is not None and asking["reference_chosen"].grad is None


@pytest.mark.parametrize(("objective", "chosen_settings"), ALL)
def test_half_precision_inputs_give_float32_losses(objective: Any, chosen_settings: Any) -> None:
    half = make_pairs(6, dtype=torch.bfloat16)
    wide = AnswerPairs(
        **{name: value.float() if value.is_floating_point() else value for name, value in vars(half).items()}
    )
    found = objective(half, chosen_settings).losses
    assert found.dtype == torch.float32
    assert torch.equal(found, objective(wide, chosen_settings).losses)


def test_extreme_margins_keep_finite_losses_and_gradients() -> None:
    for margin in (-1e5, 1e5):
        chosen = torch.tensor([margin], requires_grad=True)
        zero = torch.zeros(1)
        loss = dpo(AnswerPairs(chosen, zero, zero, zero), DpoSettings(beta=1.0)).losses
        loss.sum().backward()
        assert float(loss.detach()) == max(0.0, -margin)
        assert chosen.grad is not None and float(chosen.grad) == (-1.0 if margin < 0 else 0.0)


@pytest.mark.parametrize("mean", [0.0, -1e-9, -1e-5, -0.6931, -0.6932, -30.0, -300.0])
def test_odds_of_nearly_sure_and_nearly_impossible_answers_are_right(mean: float) -> None:
    chosen = torch.tensor([mean], requires_grad=True)
    one = torch.ones(1, dtype=torch.int64)
    pairs = AnswerPairs(chosen, torch.tensor([-1.0]), chosen_tokens=one, rejected_tokens=one)
    loss = orpo(pairs, OrpoSettings(beta=1.0)).losses
    loss.sum().backward()
    assert chosen.grad is not None and chosen.grad.isfinite().all() and loss.isfinite().all()
    exact = min(mean, -1.2e-7)  # a probability that rounds to 1 is taken as the largest below it
    odds = exact + 1.0 - math.log(-math.expm1(exact)) + math.log(-math.expm1(-1.0))
    expected = -mean + math.log1p(math.exp(-odds)) if odds > -30 else -mean - odds
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: DpoSettings(beta=0.0), "beta"),
        (lambda: DpoSettings(beta=float("nan")), "beta"),
        (lambda: DpoSettings(label_smoothing=0.5), "label_smoothing"),
        (lambda: LengthNormalisedDpoSettings(beta=-1.0), "beta"),
        (lambda: IpoSettings(beta=float("inf")), "beta"),
        (lambda: OrpoSettings(beta=0.0), "beta"),
        (lambda: SimpoSettings(gamma=-0.1), "gamma"),
        (lambda: CpoSettings(likelihood_weight=-1.0), "likelihood_weight"),
        (lambda: CpoSettings(label_smoothing=-0.1), "label_smoothing"),
        (lambda: KtoSettings(desirable_weight=0.0), "desirable_weight"),
        (lambda: KtoSettings(undesirable_weight=-1.0), "undesirable_weight"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(make: Callable[[], Any], named: str) -> None:
    with pytest.raises(PunaError, match=named):
        make()


def test_inputs_that_do_not_belong_together_are_refused() -> None:
    two, three = torch.zeros(2), torch.zeros(3)
    with pytest.raises(PunaError, match="rejected has another shape"):
        AnswerPairs(two, three)
    with pytest.raises(PunaError, match=r"\[pairs\]"):
        AnswerPairs(two[None], two[None])
    with pytest.raises(PunaError, match="dpo compares with a reference"):
        dpo(AnswerPairs(two, two), DpoSettings())
    with pytest.raises(PunaError, match="simpo divides by the lengths"):
        simpo(AnswerPairs(two, two), SimpoSettings())
    counts = torch.tensor([1, 0])
    with pytest.raises(PunaError, match="an answer of no token"):
        orpo(AnswerPairs(two, two, chosen_tokens=counts, rejected_tokens=counts), OrpoSettings())
    with pytest.raises(PunaError, match="expected: bool"):
        kto(two, two, two, torch.tensor(0.0), KtoSettings())
    with pytest.raises(PunaError, match="baseline has another shape"):
        kto(two, two, two.bool(), two, KtoSettings())
    with pytest.raises(PunaError, match="no answer"):
        kto_baseline(torch.zeros(0), torch.zeros(0))


def test_cpo_asks_for_no_counts_without_its_likelihood() -> None:
    two = -torch.ones(2)
    assert cpo(AnswerPairs(two, two), CpoSettings(likelihood_weight=0.0)).losses.shape == (2,)
    with pytest.raises(PunaError, match="cpo divides by the lengths"):
        cpo(AnswerPairs(two, two), CpoSettings())
