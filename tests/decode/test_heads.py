"""Heads: what they compute, learn and keep; the measures they are judged by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from puna.core.errors import PunaError
from puna.core.seeds import torch_generator
from puna.decode.heads import (
    Head,
    HeadSpec,
    HeadTraining,
    area_under_curve,
    binary_divergence,
    constant_rate,
    load_head,
    save_head,
    train_head,
    unweighted,
    weighted_loss,
)

WIDTH = 6


def states(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch_generator(seed, "states"))


def test_a_head_is_residual_blocks_and_a_linear_layer() -> None:
    head, seen = Head(HeadSpec(WIDTH, 2, ways=2)), states(5)
    expected = seen
    for block in head.blocks:
        expected = expected + functional.silu(expected @ block.linear.weight.T + block.linear.bias)
    two = (expected @ head.last.weight.T + head.last.bias).detach()
    torch.testing.assert_close(head(seen).sigmoid().detach(), two.softmax(-1)[:, 1])
    assert head.probability(seen[0]) == pytest.approx(float(two.softmax(-1)[0, 1]), abs=1e-6)
    assert head.parameter_count == sum(parameter.numel() for parameter in head.parameters())


def test_a_shared_block_is_one_that_is_applied_again() -> None:
    shared, apart = Head(HeadSpec(WIDTH, 3, shared=True)), Head(HeadSpec(WIDTH, 3))
    assert (len(shared.blocks), len(apart.blocks)) == (1, 3)
    for block in apart.blocks:
        block.load_state_dict(shared.blocks[0].state_dict())
    apart.last.load_state_dict(shared.last.state_dict())
    assert torch.equal(shared(states(4)), apart(states(4)))
    assert shared.parameter_count == apart.parameter_count  # what a call reads, not what is kept


def test_the_loss_is_the_weighted_cross_entropy_over_its_mass() -> None:
    logits, labels = torch.tensor([0.3, -1.2, 2.0]), torch.tensor([1.0, 0.25, 0.0])
    chances = logits.sigmoid()
    total = -(labels * chances.log() + 6 * (1 - labels) * (1 - chances).log()).sum()
    expected = total / (labels.sum() + 6 * (1 - labels).sum())
    torch.testing.assert_close(weighted_loss(logits, labels, 6.0), expected)


def test_a_head_learns_soft_labels_and_the_same_seed_gives_the_same_bits() -> None:
    seen = states(600)
    chances = (2 * seen[:, 0] - seen[:, 1]).sigmoid()
    texts = torch.arange(600) // 10
    training = HeadTraining(epochs=30, batch=8, learning_rate=5e-2, negative_weight=3.0)
    heads = []
    for _ in range(2):
        head = Head(HeadSpec(WIDTH), seed=1)
        losses = train_head(head, seen, chances, texts, training, seed=2)
        heads.append(head)
    assert losses[-1] < losses[0] and len(losses) == 30 * 8
    assert all(torch.equal(a, b) for a, b in zip(heads[0].parameters(), heads[1].parameters(), strict=True))
    with torch.inference_mode():
        found = heads[0](seen).sigmoid()
    torch.testing.assert_close(unweighted(found, 3.0), chances, atol=0.08, rtol=0)


def test_the_divergence_is_least_where_the_loss_is() -> None:
    labels = torch.tensor([0.9, 0.2, 0.5, 1.0, 0.0])
    ideal = labels / (labels + 6 * (1 - labels))
    assert binary_divergence(ideal, labels, 6.0) == pytest.approx(0.0, abs=1e-9)
    assert binary_divergence(labels, labels) == pytest.approx(0.0, abs=1e-9)
    rates = torch.linspace(0.01, 0.99, 99)
    for weight in (1.0, 6.0):
        found = [binary_divergence(torch.full_like(labels, float(rate)), labels, weight) for rate in rates]
        best = float(rates[torch.tensor(found).argmin()])
        assert best == pytest.approx(constant_rate(labels, weight), abs=0.006)


def test_the_divergence_of_certain_labels_is_the_cross_entropy() -> None:
    labels, chances = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0.7, 0.4, 0.2])
    expected = functional.binary_cross_entropy(chances, labels)
    assert binary_divergence(chances, labels) == pytest.approx(float(expected), abs=1e-6)


def test_the_area_under_the_curve_counts_pairs() -> None:
    generator = torch_generator(0, "auc")
    scores = torch.randint(0, 12, (60,), generator=generator).float()
    labels = torch.rand(60, generator=generator) < 0.4
    yes, no = scores[labels].double(), scores[~labels].double()
    above = (yes[:, None] > no).double() + 0.5 * (yes[:, None] == no).float()
    assert area_under_curve(scores, labels) == pytest.approx(float(above.mean()), abs=1e-9)
    with pytest.raises(PunaError, match="both kinds"):
        area_under_curve(scores, torch.ones(60))


def test_a_saved_head_opens_as_it_was(tmp_path: Path) -> None:
    head = Head(HeadSpec(WIDTH, 3, shared=True, ways=2), seed=4, about={"kind": "acceptance", "x": 1})
    path = save_head(head, tmp_path / "head.safetensors")
    opened = load_head(path, kind="acceptance")
    assert opened.spec == head.spec and opened.about == head.about
    assert torch.equal(opened(states(3)), head(states(3)))
    assert load_head(path) is opened  # a file that did not change is read once
    assert not any(parameter.requires_grad for parameter in opened.parameters())


def test_what_is_no_fitting_head_is_told(tmp_path: Path) -> None:
    path = save_head(Head(HeadSpec(WIDTH), about={"kind": "judge"}), tmp_path / "head.safetensors")
    with pytest.raises(PunaError, match="of another kind"):
        load_head(path, kind="acceptance")
    with pytest.raises(PunaError, match="there is no head"):
        load_head(tmp_path / "nothing")
    (tmp_path / "text").write_text("no head")
    with pytest.raises(PunaError, match="not a head"):
        load_head(tmp_path / "text")
    with pytest.raises(PunaError, match="no such head"):
        HeadSpec(WIDTH, ways=3)
    with pytest.raises(PunaError, match="nothing to learn"):
        train_head(Head(HeadSpec(WIDTH)), states(0), torch.zeros(0), torch.zeros(0), HeadTraining(), seed=0)
