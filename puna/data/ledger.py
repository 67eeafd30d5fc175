"""Ledgers: for each step what was read, what was kept, and what was dropped for which reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Tally:
    """Counts of one step in one ``unit``: everything read is either kept or dropped for a reason."""

    unit: str
    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def keep(self) -> None:
        """Count one as read and kept."""
        self.read += 1
        self.kept += 1

    def drop(self, reason: str) -> None:
        """Count one as read and dropped because of ``reason``."""
        self.read += 1
        self.dropped[reason] += 1

    def as_json(self) -> dict[str, Any]:
        """The counts as plain values, reasons sorted by name."""
        counts = {"unit": self.unit, "read": self.read, "kept": self.kept}
        return {**counts, "dropped": dict(sorted(self.dropped.items()))}


class Ledger(dict[str, Tally]):
    """Tallies by the step's name, in the order of the work."""

    def step(self, name: str, unit: str) -> Tally:
        """The tally of the step ``name``, made when it is first asked for."""
        return self.setdefault(name, Tally(unit))

    def dropped(self) -> Counter[str]:
        """Drops by reason over all steps."""
        return sum((tally.dropped for tally in self.values()), Counter())

    def as_json(self) -> dict[str, Any]:
        """The ledger as plain values."""
        return {name: tally.as_json() for name, tally in self.items()}


def unbalanced(ledger: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The first step of a plain ledger whose counts do not add up, or None."""
    for name, tally in ledger.items():
        if tally["read"] != tally["kept"] + sum(tally["dropped"].values()):
            return name
    return None
