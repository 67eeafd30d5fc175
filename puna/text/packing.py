"""Rows of a fixed length out of encoded documents, with document ids and restarting positions.

A row is a list of slices of documents; every slice is a segment of its own, sees nothing of its
neighbours and counts its positions from 0. Nothing is lost silently: a :class:`PackReport` says how
many rows and tokens came in, were packed, truncated and dropped, and why.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, overload

import numpy
import torch

from puna.core.errors import PunaError, unknown_name
from puna.text.encode import IGNORED as IGNORED
from puna.text.encode import Encoded

Mode = Literal["wrap", "fit", "off"]
MODES = ("wrap", "fit", "off")
NO_TARGET = "nothing to learn in it"
TARGETS_CUT = "what is to be learnt lies beyond the length"
WITHOUT_THE_OTHER = "the other of its group was dropped"
ALIKE = "the documents of its group do not differ within the length"


@dataclass(frozen=True, slots=True)
class Slice:
    """Tokens ``start`` to ``stop`` of one document."""

    document: Encoded
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def targets(self) -> int:
        """Targets inside. The first token of a slice has nothing to be predicted from; it may be labelled."""
        if self.document.labels is not None:
            return sum(self.document.trained[self.start : self.stop])
        return sum(self.document.trained[self.start + 1 : self.stop])


@dataclass(frozen=True, slots=True)
class Row:
    """Slices that share one row of a batch."""

    slices: tuple[Slice, ...]

    @property
    def tokens(self) -> int:
        """Number of tokens in this row."""
        return sum(map(len, self.slices))

    @property
    def targets(self) -> int:
        """Number of tokens learnt in this row."""
        return sum(piece.targets for piece in self.slices)

    @property
    def source(self) -> str:
        """Ids of the first and the last document in this row, to find it again."""
        first, last = self.slices[0].document.source, self.slices[-1].document.source
        return first if first == last else f"{first} to {last}"


@dataclass(frozen=True)
class PackReport:
    """What became of the documents. ``rows_in == used + sum(dropped.values())`` and
    ``tokens_in == tokens + truncated + sum(dropped_tokens.values())``.

    ``rows`` are packed rows of at most ``length`` tokens, ``tokens`` the tokens in them and
    ``targets`` those that are learnt; ``truncated`` tokens were cut off the ends of
    ``truncated_rows`` documents; ``cuts`` counts how often a document was continued in the next
    row, which costs one target where a learnt token begins a row. Rows are documents here, also
    where ``group`` of them stay together: both of a pair are counted.
    """

    length: int
    mode: str
    rows_in: int
    tokens_in: int
    rows: int = 0
    used: int = 0
    tokens: int = 0
    targets: int = 0
    cuts: int = 0
    truncated: int = 0
    truncated_rows: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    dropped_tokens: Mapping[str, int] = field(default_factory=dict)

    @property
    def filled(self) -> float:
        """Share of the places in the packed rows that hold a token."""
        return self.tokens / (self.rows * self.length) if self.rows else 0.0


class Packed(Sequence[Row]):
    """The packed rows, as a sequence, with the ``report`` of how they came about."""

    def __init__(self, rows: Sequence[Row], report: PackReport) -> None:
        self._rows = tuple(rows)
        self.report = report

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Row, ...]: ...
    def __getitem__(self, index: int | slice) -> Row | tuple[Row, ...]:
        return self._rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)


def usual_mode(kind: str) -> Mode:
    """How rows of a corpus of ``kind`` are packed unless somebody says otherwise.

    ``wrap`` for running text; ``fit`` for conversations, since the second part of a cut one would be
    learnt without its question, and for what is labelled.
    """
    return "wrap" if kind in ("documents", "sentence_pairs") else "fit"


def group_of(kind: str) -> int:
    """How many documents a row of a corpus of ``kind`` becomes that are compared with one another."""
    return 2 if kind == "preferences" else 1


def pack(encoded: Sequence[Encoded], length: int, *, mode: Mode, group: int = 1) -> Packed:
    """Distribute documents over rows of at most ``length`` tokens.

    ``wrap`` fills every row and continues a document in the next one as a segment of its own;
    ``fit`` keeps documents whole (best fit, longest first; rows are ordered by their earliest
    document); ``off`` gives each document a row. ``fit`` and ``off`` cut a longer document off at
    ``length``. Documents without a target are dropped; if none is left that is an error.

    With a ``group`` above 1, that many consecutive documents (chosen and rejected answer of a pair)
    stay together in one row, in order and next to one another; ``off`` gives each group a row. If
    they are too long together, those that are longer than a common limit are cut off at it, the
    highest one with which they fit: two long documents at half the row, and beside a short one
    a long document has the rest. A group is dropped whole if one of its documents would be, or if
    they are all alike once they are cut, so that there is nothing to choose.
    """
    if mode not in MODES:
        raise unknown_name("packing mode", mode, MODES)
    if length < 2 * group:
        raise PunaError("a row must have room for two tokens of each document", found=length)
    if group > 1 and (mode == "wrap" or len(encoded) % group):
        raise PunaError(
            f"documents that stay together come in groups of {group}, and are not wrapped",
            found=f"{len(encoded)} documents, mode {mode!r}",
            expected="'fit' or 'off'",
        )
    chosen = _Chosen()
    for first in range(0, len(encoded), group):
        together = encoded[first : first + group]
        most = max(map(len, together)) if mode == "wrap" else _common_limit(together, length)
        chosen.add(tuple(Slice(document, 0, min(len(document), most)) for document in together))
    if not chosen.whole:
        raise PunaError(
            "no row has anything to learn",
            found=", ".join(f"{count} rows: {reason}" for reason, count in chosen.dropped.items())
            or "no rows at all",
            expected="at least one row with a target",
            fix="look at the rows with `puna inspect`; raise the length, check the roles to train on",
        )
    packer = {"wrap": _wrap, "fit": _fit, "off": _one_each}[mode]
    rows = packer(chosen.whole, length)
    used = group * len(chosen.whole)
    report = PackReport(
        length=length,
        mode=mode,
        rows_in=len(encoded),
        tokens_in=sum(map(len, encoded)),
        rows=len(rows),
        used=used,
        tokens=sum(row.tokens for row in rows),
        targets=sum(row.targets for row in rows),
        cuts=sum(len(row.slices) for row in rows) - used,
        truncated=chosen.truncated,
        truncated_rows=chosen.truncated_rows,
        dropped=dict(chosen.dropped),
        dropped_tokens=dict(chosen.dropped_tokens),
    )
    return Packed(rows, report)


@dataclass
class _Chosen:
    """The groups that are packed, cut to their limits, and counts of what is left out of them."""

    whole: list[tuple[Slice, ...]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    dropped_tokens: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    truncated_rows: int = 0

    def add(self, pieces: tuple[Slice, ...]) -> None:
        """Keep a group, or count why it is dropped."""
        reasons = _reasons_to_drop(pieces)
        if not any(reasons):
            self.whole.append(pieces)
            self.truncated += sum(len(piece.document) - len(piece) for piece in pieces)
            self.truncated_rows += sum(len(piece) < len(piece.document) for piece in pieces)
            return
        for piece, reason in zip(pieces, reasons, strict=True):
            assert reason is not None, "all of a group are dropped, or none"
            self.dropped[reason] += 1
            self.dropped_tokens[reason] += len(piece.document)


def _common_limit(together: Sequence[Encoded], length: int) -> int:
    """The highest limit at which documents are cut so that together they fit into ``length``."""
    room, left = length, len(together)
    for size in sorted(map(len, together)):
        if size * left > room:
            return room // left
        room, left = room - size, left - 1
    return length


def _reasons_to_drop(pieces: tuple[Slice, ...]) -> list[str | None]:
    """For each document why it is dropped; all of a group or none."""
    reasons = [_reason_to_drop(piece.document, piece.stop) for piece in pieces]
    if any(reasons):
        return [reason or WITHOUT_THE_OTHER for reason in reasons]
    if len(pieces) > 1:
        texts = [piece.document.ids[: piece.stop] for piece in pieces]
        if all(text == texts[0] for text in texts[1:]):
            return [ALIKE] * len(pieces)
    return reasons


def _reason_to_drop(document: Encoded, stop: int) -> str | None:
    try:
        first = document.trained.index(True, 1 if document.labels is None else 0)
    except ValueError:
        return NO_TARGET
    return TARGETS_CUT if first >= stop else None


def _one_each(whole: Sequence[tuple[Slice, ...]], length: int) -> list[Row]:
    return [Row(pieces) for pieces in whole]


def _wrap(whole: Sequence[tuple[Slice, ...]], length: int) -> list[Row]:
    rows: list[Row] = []
    current: list[Slice] = []
    room = length
    for (piece,) in whole:
        start = piece.start
        while start < piece.stop:
            stop = min(piece.stop, start + room)
            current.append(Slice(piece.document, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                rows.append(Row(tuple(current)))
                current, room = [], length
    return [*rows, Row(tuple(current))] if current else rows


def _fit(whole: Sequence[tuple[Slice, ...]], length: int) -> list[Row]:
    """Best fit decreasing: each group goes into the fullest row that has room for it.

    ``open_rows[space]`` holds the rows with that much room left and bit ``space`` of ``spaces``
    tells whether there are any, so the best row is found by one shift: O(groups * length / 64).
    """
    sizes = [sum(map(len, pieces)) for pieces in whole]
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(length + 1)]
    spaces = 0
    for number in sorted(range(len(whole)), key=lambda index: -sizes[index]):
        size = sizes[number]
        fitting = spaces >> size
        if fitting:
            space = size + (fitting & -fitting).bit_length() - 1
            row = open_rows[space].pop()
            if not open_rows[space]:
                spaces &= ~(1 << space)
            rows[row].append(number)
        else:
            space, row = length, len(rows)
            rows.append([number])
        if space > size:
            open_rows[space - size].append(row)
            spaces |= 1 << (space - size)
    ordered = sorted(sorted(row) for row in rows)
    return [Row(tuple(piece for number in row for piece in whole[number])) for row in ordered]


@dataclass(frozen=True)
class Batch:
    """Rows as tensors, all int64 [rows, time].

    ``labels[b, t]`` is the id that place t has to predict (shifted inside its document already), or its
    own label where documents have labels,
    -100 where nothing is learnt. ``positions`` restart at 0 with each document; ``segments`` number
    the documents of a row from 0 and are -1 on padding.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor

    @functools.cached_property
    def targets(self) -> int:
        """Number of places where something is learnt: the divisor of a token mean."""
        return int((self.labels != IGNORED).sum())

    @functools.cached_property
    def tokens(self) -> int:
        """Number of places that hold a token (not padding)."""
        return int((self.segments >= 0).sum())

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(*(t.to(device) for t in (self.input_ids, self.labels, self.positions, self.segments)))


