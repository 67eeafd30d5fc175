"""Which feed-forwards a token leaves out: the rule on scripted streams, and the planner."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from puna.core.errors import PunaError
from puna.model.feed_forward_skip import (
    FeedForwardSkip,
    SkippingPass,
    feed_forward_operations,
    plan_skip,
    stream_cosine,
)

LAYERS = 10


def turned(hidden: Tensor, cosine: float | Tensor) -> Tensor:
    """The rows of ``hidden`` [rows, 2] turned so far that the cosine with what they were is ``cosine``."""
    angle = torch.as_tensor(cosine).acos()
    first = hidden[:, 0] * angle.cos() - hidden[:, 1] * angle.sin()
    return torch.stack([first, hidden[:, 0] * angle.sin() + hidden[:, 1] * angle.cos()], dim=1)


def layers_run(skips: list[FeedForwardSkip | None], cosines: list[list[float]]) -> list[list[int]]:
    """Per row the layers whose feed-forward ran, when layer l turns row r to ``cosines[r][l]``."""
    passing = SkippingPass([(skip, 0, 1) for skip in skips], LAYERS)
    hidden = torch.tensor([[1.0, 0.0]]).repeat(len(skips), 1) * torch.arange(1, len(skips) + 1)[:, None]
    ran: list[list[int]] = [[] for _ in skips]
    for layer in range(LAYERS):

        def feed_forward(rows: Tensor, layer: int = layer) -> Tensor:
            which = [round(float(row.norm())) - 1 for row in rows]  # a row is known by its length
            for row in which:
                ran[row].append(layer)
            return turned(rows, torch.tensor([cosines[row][layer] for row in which]))

        hidden = passing.apply(layer, hidden, feed_forward)
    assert [LAYERS - len(layers) for layers in ran] == passing.skipped.tolist()
    return ran


def test_the_layers_after_the_first_saturated_one_are_left_out_to_the_end_of_the_middle() -> None:
    cosines = [0.99, 0.99, 0.5, 0.5, 0.95, 0.99, 0.99, 0.99, 0.99, 0.99]
    assert layers_run([FeedForwardSkip(2, 7, 0.9)], [cosines]) == [[0, 1, 2, 3, 4, 8, 9]]


def test_the_tested_layer_itself_is_computed_even_if_it_is_the_last_of_the_middle() -> None:
    cosines = [0.5] * 7 + [0.99] + [0.5] * 2
    assert layers_run([FeedForwardSkip(2, 7, 0.9)], [cosines]) == [list(range(LAYERS))]


def test_the_budget_ends_the_skipping_and_the_rest_runs() -> None:
    cosines = [0.99] * LAYERS
    assert layers_run([FeedForwardSkip(1, 8, 0.9, budget=3)], [cosines]) == [[0, 1, 5, 6, 7, 8, 9]]
    assert layers_run([FeedForwardSkip(1, 8, 0.9, budget=0)], [cosines]) == [list(range(LAYERS))]


def test_rows_of_a_batch_go_their_own_ways() -> None:
    early, late, never = [0.99] * LAYERS, [0.5] * 4 + [0.99] * 6, [0.5] * LAYERS
    skip, other = FeedForwardSkip(2, 7, 0.9), FeedForwardSkip(3, 5, 0.9, budget=1)
    together = layers_run([skip, None, other, skip, skip], [early, early, early, late, never])
    alone = [
        layers_run([one], [cosines])[0]
        for one, cosines in zip(
            [skip, None, other, skip, skip], [early, early, early, late, never], strict=True
        )
    ]
    assert together == alone
    assert together[0] == [0, 1, 2, 8, 9]
    assert together[1] == list(range(LAYERS))
    assert together[2] == [0, 1, 2, 3, 5, 6, 7, 8, 9]


def test_a_threshold_above_one_gives_the_feed_forward_the_stream_itself() -> None:
    hidden = torch.randn(5, 8)
    seen: list[Tensor] = []
    passing = SkippingPass([(FeedForwardSkip(0, 3, 1.5), 0, 5)], 4)
    for layer in range(4):
        passing.apply(layer, hidden, lambda rows: seen.append(rows) or rows)
    assert all(rows is hidden for rows in seen)
    assert len(seen) == 4
    assert passing.skipped.tolist() == [0] * 5


def test_random_skips_have_their_share_and_depend_on_seed_position_and_layer_alone() -> None:
    skip = FeedForwardSkip(2, 21, rule="random", share=0.4, seed=3)

    def left_out(spans: list[tuple[FeedForwardSkip | None, int, int]]) -> list[int]:
        passing = SkippingPass(spans, 24)
        hidden = torch.ones(sum(count for _, _, count in spans), 4)
        for layer in range(24):
            hidden = passing.apply(layer, hidden, lambda rows: rows * 1.0)
        return passing.skipped.tolist()

    whole = left_out([(skip, 7, 200)])
    assert sum(whole) / (200 * 20) == pytest.approx(0.4, abs=0.03)
    assert left_out([(None, 0, 2), (skip, 107, 50), (skip, 7, 1)]) == [0, 0, *whole[100:150], whole[0]]
    assert left_out([(FeedForwardSkip(2, 21, rule="random", share=0.4, seed=4), 7, 200)]) != whole


def test_the_cosine_is_that_of_the_updated_stream_not_of_the_bare_branch() -> None:
    hidden = torch.tensor([[10.0, 0.0]])
    update = torch.tensor([[0.0, 1.0]])  # at right angles: the branch alone would have cosine 0
    assert float(stream_cosine(hidden, hidden + update)) == pytest.approx(10 / math.sqrt(101))


def test_operations_of_a_feed_forward_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        gate = torch.zeros(1, 48) @ torch.zeros(48, 96)
        (gate * (torch.zeros(1, 48) @ torch.zeros(48, 96))) @ torch.zeros(96, 48)
    assert feed_forward_operations(48, 96) == counter.get_total_flops()


def saturating(tokens: int = 400) -> Tensor:
    """Cosines [12, tokens] that rise through the middle, as the paper describes."""
    generator = torch.Generator().manual_seed(0)
    means = torch.tensor([0.2, 0.6, 0.93, 0.94, 0.95, 0.97, 0.98, 0.985, 0.985, 0.97, 0.7, 0.4])
    return (means[:, None] + 0.005 * torch.randn(12, tokens, generator=generator)).clamp(max=1)


def test_the_planner_keeps_cold_ends_and_hits_the_share_on_the_calibration_tokens() -> None:
    cosines = saturating()
    plan = plan_skip(cosines, share=0.25, cold_layers=1)
    assert plan.skip is not None
    assert (plan.skip.first, plan.skip.last) == (2, 9)  # 1 and 10 are not saturated
    assert plan.expected_share >= 0.25
    skipped = sum(LAYERS_OF_PLAN - len(run) for run in _runs_of(plan.skip, cosines)) / (
        LAYERS_OF_PLAN * cosines.shape[1]
    )
    assert skipped == pytest.approx(plan.expected_share)
    smaller = plan_skip(cosines, share=0.1, cold_layers=1)
    assert smaller.skip is not None and smaller.skip.budget < plan.skip.budget


LAYERS_OF_PLAN = 12


def _runs_of(skip: FeedForwardSkip, cosines: Tensor) -> list[list[int]]:
    passing = SkippingPass([(skip, 0, cosines.shape[1])], LAYERS_OF_PLAN)
    ran: list[list[int]] = [[] for _ in range(cosines.shape[1])]
    numbers = torch.arange(1, cosines.shape[1] + 1, dtype=torch.float64)[:, None]
    hidden = torch.cat([numbers, torch.zeros_like(numbers)], dim=1)
    for layer in range(LAYERS_OF_PLAN):

        def feed_forward(rows: Tensor, layer: int = layer) -> Tensor:
            which = [round(float(row.norm())) - 1 for row in rows]
            for row in which:
                ran[row].append(layer)
            return turned(rows, cosines[layer, which].double())

        hidden = passing.apply(layer, hidden, feed_forward)
    return ran


def test_the_planner_lowers_the_threshold_when_the_percentile_leaves_out_too_little() -> None:
    cosines = saturating()
    strict = plan_skip(cosines, share=0.1, cold_layers=1)
    wide = plan_skip(cosines, share=0.5, cold_layers=1)
    assert strict.skip is not None and wide.skip is not None
    assert wide.skip.threshold < strict.skip.threshold
    assert wide.expected_share >= 0.5


@pytest.mark.parametrize(("cosines", "share"), [(torch.full((12, 50), 0.6), 0.25), (saturating(), 0.7)])
def test_the_planner_may_answer_nothing_to_skip(cosines: Tensor, share: float) -> None:
    plan = plan_skip(cosines, share=share, cold_layers=1)
    assert plan.skip is None
    assert plan.expected_share == 0.0
    assert plan.reason


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"first": 3, "last": 2}, "out of order"),
        ({"first": 0, "last": 2, "budget": -1}, "out of range"),
        ({"first": 0, "last": 2, "share": 1.5}, "out of range"),
        ({"first": 0, "last": 2, "threshold": math.nan}, "out of range"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(PunaError, match=message):
        FeedForwardSkip(**settings)  # type: ignore[arg-type]


def test_a_middle_beyond_the_decoder_is_refused() -> None:
    with pytest.raises(PunaError, match="beyond the decoder"):
        SkippingPass([(FeedForwardSkip(1, 4, 0.9), 0, 1)], 4)
