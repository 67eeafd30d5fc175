"""Mixtures: shares of tokens, exact budgets, no row twice unless asked, the same draw every time."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from little_rows import documents, rows

from puna.core.errors import PunaError
from puna.core.stage import validate
from puna.train.loader import Feed
from puna.train.mixture import Limits, MixedRows, updated
from puna.train.settings import Feedback, Mixture
from puna.train.sources import Document, Sources, pack_sources

LENGTHS = st.lists(st.integers(2, 32), min_size=1, max_size=4)


def sources(**lengths: list[int]) -> Sources:
    found = {
        name: [Document(encoded, f"task {number % 2}") for number, encoded in enumerate(documents(sizes))]
        for name, sizes in lengths.items()
    }
    return pack_sources(found, found, 32, mode="off")


def mixed(
    of: Sources,
    *,
    batch_tokens: int = 64,
    seed: int = 1,
    shuffled: bool = True,
    epochs: int | None = None,
    max_steps: int | None = None,
    max_tokens: int | None = None,
    **mixture: Any,
) -> MixedRows:
    return MixedRows(
        validate(Mixture, mixture, where="test"),
        of.names,
        of.of,
        numpy.array([row.tokens for row in of.rows]),
        limits=Limits(epochs, max_steps, max_tokens),
        batch_tokens=batch_tokens,
        seed=seed,
        shuffled=shuffled,
    )


def feed(of: Sources, *, batch_tokens: int = 64, rank: int = 0, size: int = 1, **changes: Any) -> Feed:
    return Feed(
        of.rows,
        batch_tokens=batch_tokens,
        micro_batch_tokens=64,
        seed=1,
        rank=rank,
        size=size,
        shuffled=changes.get("shuffled", True),
        mixture=mixed(of, batch_tokens=batch_tokens, **changes),
        sources=of,
    )


def tokens_by_source(of: Sources, chosen: Any) -> dict[str, int]:
    found: Counter[str] = Counter()
    for row in chosen:
        found[of.names[of.of[row]]] += of.rows[int(row)].tokens
    return {name: found[name] for name in of.names}


THREE = sources(a=[30, 7, 12, 25] * 60, b=[32, 5] * 80, c=[9, 3, 4] * 250)


@settings(max_examples=25, deadline=None)
@given(
    weights=st.lists(st.integers(1, 30), min_size=2, max_size=5),
    lengths=st.lists(LENGTHS, min_size=5, max_size=5),
    budget=st.integers(16_000, 24_000),
    seed=st.integers(0, 5),
)
def test_realised_shares_are_within_one_percent_whatever_the_documents_lengths(
    weights: list[int], lengths: list[list[int]], budget: int, seed: int
) -> None:
    """At every moment after 16,000 tokens, 100 times what the sources' longest rows hold together."""
    shares = {f"s{n}": weight / sum(weights) for n, weight in enumerate(weights)}
    of = sources(
        **{
            name: own * (1 + int(1.1 * budget * shares[name] + 100) // sum(own))
            for name, own in zip(shares, lengths, strict=False)
        }
    )
    chosen = mixed(of, seed=seed, weights=dict(zip(shares, weights, strict=True)), max_tokens=budget).rows(0)
    sizes = numpy.array([of.rows[int(row)].tokens for row in chosen])
    before = sizes.cumsum()
    assert before[-2] < budget <= before[-1], "the run ends with the row that reaches its budget"
    assert len(set(chosen.tolist())) == len(chosen), "no row is used twice"
    for number, name in enumerate(shares):
        own = numpy.where(of.of[chosen] == number, sizes, 0).cumsum()
        late = before >= 16_000
        assert numpy.abs(own[late] / before[late] - shares[name]).max() <= 0.01


@example(lengths=[2, 2, 2, 2, 27] + [2] * 25, batch_tokens=32, limit={"max_tokens": 7})  # a heavy step
@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 32), min_size=30, max_size=60),
    batch_tokens=st.integers(32, 150),
    limit=st.one_of(
        st.builds(lambda n: {"max_tokens": n}, st.integers(1, 60)),
        st.builds(lambda n: {"max_steps": n}, st.integers(1, 2)),
        st.builds(
            lambda n, t: {"epochs": n, "epoch_tokens": t, "draw": "anew"},
            st.integers(1, 3),
            st.integers(1, 60),
        ),
        st.builds(lambda t, n: {"max_steps": n, "epoch_tokens": t}, st.integers(1, 20), st.integers(1, 2)),
        st.builds(lambda t, n: {"max_tokens": n, "epoch_tokens": t}, st.integers(1, 20), st.integers(1, 60)),
    ),
)
def test_budgets_are_exact_to_the_row_and_steps_to_the_step(
    lengths: list[int], batch_tokens: int, limit: dict[str, Any]
) -> None:
    of = sources(a=lengths, b=lengths[::-1])
    one = feed(of, batch_tokens=batch_tokens, weights={"a": 1, "b": 1}, repeat=50, **limit)
    epochs = None if {"max_tokens", "max_steps"} & set(limit) else limit["epochs"]
    steps, tokens = one.count(
        epochs=epochs, max_steps=limit.get("max_steps"), max_tokens=limit.get("max_tokens")
    )
    if "max_steps" in limit:
        assert steps == limit["max_steps"]
    elif "max_tokens" in limit:
        assert limit["max_tokens"] <= tokens < limit["max_tokens"] + max(lengths)
    else:
        target = limit["epochs"] * limit["epoch_tokens"]
        assert target <= tokens < target + limit["epochs"] * max(lengths)
    fed, portion = 0, 0
    while fed < tokens:
        for step in one.steps(portion):
            assert 0 < step.tokens <= batch_tokens
            fed += step.tokens
        portion += 1
    assert fed == tokens, "what is drawn is what is counted: no step is left over"


