"""Sources: caps that hold, packing source by source, and a ledger that balances."""

from __future__ import annotations

from collections import Counter

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from little_rows import documents

from puna.core.errors import PunaError
from puna.data.caps import Cap, capped
from puna.text.encode import Encoded
from puna.text.packing import pack
from puna.train.curriculum import in_order
from puna.train.ledger import check_trained, ledger, ledger_metrics, ledger_table
from puna.train.sources import Document, pack_sources


def tasks(lengths: list[int], count: int = 3) -> list[Document]:
    return [Document(encoded, f"task{number % count}") for number, encoded in enumerate(documents(lengths))]


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=3, max_size=60),
    cap=st.fixed_dictionaries(
        {},
        optional={
            "rows": st.integers(3, 30),
            "tokens": st.integers(120, 400),
            "task_rows": st.integers(1, 9),
            "task_tokens": st.integers(40, 90),
        },
    ).filter(bool),
    seed=st.integers(0, 4),
)
def test_caps_hold_and_every_task_is_present(lengths: list[int], cap: dict[str, int], seed: int) -> None:
    brought = tasks(lengths)
    kept = capped(brought, Cap(**cap), seed=seed)
    assert kept == capped(brought, Cap(**cap), seed=seed)
    rows, tokens = Counter(d.task for d in kept), Counter[str]()
    for document in kept:
        tokens[document.task] += len(document.encoded)
    assert len(kept) <= cap.get("rows", 10**9) and tokens.total() <= cap.get("tokens", 10**9)
    assert max(rows.values()) <= cap.get("task_rows", 10**9)
    assert max(tokens.values()) <= cap.get("task_tokens", 10**9)
    places = [int(d.encoded.source.removeprefix("row")) for d in kept]
    assert places == sorted(places), "in the order they had"
    if set(cap) & {"task_rows", "task_tokens"}:
        assert set(rows) == {"task0", "task1", "task2"}
    left = [d for d in brought if d not in kept]
    for document in left:
        size, task = len(document.encoded), document.task
        assert (
            len(kept) + 1 > cap.get("rows", 10**9)
            or tokens.total() + size > cap.get("tokens", 10**9)
            or rows[task] + 1 > cap.get("task_rows", 10**9)
            or tokens[task] + size > cap.get("task_tokens", 10**9)
        ), "nothing is left out that fits"


def test_caps_by_task_take_turns_so_that_a_small_task_is_not_drowned() -> None:
    brought = [Document(d, "large" if n else "small") for n, d in enumerate(documents([10] * 200))]
    for seed in range(5):
        assert "small" in {d.task for d in capped(brought, Cap(rows=4, task_rows=50), seed=seed)}


def test_another_seed_draws_other_rows_and_no_cap_draws_none() -> None:
    brought = tasks([10] * 40)
    assert capped(brought, Cap(rows=9), seed=1) != capped(brought, Cap(rows=9), seed=2)
    assert capped(brought, None, seed=1) == brought


def test_a_task_of_which_nothing_is_left_is_named() -> None:
    with pytest.raises(PunaError, match="'task1' fits"):
        capped(tasks([5, 50, 5]), Cap(task_tokens=20), seed=0)
    with pytest.raises(PunaError, match="no row fits"):
        capped(tasks([50, 50]), Cap(tokens=20), seed=0)


def test_a_packed_row_belongs_to_one_source() -> None:
    found = {"a": tasks([5, 9, 20, 31]), "b": tasks([7] * 9)}
    packed = pack_sources(found, found, 32, mode="wrap")
    assert packed.names == ("a", "b")
    for number, name in enumerate(packed.names):
        own = [packed.rows[int(row)] for row in numpy.flatnonzero(packed.of == number)]
        alone = pack([d.encoded for d in found[name]], 32, mode="wrap")
        assert own == list(alone)
        assert sum(row.tokens for row in own) == sum(len(d.encoded) for d in found[name])


def test_one_source_is_packed_as_it_always_was() -> None:
    brought = tasks([5, 40, 9, 20, 31])
    packed = pack_sources({"all": brought}, {"all": brought}, 32, mode="fit")
    plain = pack([d.encoded for d in brought], 32, mode="fit")
    assert list(packed.rows) == list(plain) and packed.rows.report == plain.report


def test_a_source_without_anything_to_learn_is_named() -> None:
    found = {"a": tasks([5]), "b": [Document(Encoded([1, 2], [False, False], "x"), "t")]}
    with pytest.raises(PunaError, match="source 'b'"):
        pack_sources(found, found, 32, mode="off")


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=2, max_size=40),
    mode=st.sampled_from(["wrap", "fit", "off"]),
    data=st.data(),
)
def test_the_ledger_balances_whatever_is_capped_dropped_cut_and_used(
    lengths: list[int], mode: str, data: st.DataObject
) -> None:
    brought = [
        Document(Encoded([7] * n, [False, *[True] * (n - 1)], f"row{i}"), "t") for i, n in enumerate(lengths)
    ]
    brought.append(Document(Encoded([7] * 9, [False] + [True] * 8, "sure"), "t"))
    kept = [d for d in brought if d.encoded.source == "sure" or data.draw(st.booleans())]
    packed = pack_sources({"a": brought, "b": brought}, {"a": kept, "b": brought}, 32, mode=mode)  # type: ignore[arg-type]
    sizes = numpy.array([row.tokens for row in packed.rows])
    uses = numpy.array(data.draw(st.lists(st.integers(0, 3), min_size=len(sizes), max_size=len(sizes))))
    uses[0] += 1
    lines = ledger(packed, sizes, uses)
    for line, left in zip(lines, (kept, brought), strict=True):
        assert line.tokens_in == sum(len(d.encoded) for d in brought)
        assert line.capped == line.tokens_in - sum(len(d.encoded) for d in left)
        assert line.tokens_in == line.capped + line.dropped + line.truncated + line.packed
        assert line.packed == line.used + line.unused
        assert line.trained >= line.used
    check_trained(lines, int((sizes * uses).sum()))
    with pytest.raises(PunaError, match="does not balance"):
        check_trained(lines, int((sizes * uses).sum()) + 1)
    metrics = ledger_metrics(lines)
    assert metrics["ledger.a.share"] + metrics["ledger.b.share"] == pytest.approx(1)
    table = ledger_table(lines)
    assert all(len(row) == len(table["columns"]) for row in table["rows"])


def test_order_is_stable_both_ways() -> None:
    values = [3.0, 1.0, 2.0, 1.0]
    assert in_order(values, descending=False) == [1, 3, 2, 0]
    assert in_order(values, descending=True) == [0, 2, 1, 3]
