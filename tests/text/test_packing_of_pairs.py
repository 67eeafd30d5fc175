"""Documents that stay together: the two answers of a pair, packed side by side."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.text.encode import Encoded
from puna.text.packing import (
    ALIKE,
    NO_TARGET,
    TARGETS_CUT,
    WITHOUT_THE_OTHER,
    Packed,
    collate,
    group_of,
    pack,
)

modes = pytest.mark.parametrize("mode", ["fit", "off"])


def document(ids: list[int], trained: list[bool] | None = None, source: str = "") -> Encoded:
    return Encoded(ids, trained or [False] + [True] * (len(ids) - 1), source)


def pair(*lengths: int) -> list[Encoded]:
    return [document(list(range(9 * side, 9 * side + size))) for side, size in enumerate(lengths)]


@st.composite
def pairs(draw: st.DrawFn) -> list[Encoded]:
    """Pairs of 1 to 30 tokens a side, some alike, some without targets; the first one is kept."""
    rows = [document([5, 6], source="0:a"), document([5, 7], source="0:b")]
    for number in range(1, draw(st.integers(1, 12))):
        for side in "ab":
            ids = draw(st.lists(st.integers(3, 5), min_size=1, max_size=30))
            trained = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
            rows.append(document(ids, [False, *trained[1:]], source=f"{number}:{side}"))
    return rows


def lengths_of(packed: Packed) -> list[list[int]]:
    return [[len(piece) for piece in row.slices] for row in packed]


@modes
@given(rows=pairs(), length=st.integers(4, 40))
def test_counts_add_up_and_each_pair_is_whole_in_one_row_or_dropped(
    mode: Any, rows: list[Encoded], length: int
) -> None:
    packed = pack(rows, length, mode=mode, group=2)
    report = packed.report
    assert report.rows_in == report.used + sum(report.dropped.values())
    assert report.tokens_in == report.tokens + report.truncated + sum(report.dropped_tokens.values())
    assert report.tokens == sum(row.tokens for row in packed) and report.cuts == 0
    assert report.targets == sum(row.targets for row in packed)
    assert set(report.dropped) <= {NO_TARGET, TARGETS_CUT, WITHOUT_THE_OTHER, ALIKE}
    kept = Counter()
    cut = 0
    for row in packed:
        assert row.tokens <= length and len(row.slices) % 2 == 0
        for chosen, rejected in zip(row.slices[::2], row.slices[1::2], strict=True):
            place = next(n for n, candidate in enumerate(rows) if candidate is chosen.document)
            assert place % 2 == 0 and rows[place + 1] is rejected.document
            assert chosen.targets and rejected.targets
            assert chosen.document.ids[: chosen.stop] != rejected.document.ids[: rejected.stop]
            kept[place] += 1
            cut += sum(len(piece) < len(piece.document) for piece in (chosen, rejected))
    assert set(kept.values()) == {1} and 2 * len(kept) == report.used
    assert cut == report.truncated_rows


@modes
@given(rows=pairs(), length=st.integers(4, 40))
def test_a_document_is_cut_only_where_its_pair_does_not_fit(
    mode: Any, rows: list[Encoded], length: int
) -> None:
    for row in pack(rows, length, mode=mode, group=2):
        for sides in zip(row.slices[::2], row.slices[1::2], strict=True):
            cut = [piece for piece in sides if len(piece) < len(piece.document)]
            if sum(len(piece.document) for piece in sides) <= length:
                assert not cut
            else:
                assert cut and len({len(piece) for piece in cut}) == 1
                assert sum(map(len, sides)) >= length - 1  # no more is cut than has to be


def test_two_long_answers_are_cut_at_one_length_and_a_short_one_leaves_its_room() -> None:
    assert lengths_of(pack(pair(20, 30), 16, mode="fit", group=2)) == [[8, 8]]
    assert lengths_of(pack(pair(4, 30), 16, mode="fit", group=2)) == [[4, 12]]
    assert lengths_of(pack(pair(30, 4), 16, mode="fit", group=2)) == [[12, 4]]
    report = pack(pair(20, 30), 16, mode="fit", group=2).report
    assert (report.truncated, report.truncated_rows, report.used) == (34, 2, 2)


def test_fit_packs_pairs_by_their_common_size_and_off_one_by_one() -> None:
    rows = [*pair(3, 3), *pair(4, 6), *pair(2, 2)]
    assert lengths_of(pack(rows, 10, mode="fit", group=2)) == [[3, 3, 2, 2], [4, 6]]
    assert lengths_of(pack(rows, 10, mode="off", group=2)) == [[3, 3], [4, 6], [2, 2]]


@modes
def test_a_pair_is_dropped_whole_with_the_reason(mode: Any) -> None:
    silent = document([3, 4, 5], [False] * 3)
    late = document(list(range(20)), [False] * 19 + [True])
    alike = [document([7] * 9 + [side]) for side in (1, 2)]
    rows = [*pair(3, 3), pair(3, 3)[0], silent, late, pair(3, 3)[0], *alike]
    report = pack(rows, 16, mode=mode, group=2).report
    assert report.dropped == {WITHOUT_THE_OTHER: 2, NO_TARGET: 1, TARGETS_CUT: 1, ALIKE: 2}
    assert report.used == 2 and report.dropped_tokens[ALIKE] == 20
    assert pack(alike, 20, mode=mode, group=2).report.used == 2


def test_segments_tell_the_two_answers_apart_and_positions_restart() -> None:
    batch = collate(pack(pair(3, 2), 8, mode="fit", group=2))
    assert batch.segments.tolist() == [[0, 0, 0, 1, 1]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1]]


def test_groups_are_not_wrapped_nor_incomplete() -> None:
    for mode, rows in (("wrap", pair(3, 3)), ("fit", pair(3, 3)[:1])):
        with pytest.raises(PunaError, match="come in groups of 2"):
            pack(rows, 16, mode=mode, group=2)  # type: ignore[arg-type]
    with pytest.raises(PunaError, match="two tokens of each"):
        pack(pair(3, 3), 3, mode="fit", group=2)


def test_only_preferences_stay_together() -> None:
    assert [group_of(kind) for kind in ("documents", "messages", "preferences")] == [1, 1, 2]