@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_number_of_processes_changes_nothing(size: int) -> None:
    settings_ = {"weights": {"a": 2, "b": 1, "c": 1}, "max_tokens": 2000}
    alone = feed(THREE, **settings_).steps(0)
    ranks = [feed(THREE, rank=rank, size=size, **settings_) for rank in range(size)]
    for number, step in enumerate(alone):
        assert all(rank.steps(0)[number].rows.tolist() == step.rows.tolist() for rank in ranks)
        shared = [row for rank in ranks for micro in rank.micro_batches(step) for row in micro.rows.tolist()]
        assert sorted(shared) == sorted(step.rows.tolist())


def test_a_draw_depends_on_the_seed_and_nothing_that_was_drawn_before() -> None:
    changes = {"weights": {"a": 1, "b": 1, "c": 1}, "epoch_tokens": 500, "max_tokens": 2000, "draw": "anew"}
    one, two, other = mixed(THREE, **changes), mixed(THREE, **changes), mixed(THREE, seed=2, **changes)
    expected = [one.rows(portion).tolist() for portion in range(4)]
    assert [two.rows(portion).tolist() for portion in (3, 1, 0, 2)] == [expected[n] for n in (3, 1, 0, 2)]
    assert other.rows(0).tolist() != expected[0]


def test_epochs_draw_anew_the_same_or_the_next_rows() -> None:
    def epochs(draw: str) -> list[list[int]]:
        one = mixed(THREE, weights={"a": 4, "b": 1, "c": 1}, epoch_tokens=600, epochs=3, draw=draw)
        assert one.portions == 3
        return [one.rows(portion).tolist() for portion in range(3)]

    following = list(itertools.chain(*epochs("next")))
    assert len(set(following)) == len(following), "the next rows: none twice over the epochs"
    same = epochs("same")
    assert sorted(same[0]) == sorted(same[1]) == sorted(same[2])
    assert same[0] != same[1] != same[2] != same[0]
    sequences = [[THREE.of[row] for row in epoch] for epoch in same]
    assert sequences[0] == sequences[1], "the sources take turns as before"
    anew = epochs("anew")
    assert all(set(one) != set(two) for one, two in itertools.combinations(anew, 2))
    assert all(len(set(epoch)) == len(epoch) for epoch in anew)
    for epoch in (*same, *anew):
        found = tokens_by_source(THREE, epoch)
        assert found["a"] / sum(found.values()) == pytest.approx(2 / 3, abs=0.08)


