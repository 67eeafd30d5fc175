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


def through(passing: SkippingPass, cosines: Tensor) -> list[list[int]]:
    """Per row the layers whose feed-forward ran, when layer l turns row r to ``cosines[l, r]``."""
    layers, rows = cosines.shape
    hidden = torch.stack([torch.arange(1.0, rows + 1), torch.zeros(rows)], dim=1).double()
    ran: list[list[int]] = [[] for _ in range(rows)]
    for layer in range(layers):
        running = passing.running(layer)
        which = torch.arange(rows) if running is None else torch.nonzero(running).flatten()
        before = hidden[which]
        after = turned(before, cosines[layer, which].double())
        passing.saw(layer, running, before, after)
        hidden = hidden.index_copy(0, which, after)
        for row in which.tolist():
            ran[row].append(layer)
    assert [layers - len(each) for each in ran] == passing.by_row.tolist()
    assert sum(layers - len(each) for each in ran) == passing.skipped
    return ran


def layers_run(skip: FeedForwardSkip, *cosines: list[float]) -> list[list[int]]:
    """The same for rows given one by one."""
    return through(skip.begin(len(cosines)), torch.tensor(cosines).T)


def test_the_layers_after_the_first_saturated_one_are_left_out_to_the_end_of_the_middle() -> None:
    cosines = [0.99, 0.99, 0.5, 0.5, 0.95, 0.99, 0.99, 0.99, 0.99, 0.99]
    assert layers_run(FeedForwardSkip(2, 7, 0.9), cosines) == [[0, 1, 2, 3, 4, 8, 9]]


def test_the_tested_layer_itself_is_computed_even_if_it_is_the_last_of_the_middle() -> None:
    cosines = [0.5] * 7 + [0.99] + [0.5] * 2
    assert layers_run(FeedForwardSkip(2, 7, 0.9), cosines) == [list(range(LAYERS))]


def test_the_budget_ends_the_skipping_and_the_rest_runs() -> None:
    cosines = [0.99] * LAYERS
    assert layers_run(FeedForwardSkip(1, 8, 0.9, budget=3), cosines) == [[0, 1, 5, 6, 7, 8, 9]]
    assert layers_run(FeedForwardSkip(1, 8, 0.9, budget=0), cosines) == [list(range(LAYERS))]


def test_rows_of_a_batch_go_their_own_ways() -> None:
    early, late, never = [0.99] * LAYERS, [0.5] * 4 + [0.99] * 6, [0.5] * LAYERS
    skip = FeedForwardSkip(2, 7, 0.9)
    together = layers_run(skip, early, late, never, early)
    assert together == [layers_run(skip, cosines)[0] for cosines in (early, late, never, early)]
    assert together[:3] == [[0, 1, 2, 8, 9], [0, 1, 2, 3, 4, 8, 9], list(range(LAYERS))]


def test_a_threshold_above_one_has_every_row_run_every_layer() -> None:
    passing = FeedForwardSkip(0, 3, 1.5).begin(5)
    hidden = torch.randn(5, 8)
    for layer in range(4):
        assert passing.running(layer) is None  # the stepper then computes what it computes without skipping
        passing.saw(layer, None, hidden, hidden)
    assert passing.skipped == 0


def test_random_skips_have_their_share_and_depend_on_seed_row_and_layer_alone() -> None:
    def left_out(rows: int, seed: int = 3) -> list[int]:
        passing = FeedForwardSkip(2, 21, rule="random", share=0.4, seed=seed).begin(rows)
        through(passing, torch.full((24, rows), 0.5))
        return passing.by_row.tolist()

    whole = left_out(200)
    assert sum(whole) / (200 * 20) == pytest.approx(0.4, abs=0.03)
    assert left_out(7) == whole[:7]
    assert left_out(200, seed=4) != whole


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
    plan = plan_skip(cosines, share=0.25, cold=(1, 1))
    assert plan.skip is not None
    assert (plan.skip.first, plan.skip.last) == (2, 9)  # 1 and 10 are not saturated
    assert plan.expected_share >= 0.25
    passing = plan.skip.begin(cosines.shape[1])
    through(passing, cosines)
    assert passing.skipped / cosines.numel() == pytest.approx(plan.expected_share)
    smaller = plan_skip(cosines, share=0.1, cold=(1, 1))
    assert smaller.skip is not None and smaller.skip.budget < plan.skip.budget


def test_the_planner_lowers_the_threshold_when_the_percentile_leaves_out_too_little() -> None:
    cosines = saturating()
    strict = plan_skip(cosines, share=0.1, cold=(1, 1))
    wide = plan_skip(cosines, share=0.5, cold=(1, 1))
    assert strict.skip is not None and wide.skip is not None
    assert wide.skip.threshold < strict.skip.threshold
    assert wide.expected_share >= 0.5


@pytest.mark.parametrize(("cosines", "share"), [(torch.full((12, 50), 0.6), 0.25), (saturating(), 0.7)])
def test_the_planner_may_answer_nothing_to_skip(cosines: Tensor, share: float) -> None:
    plan = plan_skip(cosines, share=share, cold=(1, 1))
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
        FeedForwardSkip(1, 4, 0.9).check(4)
