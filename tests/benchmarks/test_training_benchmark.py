"""The arithmetic of the training benchmark: ratios, operations, fingerprints, groups of operators."""

from __future__ import annotations

import pytest

from benchmarks import training, training_profile, training_rows, training_work
from puna.model.spec import BlockSpec, LlamaSpec
from puna.train.plan import Method, training_operations

SPEC = LlamaSpec(
    vocab_size=100,
    hidden_size=32,
    blocks=(BlockSpec(heads=4, kv_heads=2, head_dim=8, width=64),) * 2,
    tied=True,
)


def document(length: int, learnt: int) -> training_rows.Document:
    """A document whose last ``learnt`` tokens are learnt."""
    return training_rows.Document(tuple(range(length)), (False,) * (length - learnt) + (True,) * learnt)


def test_ratio_is_the_median_of_the_ratios_of_pairs_and_not_the_ratio_of_medians() -> None:
    found = training.ratio([2.0, 30.0, 10.0], [1.0, 10.0, 10.0])
    assert (found.middle, found.low, found.high) == (2.0, 1.0, 3.0)
    assert str(found) == "2.00 [1.00-3.00]"


def test_speed_leaves_out_the_first_step_and_counts_what_was_computed_ahead() -> None:
    result = training.Result([100.0, 2.0, 3.0], [7, 10, 20], [1.0], 1, precomputing=3.0)
    assert result.measured_seconds == pytest.approx(5.0 + 2.0)
    assert result.speed == pytest.approx(30 / 7.0)


def test_differences_undo_a_running_sum() -> None:
    assert training.differences([3.0, 5.0, 9.0]) == [3.0, 2.0, 4.0]


def test_operations_are_the_planners_where_every_place_is_learnt() -> None:
    """All but the first token are learnt, so the head is idle once a document."""
    whole = training_work.operations(SPEC, training_work.FULL, [((document(16, 15),),)])
    assert whole == 16 * training_operations(SPEC, Method(), 16) - 6 * 100 * 32


def test_operations_of_lora_need_no_gradient_of_the_head_and_skip_it_where_nothing_is_learnt() -> None:
    many = training_work.operations(SPEC, training_work.SFT, [((document(16, 10),),)])
    few = training_work.operations(SPEC, training_work.SFT, [((document(16, 4),),)])
    assert many - few == 6 * 4 * 100 * 32


def test_a_preference_pair_needs_the_reference_too() -> None:
    step = [((document(16, 5), document(20, 9)),)]
    assert training_work.operations(SPEC, training_work.DPO, step) > training_work.operations(
        SPEC, training_work.SFT, step
    )


def test_a_changed_token_mask_or_order_of_steps_is_seen_and_the_order_inside_a_step_is_not() -> None:
    first, second = document(5, 2), document(6, 3)
    steps = [((first,), (second,)), ((document(9, 1),),)]
    planned = training_rows.digests(steps)
    assert training_rows.same_documents([((second, first),), steps[1]], planned)
    assert not training_rows.same_documents([((document(5, 3),), (second,)), steps[1]], planned)
    assert not training_rows.same_documents(steps[::-1], planned)


def test_the_first_token_is_never_learnt() -> None:
    assert training_rows.digest([1, 2], [True, True]) == training_rows.digest([1, 2], [False, True])
    assert training_rows.Document((1, 2), (True, True)).targets == 1


def test_steps_come_back_as_they_were_written(tmp_path) -> None:
    steps = [((document(5, 2), document(3, 1)),), ((document(4, 4),),)]
    training_rows.write_steps(tmp_path / "steps.json", steps)
    assert training_rows.read_steps(tmp_path / "steps.json") == steps


def test_drawn_lengths_are_mixed_and_near_their_mean() -> None:
    lengths = training_rows.wanted_lengths(4000)
    assert min(lengths) >= 50
    assert max(lengths) == 1000
    assert sum(lengths) / len(lengths) == pytest.approx(250, rel=0.1)


@pytest.mark.parametrize(
    ("names", "shapes", "group"),
    [
        (["aten::mm"], [[64, 576], [576, 1536]], "matrix products"),
        (["aten::mm"], [[64, 576], [576, 16]], "adapter"),
        (["aten::bmm", "_TiledAttentionBackward"], [[3, 64, 64], [3, 64, 64]], "attention"),
        (["aten::mm", "_LinearCrossEntropy"], [[64, 576], [576, 49152]], "head and loss"),
        (["aten::mul", "benchmark: optimiser"], [[100]], "optimiser"),
        (["aten::add"], [[64, 576]], "norms, gates, rotation, sums"),
    ],
)
def test_operators_find_their_group(names, shapes, group) -> None:
    assert training_profile.group_of(names, shapes, 16) == group


def test_operations_of_products_follow_from_shapes() -> None:
    assert training_profile.product_operations("aten::mm", [[3, 4], [4, 5]]) == 2 * 3 * 4 * 5
    assert training_profile.product_operations("aten::addmm", [[5], [3, 4], [4, 5]]) == 2 * 3 * 4 * 5
    assert training_profile.product_operations("aten::bmm", [[2, 3, 4], [2, 4, 5]]) == 2 * 2 * 3 * 4 * 5
    assert training_profile.product_operations("aten::mkldnn_linear", [[2, 3, 4], [5, 4]]) == 2 * 6 * 4 * 5
    assert training_profile.product_operations("aten::mul", [[3, 4], [3, 4]]) == 0