def test_phases_switch_with_the_row_that_reaches_their_tokens() -> None:
    phases = [
        {"tokens": 1000, "weights": {"a": 1}},
        {"tokens": 500, "weights": {"a": 1, "b": 1}},
        {"tokens": 800, "weights": {"c": 3, "b": 1}},
    ]
    one = feed(THREE, phases=phases)
    assert one.mixture is not None and one.mixture.portions == 3
    drawn = [tokens_by_source(THREE, one.mixture.rows(portion)) for portion in range(3)]
    for phase, found in zip(phases, drawn, strict=True):
        assert phase["tokens"] <= sum(found.values()) < phase["tokens"] + 32  # type: ignore[operator]
    assert drawn[0]["b"] == drawn[0]["c"] == drawn[1]["c"] == drawn[2]["a"] == 0
    assert abs(drawn[1]["a"] - drawn[1]["b"]) <= 2 * 32
    assert abs(drawn[2]["c"] - 3 * drawn[2]["b"]) <= 4 * 32
    every = [row for portion in range(3) for row in one.mixture.rows(portion).tolist()]
    assert len(set(every)) == len(every), "a source goes on where the phase before left it"
    assert one.count() == (
        sum(len(one.steps(portion)) for portion in range(3)),
        sum(sum(found.values()) for found in drawn),
    )


def test_phases_by_share_add_up_to_the_tokens_of_the_run() -> None:
    phases = [{"share": 0.3, "weights": {"a": 1}}, {"share": 0.7, "weights": {"b": 1, "c": 1}}]
    one = mixed(THREE, phases=phases, max_tokens=2000)
    sizes = [sum(tokens_by_source(THREE, one.rows(portion)).values()) for portion in range(2)]
    assert 600 <= sizes[0] < 632 and 2000 <= sum(sizes) < 2032


def test_a_source_that_runs_out_is_named_before_training() -> None:
    of = sources(small=[10] * 10, large=[10] * 100)
    with pytest.raises(PunaError, match="'small' has no row left") as error:
        feed(of, weights={"small": 1, "large": 1}, max_tokens=400).count(max_tokens=400)
    assert "100 tokens" in str(error.value) and "{small: 2}" in str(error.value)


def test_repeat_allows_so_many_passes_each_in_another_order() -> None:
    of = sources(small=[10] * 10, large=[10] * 100)
    weights = {"small": 1, "large": 1}
    chosen = mixed(of, weights=weights, repeat={"small": 2}, max_tokens=400).rows(0)
    small = [row for row in chosen.tolist() if of.of[row] == 0]
    assert sorted(small[:10]) == sorted(small[10:]) == list(range(10)) and small[:10] != small[10:]
    with pytest.raises(PunaError, match="2 passes"):
        mixed(of, weights=weights, repeat={"small": 2}, max_tokens=440).rows(0)


def test_stop_ends_the_run_with_the_first_empty_source() -> None:
    of = sources(small=[10] * 10, large=[10] * 100)
    one = feed(of, weights={"small": 1, "large": 3}, when_short="stop")
    steps, tokens = one.count(epochs=1)
    assert 390 <= tokens <= 440 and steps == len(one.steps(0))
    assert tokens_by_source(of, numpy.concatenate([step.rows for step in one.steps(0)]))["small"] == 100


def test_sorted_sources_come_in_order_each() -> None:
    chosen = mixed(THREE, shuffled=False, weights={"a": 1, "b": 2, "c": 1}, max_tokens=3000).rows(0)
    for number in range(3):
        own = chosen[THREE.of[chosen] == number]
        assert own.tolist() == list(range(own[0], own[0] + len(own)))


