"""``packing_checks``: whole windows pass, and each kind of fault is counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from puna.text import packing_checks
from puna.text.encode import Encoded
from puna.text.packing import Batch, Packed, Row, collate


def documents(*lengths: int) -> list[Encoded]:
    return [
        Encoded([100 * number + place for place in range(length)], [False] + [True] * (length - 1))
        for number, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("mode", ["wrap", "fit", "off"])
def test_nothing_is_out_of_place_lost_or_doubled(mode: Any) -> None:
    found = packing_checks.check(documents(5, 9, 30, 2, 17), 9 if mode == "wrap" else 30, mode)
    assert found["shifted"] == found["missing"] == found["lost"] == found["doubled"] == 0
    assert found["tokens"] == 63 and found["targets"] == 63 - 5 - found["cuts"]


def test_a_window_of_the_context_and_one_has_as_many_targets_as_the_context() -> None:
    assert packing_checks.check(documents(100), 17)["targets_of_a_full_row"] == 16


def test_tokens_cut_off_are_lost() -> None:
    assert packing_checks.check(documents(5, 12), 9, "fit")["lost"] == 3


def test_faults_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(rows: Any, *, length: int) -> Batch:
        batch = collate(rows, length=length)
        return Batch(batch.input_ids, torch.roll(batch.labels, 1, 1), batch.positions, batch.segments)

    def twice(encoded: Any, length: int, *, mode: Any) -> Packed:
        packed = real(encoded, length, mode=mode)
        return Packed([*packed[:1], *(Row(row.slices) for row in packed[:1])], packed.report)

    real = packing_checks.pack
    monkeypatch.setattr(packing_checks, "collate", shifted)
    assert packing_checks.check(documents(9, 9), 9)["shifted"] > 0
    monkeypatch.setattr(packing_checks, "collate", collate)
    monkeypatch.setattr(packing_checks, "pack", twice)
    found = packing_checks.check(documents(9, 9), 9)
    assert found["lost"] == 9 and found["doubled"] == 9