def collate(rows: Iterable[Row], *, pad_id: int = 0, length: int | None = None) -> Batch:
    """Tensors of some rows, padded on the right to ``length`` (without it: to the longest row).

    Padding is told by its segment, never by its id, so ``pad_id`` may be the EOS.
    """
    rows = list(rows)
    longest = max((row.tokens for row in rows), default=0)
    time = longest if length is None else length
    if not rows or longest > time:
        raise PunaError(
            "these rows do not fit", found=f"{len(rows)} rows of up to {longest} tokens", expected=time
        )
    shape = (len(rows), time)
    input_ids = numpy.full(shape, pad_id, dtype=numpy.int64)
    labels = numpy.full(shape, IGNORED, dtype=numpy.int64)
    positions = numpy.zeros(shape, dtype=numpy.int64)
    segments = numpy.full(shape, -1, dtype=numpy.int64)
    for number, row in enumerate(rows):
        start = 0
        for segment, piece in enumerate(row.slices):
            stop = start + len(piece)
            ids = numpy.array(piece.document.ids[piece.start : piece.stop], dtype=numpy.int64)
            trained = numpy.array(piece.document.trained[piece.start : piece.stop], dtype=bool)
            input_ids[number, start:stop] = ids
            if piece.document.labels is not None:
                labels[number, start:stop] = piece.document.labels[piece.start : piece.stop]
            else:
                labels[number, start : stop - 1] = numpy.where(trained[1:], ids[1:], IGNORED)
            positions[number, start:stop] = numpy.arange(len(piece))
            segments[number, start:stop] = segment
            start = stop
    return Batch(*map(torch.from_numpy, (input_ids, labels, positions, segments)))