def test_without_weights_shares_are_those_of_the_sources() -> None:
    chosen = mixed(THREE, epoch_tokens=3000, epochs=1).rows(0)
    found = tokens_by_source(THREE, chosen)
    whole = tokens_by_source(THREE, range(len(THREE.rows)))
    for name, tokens in found.items():
        assert tokens / sum(found.values()) == pytest.approx(whole[name] / sum(whole.values()), abs=0.03)


# ---- feedback ------------------------------------------------------------------------------------------


def test_feedback_gives_share_to_what_got_worse_and_nothing_for_equal_changes() -> None:
    names = ["a", "b", "c"]
    before = {"a": 2.0, "b": 2.0, "c": 2.0}
    rule = Feedback(every_steps=1, strength=0.5, importance={"b": 0.5})
    weights = [0.5, 0.3, 0.2]
    assert updated(weights, names, before, {"a": 2.3, "b": 2.3, "c": 2.3}, rule) == weights
    assert updated(weights, names, before, before, rule) == weights
    found = updated(weights, names, before, {"a": 2.5, "b": 1.9, "c": 1.9}, rule)
    assert sum(found) == pytest.approx(1) and all(weight > 0 for weight in found)
    assert found[0] > 0.5 and found[1] < 0.3 and found[2] < 0.2
    # a moves by +strength; b and c, equally far below the mean, by half of it: b weighs that half.
    moved = [0.5 * 1.5, 0.3 * (1 - 0.5 * 0.5 * 0.5), 0.2 * (1 - 0.5 * 0.5)]
    assert found == pytest.approx([weight / sum(moved) for weight in moved])


def test_a_source_of_no_importance_keeps_its_weight_and_moves_no_other() -> None:
    names, weights = ["new", "a", "b"], [0.2, 0.5, 0.3]
    rule = Feedback(every_steps=1, strength=0.5, importance={"new": 0.0})
    before = {"new": 9.0, "a": 2.0, "b": 2.0}
    found = updated(weights, names, before, {"new": 3.0, "a": 2.3, "b": 2.0}, rule)
    assert found == updated(weights, names, before, {"new": 9.0, "a": 2.3, "b": 2.0}, rule)
    assert found[0] == 0.2 and found[1] > 0.5 and sum(found) == pytest.approx(1)
    alone = updated([0.625, 0.375], ["a", "b"], before, {"a": 2.3, "b": 2.0}, rule)
    assert found[1:] == pytest.approx([0.8 * weight for weight in alone])
    assert updated(weights, names, before, {"new": 3.0, "a": 2.3, "b": 2.3}, rule) == weights


@given(
    losses=st.lists(st.tuples(st.floats(0, 200), st.floats(0, 200)), min_size=2, max_size=5),
    strength=st.floats(0.01, 0.99),
)
def test_feedback_keeps_weights_positive_and_their_sum(
    losses: list[tuple[float, float]], strength: float
) -> None:
    names = [f"s{n}" for n in range(len(losses))]
    weights = [1 / len(losses)] * len(losses)
    before, now = (dict(zip(names, values, strict=True)) for values in zip(*losses, strict=True))
    found = updated(weights, names, before, now, Feedback(every_steps=1, strength=strength))
    assert sum(found) == pytest.approx(1) and min(found) > 0


