"""The published systems that come with puna as recipes: what each does, and what was last measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.core.files import read_json
from puna.run import claims
from puna.run.recipe import SYSTEMS, Header, load_header, system_names

SNAPSHOTS = SYSTEMS.parent.parent / "docs" / "systems"


@dataclass(frozen=True)
class System:
    """A system: its recipe's header and the claims last measured (None: never, on this machine)."""

    name: str
    header: Header
    measured: dict[str, Any] | None
    measured_where: str | None

    @property
    def verdict(self) -> str:
        """The measured claims in a few words."""
        if self.measured is None:
            return "not measured here"
        judged = self.measured["claims"]
        passed = sum(claim["passed"] for claim in judged)
        return f"{passed} of {len(judged)} claims hold"


def all_systems(runs: Path | str = "runs") -> list[System]:
    """Every system that has a recipe, ordered by number."""
    found = [describe(name, runs) for name in system_names()]
    return sorted(found, key=lambda system: (system.header.system or "~", system.name))


def describe(name: str, runs: Path | str = "runs") -> System:
    """One system; the claims are those of the newest run below ``runs``, else of the documentation."""
    header = load_header(name)
    where = _newest_claims(header.name, Path(runs)) or _snapshot(name)
    return System(name, header, read_json(where) if where else None, str(where) if where else None)


def _newest_claims(name: str, runs: Path) -> Path | None:
    files = [file for file in runs.glob(f"*/{claims.FILE}") if read_json(file).get("recipe") == name]
    return max(files, key=lambda file: file.stat().st_mtime, default=None)


def _snapshot(name: str) -> Path | None:
    file = SNAPSHOTS / f"{name}.claims.json"
    return file if file.is_file() else None
