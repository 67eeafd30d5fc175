"""The fault drill, reduced: two kills of a real training in its own processes, and a shard that vanishes."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import faults


@pytest.mark.slow
def test_a_reduced_drill_meets_every_fault(tmp_path: Path) -> None:
    found = faults.drill(tmp_path, model=None, count=2, seed=1, only=["kills", "vanished"])
    assert [verdict.fault for verdict in found] == ["killed", "vanished data"]
    assert not [verdict for verdict in found if verdict.failures]


def test_moments_of_twenty_kills_cover_the_run_the_writing_and_the_end() -> None:
    found = faults.moments(20, random.Random(0))
    assert len(found) == 20 and found[:-2] == sorted(found[:-2], key=lambda moment: moment.step)
    kinds = [moment.kind for moment in found]
    assert kinds.count("checkpoint") == 8 and kinds.count("end") == 2
    assert (
        max(moment.step for moment in found[:-2]) - min(moment.step for moment in found) > faults.STEPS // 2
    )