def test_a_planted_rise_of_loss_changes_what_is_drawn_from_then_on() -> None:
    one = feed(
        THREE,
        weights={"a": 1, "b": 1, "c": 1},
        feedback={"every_steps": 8, "strength": 0.9},
        max_steps=30,
    )
    assert one.mixture is not None and one.mixture.portions == 4
    assert one.count(max_steps=30)[0] == 30, "the steps are known before any loss is"
    level = {"a": 2.0, "b": 2.0, "c": 2.0}
    history = [level]
    one.follow(history)
    assert one.awaits_losses(1, 0) and not one.awaits_losses(1, 1) and not one.awaits_losses(0, 0)
    first = tokens_by_source(THREE, one.mixture.rows(0))
    history.append({**level, "b": 2.5})
    second = tokens_by_source(THREE, one.mixture.rows(1))
    history.append({**level, "b": 2.5})
    third = tokens_by_source(THREE, one.mixture.rows(2))
    history.append({**level, "b": 2.0})
    fourth = tokens_by_source(THREE, one.mixture.rows(3))
    assert [len(one.steps(portion)) for portion in range(4)] == [8, 8, 8, 6]
    share = [found["b"] / sum(found.values()) for found in (first, second, third, fourth)]
    assert share[0] == pytest.approx(1 / 3, abs=0.07)
    assert share[1] > share[0] + 0.2 and share[2] == pytest.approx(share[1], abs=0.07)
    assert share[3] < share[2] - 0.2
    again = feed(
        THREE, weights={"a": 1, "b": 1, "c": 1}, feedback={"every_steps": 8, "strength": 0.9}, max_steps=30
    )
    again.follow([dict(losses) for losses in history])
    assert again.steps(3)[2].rows.tolist() == one.steps(3)[2].rows.tolist(), "a resumed run draws the same"


# ---- mistakes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mixture", "words"),
    [
        ({"weights": {"a": 1, "b": 1, "d": 1}}, "unknown source 'd'"),
        ({"weights": {"a": 1, "b": 1}}, "'c' has no weight"),
        ({"weights": {"a": 0, "b": 0}}, "choose nothing"),
        ({"weights": {"a": -1}}, "greater than or equal to 0"),
        ({"phases": [{"tokens": 5, "weights": {"a": 1}}]}, "'b' has no weight"),
        ({"phases": [{"weights": {"a": 1}}]}, "either tokens or share"),
        ({"phases": [{"share": 0.5, "weights": {"a": 1}}]}, "add up to 0.5"),
        (
            {"phases": [{"share": 0.5, "weights": {"a": 1}}, {"tokens": 5, "weights": {"a": 1}}]},
            "all phases say tokens",
        ),
        ({"phases": [{"tokens": 5, "weights": {"a": 1}}], "epoch_tokens": 5}, "phases and epoch_tokens"),
        ({"weights": {"a": 1}, "draw": "same"}, "without epoch_tokens"),
        ({"repeat": 2}, "mean nothing without weights"),
        ({"epoch_tokens": 5, "when_short": "stop"}, "cannot go together"),
        ({"epoch_tokens": 5, "caps": {"d": {"rows": 1}}}, "unknown source 'd'"),
        ({"epoch_tokens": 5, "caps": {"a": {}}}, "a cap says at least one"),
        ({"epoch_tokens": 5, "repeat": {"d": 2}}, "unknown source 'd'"),
        ({"epoch_tokens": 5, "repeat": 0}, "repeat"),
        ({"feedback": {"every_steps": 2, "strength": 1.0}}, "stay below 1"),
        ({"feedback": {"every_steps": 2, "importance": {"a": 2.0}}}, "stay below 1"),
        ({"feedback": {"every_steps": 2}, "epoch_tokens": 9}, "feedback and epoch_tokens"),
        ({"weight": {"a": 1}}, "weights"),
    ],
)
def test_mistakes_are_told_by_name(mixture: dict[str, Any], words: str) -> None:
    with pytest.raises(PunaError) as error:
        mixed(THREE, **mixture)
    assert words in str(error.value)


def test_a_held_out_loss_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(PunaError, match="not a number"):
        updated([1.0], ["a"], {"a": 1.0}, {"a": float("nan")}, Feedback(every_steps=1))


def test_rows_of_the_helper_are_one_source_each() -> None:
    assert rows([3, 4]).report.rows == 2
    assert tokens_by_source(sources(a=[3, 4], b=[5]), [0, 1, 2]) == {"a": 7, "b": 5}
