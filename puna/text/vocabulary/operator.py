"""The operator T (new vocabulary x old vocabulary) that says what each new row is made of.

Row i of a new embedding or head is the sum of old rows weighted by row i of T, and every row of T
sums to 1. T is kept in compressed rows. Two kinds of rows have no entries: ``mean`` rows are the mean
of all old rows (T's row is uniform), and ``random`` rows, a baseline, are drawn and are no row of T.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy
import numpy.typing

from puna.core.errors import PunaError
from puna.core.files import read_json, write_aside, write_json

Origin = Literal["copied", "pieces", "aligned", "unknown", "mean", "random"]
ORIGINS: tuple[Origin, ...] = get_args(Origin)
"""Where a row comes from: an old row as it is; old tokens that spell the new one; old tokens aligned
with it in sentence pairs; the old unknown token; the mean of all old rows; a draw."""
_EMPTY_ORIGINS: tuple[Origin, ...] = ("mean", "random")

Distribution = Literal["matched", "fixed"]
TOLERANCE = 1e-6

Ints = numpy.typing.NDArray[numpy.int64]
Bytes = numpy.typing.NDArray[numpy.uint8]
Floats = numpy.typing.NDArray[numpy.float64]

_TENSORS = "mapping.safetensors"
_META = "mapping.json"


@dataclass(frozen=True)
class Draw:
    """How random rows are drawn: N(mean, variance of each column of the old matrix), or N(0, 0.02)."""

    distribution: Distribution
    seed: int


@dataclass(frozen=True, eq=False)
class VocabularyMap:
    """A sparse T [new, old] in compressed rows, validated when it is made.

    The entries of row i are ``columns[starts[i]:starts[i + 1]]`` (old ids, ascending) and the
    ``weights`` at the same places. ``origins[i]`` indexes :data:`ORIGINS`. ``about`` says how the
    map was made (builder and its settings), for people and provenance.
    """

    old_size: int
    starts: Ints  # [new + 1]
    columns: Ints  # [entries]
    weights: Floats  # [entries]
    origins: Bytes  # [new]
    draw: Draw | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_layout()
        if len(self.columns) and (self.columns.min() < 0 or self.columns.max() >= self.old_size):
            raise PunaError(
                "a map points at tokens that the old vocabulary does not have",
                found=f"ids {self.columns.min()} to {self.columns.max()}",
                expected=f"0 to {self.old_size - 1}",
            )
        empty = numpy.isin(self.origins, [ORIGINS.index(name) for name in _EMPTY_ORIGINS])
        if (empty != (numpy.diff(self.starts) == 0)).any():
            raise PunaError("rows without entries must be mean or random rows, and only they", where="map")
        if self.count("random") and self.draw is None:
            raise PunaError("a map with random rows must say how they are drawn", where="map")
        sums = self.row_sums()
        wrong = numpy.flatnonzero(~(numpy.abs(sums - 1) <= TOLERANCE))  # catches NaN too
        if len(wrong):
            raise PunaError(
                "the weights of a row of the map do not sum to 1",
                where=f"row {wrong[0]}",
                found=f"{sums[wrong[0]]:.9g} ({len(wrong):,} such rows)",
                expected=f"1 within {TOLERANCE:g}",
            )

    def _check_layout(self) -> None:
        good = (
            len(self.starts) == len(self.origins) + 1
            and self.starts[0] == 0
            and self.starts[-1] == len(self.columns) == len(self.weights)
            and (numpy.diff(self.starts) >= 0).all()
            and (self.origins < len(ORIGINS)).all()
        )
        if not good:
            raise PunaError("the arrays of a vocabulary map do not fit together", where="map")

    @classmethod
    def from_rows(
        cls,
        rows: Iterable[tuple[Origin, Mapping[int, float]]],
        *,
        old_size: int,
        draw: Draw | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> VocabularyMap:
        """Build a map from (origin, {old id: weight}) for each new id in order."""
        starts, columns, weights, origins = [0], [], [], []
        for origin, entries in rows:
            for column in sorted(entries):
                columns.append(column)
                weights.append(entries[column])
            starts.append(len(columns))
            origins.append(ORIGINS.index(origin))
        return cls(
            old_size,
            numpy.array(starts, dtype=numpy.int64),
            numpy.array(columns, dtype=numpy.int64),
            numpy.array(weights, dtype=numpy.float64),
            numpy.array(origins, dtype=numpy.uint8),
            draw,
            about or {},
        )

    @property
    def new_size(self) -> int:
        """Number of rows."""
        return len(self.origins)

    def row(self, index: int) -> dict[int, float]:
        """The entries of one row as {old id: weight}; none for mean and random rows."""
        place = slice(self.starts[index], self.starts[index + 1])
        return dict(zip(self.columns[place].tolist(), self.weights[place].tolist(), strict=True))

    def origin(self, index: int) -> Origin:
        """Where row ``index`` comes from."""
        return ORIGINS[int(self.origins[index])]

    def count(self, origin: Origin) -> int:
        """Number of rows of that origin."""
        return int((self.origins == ORIGINS.index(origin)).sum())

    def row_sums(self) -> Floats:
        """Sum of each row [new]; mean and random rows count as 1."""
        sums = numpy.ones(self.new_size)
        filled = numpy.flatnonzero(numpy.diff(self.starts))
        if len(filled):
            sums[filled] = numpy.add.reduceat(self.weights, self.starts[filled])
        return sums

    def metrics(self) -> dict[str, float]:
        """Rows of each origin, entries of a row on average, largest distance of a row sum from 1."""
        counted = {f"rows.{name}": float(self.count(name)) for name in ORIGINS}
        return {
            **counted,
            "entries_per_row": len(self.columns) / self.new_size,
            "row_sum_error": float(numpy.abs(self.row_sums() - 1).max()),
        }

    def save(self, folder: Path | str) -> None:
        """Write ``mapping.safetensors`` and ``mapping.json`` into ``folder``."""
        from safetensors.numpy import save_file

        arrays = {name: getattr(self, name) for name in ("starts", "columns", "weights", "origins")}
        with write_aside(Path(folder) / _TENSORS) as aside:
            save_file(arrays, aside)
        draw = None if self.draw is None else vars(self.draw)
        meta = {"old_size": self.old_size, "new_size": self.new_size, "origins": list(ORIGINS), "draw": draw}
        write_json(Path(folder) / _META, {**meta, "about": dict(self.about)})

    @classmethod
    def load(cls, folder: Path | str) -> VocabularyMap:
        """Read a map that :meth:`save` wrote; it is validated again."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        meta = read_json(Path(folder) / _META)
        file = Path(folder) / _TENSORS
        try:
            arrays = load_file(file)
            draw = None if meta["draw"] is None else Draw(**meta["draw"])
            if tuple(meta["origins"]) != ORIGINS:
                raise ValueError(f"row origins {meta['origins']}")
            return cls(meta["old_size"], **arrays, draw=draw, about=meta["about"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise PunaError(
                "not a readable vocabulary map", where=file, found=error, fix="make the map again"
            ) from None
