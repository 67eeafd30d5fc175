"""The server drill, reduced: real servers in their own processes, few requests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import server


@pytest.mark.slow
def test_a_reduced_drill_meets_every_demand(tmp_path: Path) -> None:
    cases = ["streams", "disconnects", "sigterm"]
    found = server.drill(tmp_path, model=None, streams=12, requests=40, seed=1, only=cases)
    assert [verdict.case for verdict in found] == [*cases, "logs"]
    assert not [verdict for verdict in found if verdict.failures]
