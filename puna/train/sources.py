"""The sources of a mixture: documents under names, capped, sorted, and packed source by source.

A packed row belongs to one source, so that its tokens can be counted; what became of every document
is in the source's :class:`Entry`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy

from puna.core.errors import PunaError
from puna.text.encode import Encoded
from puna.text.packing import Mode, Packed, PackReport, Row, pack

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Document:
    """An encoded row of a corpus, and what the row's own column ``source`` says."""

    encoded: Encoded
    task: str

    def __len__(self) -> int:
        return len(self.encoded)


@dataclass(frozen=True)
class Entry:
    """What one source brings: what came in, what its caps left out, and how the rest was packed.

    ``tokens_in == capped_tokens + report.tokens_in``, and the report balances in itself.
    """

    name: str
    documents_in: int
    tokens_in: int
    capped_documents: int
    capped_tokens: int
    report: PackReport


@dataclass(frozen=True)
class Sources:
    """All packed rows, source by source; ``of[row]`` is the place of the row's source in ``entries``.

    ``keys`` [rows, 2]: of rows in an order, what the first and the last document in each were sorted by.
    """

    rows: Packed
    of: NDArray[numpy.int64]
    entries: tuple[Entry, ...]
    keys: NDArray[numpy.float64] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sources."""
        return tuple(entry.name for entry in self.entries)


def pack_sources(
    brought: Mapping[str, Sequence[Document]],
    kept: Mapping[str, Sequence[Document]],
    length: int,
    *,
    mode: Mode,
    group: int = 1,
) -> Sources:
    """Pack the ``kept`` documents of each source by itself; ``brought`` are those before any cap.

    So many documents as ``group`` says belong together (see :func:`puna.text.packing.pack`).
    """
    entries: list[Entry] = []
    rows: list[Row] = []
    counts: list[int] = []
    for name, documents in kept.items():
        try:
            packed = pack([document.encoded for document in documents], length, mode=mode, group=group)
        except PunaError as error:
            where = f"source {name!r}" if len(kept) > 1 else error.where
            raise PunaError(
                error.message, where=where, found=error.found, expected=error.expected, fix=error.fix
            ) from None
        before = sum(len(document.encoded) for document in brought[name])
        left = packed.report
        out = (len(brought[name]) - left.rows_in, before - left.tokens_in)
        entries.append(Entry(name, len(brought[name]), before, *out, left))
        rows += packed
        counts.append(len(packed))
    report = combined([entry.report for entry in entries])
    return Sources(Packed(rows, report), numpy.repeat(numpy.arange(len(counts)), counts), tuple(entries))


def combined(reports: Sequence[PackReport]) -> PackReport:
    """One report of several packings with the same length and mode."""
    first = reports[0]
    sums = {
        name: sum(getattr(report, name) for report in reports)
        for name in ("rows_in", "tokens_in", "rows", "used", "tokens", "targets", "cuts", "truncated")
    }
    dropped: Counter[str] = Counter()
    dropped_tokens: Counter[str] = Counter()
    for report in reports:
        dropped.update(report.dropped)
        dropped_tokens.update(report.dropped_tokens)
    return PackReport(
        length=first.length,
        mode=first.mode,
        truncated_rows=sum(report.truncated_rows for report in reports),
        dropped=dict(dropped),
        dropped_tokens=dict(dropped_tokens),
        **sums,
    )
