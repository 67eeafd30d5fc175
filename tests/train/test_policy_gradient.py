"""GRPO equals trl's own loss and advantages to a millionth; what stands in the padding never matters."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from puna.core.errors import PunaError
from puna.core.seeds import torch_generator
from puna.train.distillation import linear_top_k_kl, top_k_kl
from puna.train.policy_gradient import (
    Aggregation,
    GrpoSettings,
    PolicyLoss,
    group_advantages,
    grpo,
    token_weights,
)
from tests.train.trl_bodies import scored_model, trainer

NAN = float("nan")
AGGREGATIONS: tuple[Aggregation, ...] = ("sequence_mean", "token_mean")
LOSS_TYPES = {"sequence_mean": "grpo", "token_mean": "bnpo"}  # trl's names
ANSWERS, TOKENS = 6, 8


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities, those of the drawing policy, advantages, a mask of answers of several lengths."""
    old = -2 * torch.rand(ANSWERS, TOKENS, generator=torch_generator(seed, "old"))
    new = old + 0.4 * torch.randn(ANSWERS, TOKENS, generator=torch_generator(seed, "new"))
    advantages = torch.randn(ANSWERS, generator=torch_generator(seed, "advantages"))
    lengths = torch.randint(1, TOKENS + 1, (ANSWERS, 1), generator=torch_generator(seed, "lengths"))
    return new, old, advantages, torch.arange(TOKENS) < lengths


