"""The token ledger of a run: for every source what there was, what was used, and how often. It balances.

tokens in = capped + dropped + truncated + packed
packed    = used at least once + never used
trained   = sum over rows of tokens times uses
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy

from puna.core.errors import PunaError
from puna.train.sources import Entry, Sources

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Line:
    """The ledger of one source, in tokens unless it says rows. ``most``: uses of its most used row."""

    name: str
    tokens_in: int
    capped: int
    dropped: int
    truncated: int
    packed: int
    used: int
    trained: int
    rows: int
    rows_used: int
    most: int

    @property
    def unused(self) -> int:
        """Tokens of rows that the run did not come to."""
        return self.packed - self.used


def ledger(sources: Sources, lengths: NDArray[numpy.int64], uses: NDArray[numpy.int64]) -> list[Line]:
    """A line for each source; ``uses[row]`` is how often the run took a row, ``lengths[row]`` its tokens."""
    return [
        _line(entry, lengths[sources.of == number], uses[sources.of == number])
        for number, entry in enumerate(sources.entries)
    ]


def _line(entry: Entry, lengths: NDArray[numpy.int64], uses: NDArray[numpy.int64]) -> Line:
    report = entry.report
    line = Line(
        name=entry.name,
        tokens_in=entry.tokens_in,
        capped=entry.capped_tokens,
        dropped=sum(report.dropped_tokens.values()),
        truncated=report.truncated,
        packed=int(lengths.sum()),
        used=int(lengths[uses > 0].sum()),
        trained=int((lengths * uses).sum()),
        rows=len(uses),
        rows_used=int((uses > 0).sum()),
        most=int(uses.max()),
    )
    if line.tokens_in != line.capped + line.dropped + line.truncated + line.packed:
        raise AssertionError(f"the ledger of {entry.name!r} does not balance: {line}")
    return line


def check_trained(lines: list[Line], tokens: int) -> None:
    """Refuse a ledger whose sources were not trained on as many tokens as the run was."""
    counted = sum(line.trained for line in lines)
    if counted != tokens:
        raise PunaError(
            "the token ledger does not balance with the run",
            where="metrics.jsonl",
            found=f"{counted:,} tokens",
            expected=f"{tokens:,} tokens",
        )


def ledger_metrics(lines: list[Line]) -> dict[str, float]:
    """``ledger.<source>.<column>`` and the realised ``share``."""
    total = sum(line.trained for line in lines)
    found: dict[str, float] = {}
    for line in lines:
        values = {"share": line.trained / total, "trained": line.trained, "used": line.used}
        values |= {"unused": line.unused, "capped": line.capped, "most": line.most}
        values |= {"dropped": line.dropped, "truncated": line.truncated}
        found |= {f"ledger.{line.name}.{name}": value for name, value in values.items()}
    return found


def ledger_table(lines: list[Line]) -> dict[str, Any]:
    """The ledger for the report."""
    columns = ["source", "tokens in", "over the caps", "dropped", "cut off", "packed", "never used"]
    columns += ["trained on", "share", "rows used", "most often"]
    total = sum(line.trained for line in lines)
    rows: list[list[str]] = []
    for line in lines:
        came = (line.tokens_in, line.capped, line.dropped, line.truncated, line.packed, line.unused)
        counts = [f"{value:,}" for value in (*came, line.trained)]
        share, used = f"{line.trained / total:.2%}", f"{line.rows_used:,} of {line.rows:,}"
        rows.append([line.name, *counts, share, used, f"{line.most} times"])
    return {"title": "Token ledger", "columns": columns, "rows": rows}