def k3(log_probs: Tensor, reference: Tensor) -> Tensor:
    """The estimate from drawn tokens that trl takes, exp(d) - d - 1; puna's objectives do not use it."""
    difference = reference - log_probs
    return difference.exp() - difference - 1


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
@pytest.mark.parametrize("clip_high", [0.2, 0.28])
def test_loss_equals_trl_in_value_and_gradient(
    aggregation: Aggregation, kl_weight: float, clip_high: float
) -> None:
    trl = pytest.importorskip("trl")
    new, old, advantages, mask = batch()
    reference = old + 0.3 * torch.randn(ANSWERS, TOKENS, generator=torch_generator(0, "reference"))
    ours, theirs = new.clone().requires_grad_(), new.clone().requires_grad_()
    body = trainer(
        trl.GRPOTrainer,
        loss_type=LOSS_TYPES[aggregation],
        beta=kl_weight,
        importance_sampling_level="token",
        epsilon_low=0.2,
        epsilon_high=clip_high,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False),
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
    )
    inputs = {
        "prompt_ids": torch.ones(ANSWERS, 2, dtype=torch.int64),
        "prompt_mask": torch.ones(ANSWERS, 2, dtype=torch.int64),
        "completion_ids": torch.ones(ANSWERS, TOKENS, dtype=torch.int64),
        "completion_mask": mask.long(),
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
    }
    expected = body._compute_loss(scored_model(theirs), inputs)
    options: dict[str, Any] = {"kl_weight": kl_weight, "aggregation": aggregation, "clip_high": clip_high}
    found = grpo(
        ours, old, advantages, mask, GrpoSettings(**options), kl=k3(ours, reference) if kl_weight else None
    )
    mean = found.total / found.count
    assert abs(float((mean - expected).detach())) < 1e-6
    assert 0 < float(found.clipped) < 1
    assert abs(float(found.clipped) - body._metrics["train"]["clip_ratio/region_mean"][0]) < 1e-6
    mean.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def trl_trainer(tmp_path_factory: Any) -> Any:
    """A whole GRPOTrainer of trl on a one-layer Llama: its advantages are made where it draws answers."""
    trl = pytest.importorskip("trl")
    import tokenizers
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {"<pad>": 0, "</s>": 1, "a": 2}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")
    config = LlamaConfig(
        vocab_size=3,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    folder: Path = tmp_path_factory.mktemp("grpo")
    arguments = trl.GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        num_generations=4,
        per_device_train_batch_size=8,
        max_completion_length=2,
        report_to="none",
    )
    rewards: list[float | None] = []

    def reward(completions: list[str], **columns: Any) -> list[float | None]:
        return rewards

    body = trl.GRPOTrainer(
        model=LlamaForCausalLM(config),
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 8}),
        processing_class=tokenizer,
    )
    return body, rewards


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize(
    "given_rewards",
    [
        [1.0, 2.5, 0.0, 4.0, -1.0, -1.0, 3.0, 0.5],
        [1.0, 2.0, None, 4.0, 7.0, 7.0, 7.0, 7.0],
        [None, None, None, 4.0, None, None, None, None],
    ],
)
def test_advantages_equal_trl(trl_trainer: Any, scale: Any, given_rewards: list[float | None]) -> None:
    body, rewards = trl_trainer
    rewards[:] = given_rewards
    body.scale_rewards = scale
    expected = body._generate_and_score_completions([{"prompt": "a"}] * 8)["advantages"]
    as_tensor = torch.tensor([NAN if reward is None else reward for reward in given_rewards])
    found = group_advantages(as_tensor, 4, scale)
    assert found.shape == (8,) and found.isfinite().all()
    assert (found - expected).abs().max() < 1e-6


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    garbage=st.sampled_from([NAN, float("inf"), float("-inf"), 1e30]),
    aggregation=st.sampled_from(AGGREGATIONS),
)
def test_masked_tokens_never_matter(seed: int, garbage: float, aggregation: Aggregation) -> None:
    new, old, advantages, mask = batch(seed)
    kl = torch.rand(ANSWERS, TOKENS, generator=torch_generator(seed, "kl"))
    results: list[tuple[PolicyLoss, Tensor, Tensor]] = []
    for spoil in (False, True):
        tensors = [tensor.clone() for tensor in (new, old, kl)]
        for tensor in tensors if spoil else []:
            tensor[~mask] = garbage
        log_probs, divergences = tensors[0].requires_grad_(), tensors[2].requires_grad_()
        chosen = GrpoSettings(kl_weight=0.1, aggregation=aggregation)
        found = grpo(log_probs, tensors[1], advantages, mask, chosen, kl=divergences)
        found.total.backward()
        assert log_probs.grad is not None and divergences.grad is not None
        assert not log_probs.grad[~mask].any() and not divergences.grad[~mask].any()
        results.append((found, log_probs.grad, divergences.grad))
    (first, *gradients), (second, *others) = results
    assert torch.equal(first.total, second.total) and first.count == second.count
    assert torch.equal(first.clipped, second.clipped)
    for mine, other in zip(gradients, others, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_add_up_to_the_batch(aggregation: Aggregation) -> None:
    new, old, advantages, mask = batch(1)
    chosen = GrpoSettings(aggregation=aggregation)
    whole = grpo(new, old, advantages, mask, chosen)
    parts = [
        grpo(new[part], old[part], advantages[part], mask[part], chosen)
        for part in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    assert sum(part.count for part in parts) == whole.count
    assert whole.count == (ANSWERS if aggregation == "sequence_mean" else int(mask.sum()))
    torch.testing.assert_close(torch.stack([part.total for part in parts]).sum(), whole.total)


def test_aggregations_weigh_long_answers_differently() -> None:
    mask = torch.tensor([[True, True, True, True], [True, False, False, False], [False] * 4])
    assert token_weights(mask, "token_mean").tolist() == mask.float().tolist()
    assert token_weights(mask, "sequence_mean").tolist() == [[0.25] * 4, [1.0, 0, 0, 0], [0.0] * 4]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_fused_divergence_under_token_weights_is_the_term_of_the_loss(aggregation: Aggregation) -> None:
    new, old, advantages, mask = batch(2)
    hidden = torch.randn(ANSWERS, TOKENS, 5, generator=torch_generator(0, "hidden")).requires_grad_()
    weight = torch.randn(30, 5, generator=torch_generator(0, "weight"))
    reference = torch.randn(ANSWERS, TOKENS, 30, generator=torch_generator(0, "reference"))
    divergences = top_k_kl(hidden @ weight.T, reference, "reverse", k=7)
    together = grpo(
        new, old, advantages, mask, GrpoSettings(kl_weight=0.4, aggregation=aggregation), kl=divergences
    )
    weights = token_weights(mask, aggregation)
    fused = linear_top_k_kl(hidden, weight, reference, "reverse", k=7, weights=weights, chunk=5)
    apart = grpo(new, old, advantages, mask, GrpoSettings(aggregation=aggregation)).total + 0.4 * fused.total
    torch.testing.assert_close(apart, together.total, rtol=1e-5, atol=1e-5)
    mine, other = torch.autograd.grad(apart, hidden)[0], torch.autograd.grad(together.total, hidden)[0]
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_estimates_from_drawn_tokens_go_negative_where_the_exact_divergence_does_not() -> None:
    policy = torch.randn(200, 30, generator=torch_generator(0, "policy"))
    reference = policy + 0.3 * torch.randn(200, 30, generator=torch_generator(0, "reference"))
    drawn = torch.multinomial(policy.softmax(-1), 1, generator=torch_generator(0, "draw"))
    log_ratio = (policy.log_softmax(-1) - reference.log_softmax(-1)).gather(1, drawn)
    assert (log_ratio < 0).float().mean() > 0.2
    exact = top_k_kl(policy, reference, "reverse", k=10)
    assert (exact >= 0).all() and exact.mean() > 0


def test_a_clipped_ratio_holds_back_its_gradient_only_where_it_went_too_far() -> None:
    old = torch.zeros(1, 4)
    new = torch.tensor([[0.5, -0.5, 0.5, -0.5]], requires_grad=True)
    both = torch.cat([new, new]), torch.cat([old, old])
    found = grpo(*both, torch.tensor([1.0, -1.0]), torch.ones(2, 4, dtype=torch.bool), GrpoSettings())
    assert float(found.clipped) == 0.5
    up = grpo(new, old, torch.tensor([1.0]), torch.ones(1, 4, dtype=torch.bool), GrpoSettings())
    gradient = torch.autograd.grad(up.total, new)[0][0]
    assert gradient[[0, 2]].tolist() == [0.0, 0.0]
    assert (gradient[[1, 3]] < 0).all()


def test_policy_that_drew_the_answers_gets_the_policy_gradient() -> None:
    new, _, advantages, mask = batch(3)
    new.requires_grad_()
    found = grpo(new, new, advantages, mask, GrpoSettings(aggregation="token_mean"))
    torch.testing.assert_close(found.total.detach(), -(advantages[:, None] * mask).sum())
    found.total.backward()
    torch.testing.assert_close(new.grad, -advantages[:, None] * mask)
    assert float(found.clipped) == 0


def test_bad_settings_and_inputs_are_refused() -> None:
    new, old, advantages, mask = batch()
    rewards = torch.arange(6.0)
    cases: list[tuple[Any, str]] = [
        (lambda: GrpoSettings(clip_low=0.0), "clip_low"),
        (lambda: GrpoSettings(clip_low=1.1), "clip_low"),
        (lambda: GrpoSettings(clip_high=NAN), "clip_high"),
        (lambda: GrpoSettings(kl_weight=-1.0), "kl_weight"),
        (lambda: GrpoSettings(aggregation="sequence_men"), "did you mean 'sequence_mean'"),  # type: ignore[arg-type]
        (lambda: token_weights(mask, "sum"), "unknown aggregation"),  # type: ignore[arg-type]
        (lambda: token_weights(mask.long(), "token_mean"), "bool"),
        (lambda: grpo(new, old[:, :3], advantages, mask, GrpoSettings()), "old_log_probs has another shape"),
        (lambda: grpo(new, old, advantages[:3], mask, GrpoSettings()), "advantages has another shape"),
        (lambda: grpo(new, old, advantages, mask, GrpoSettings(kl_weight=0.1)), "no kl"),
        (lambda: grpo(new, old, advantages, mask, GrpoSettings(), kl=old), "kl_weight=0"),
        (lambda: group_advantages(rewards, 4), "do not fill groups"),
        (lambda: group_advantages(rewards[:0], 2), "do not fill groups"),
        (lambda: group_advantages(rewards, 1), "group_size"),
        (lambda: group_advantages(rewards, 3, "std"), "unknown scale"),  # type: ignore[arg-type]
        (lambda: group_advantages(rewards * float("inf"), 3), "infinite"),
    ]
    for call, message in cases:
        with pytest.raises(PunaError, match=message):
            call()
