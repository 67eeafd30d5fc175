"""Parameters of the stage ``table_questions``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import pydantic

from puna.core import assets
from puna.core.stage import Parameters
from puna.data.tables.questions import Task


class TableQuestions(Parameters):
    """Which table is asked about, and what is planted in it."""

    task: Task
    """What is asked: error_detection, imputation, schema_matching or entity_matching."""
    source: Literal["file", "r", "febrl"] = "file"
    """Where the table comes from: a CSV file, a table of R by package and name (ggplot2/msleep), or a file
    of FEBRL's invented persons (dataset1 to dataset4b)."""
    table: str
    """The file, or the table's name."""
    other: str | None = None
    """For schema_matching without planting: the second CSV file, whose attributes are compared."""
    columns: tuple[str, ...] = ()
    """Columns that are kept, in this order; none keeps all."""
    about: tuple[str, ...] = ()
    """Columns that are asked about (error_detection; imputation: one), misspelt (entity_matching of any
    table but FEBRL's), or that two rows must share to be compared (entity_matching without planting); none
    means all."""
    planted: bool = True
    """Plant errors, gaps and duplicates, so that every answer is known. Otherwise the table is asked about as
    it is: each cell, each gap, each pair of rows or of attributes."""
    questions: pydantic.PositiveInt = 100
    """Questions that are asked; without planting at most."""
    examples: pydantic.NonNegativeInt = 0
    """Further questions with known answers, to be shown and to choose columns by. Without planting only
    imputation has any: rows whose cell is filled."""
    share: float = pydantic.Field(0.5, gt=0, lt=1)
    """Share of planted questions whose answer is Yes."""
    edits: pydantic.NonNegativeInt = 2
    """Cells of a planted duplicate that are misspelt or emptied."""
    choices: pydantic.PositiveInt | None = 8
    """Imputation: the so many commonest values are offered, rows with others left out; null offers none."""
    values: pydantic.PositiveInt = 3
    """Schema matching: values that are shown of an attribute."""
    noise_columns: pydantic.NonNegativeInt = 0
    """Columns of random codes that are put between the others."""

    @pydantic.model_validator(mode="after")
    def _fitting(self) -> TableQuestions:
        if self.task == "imputation" and len(self.about) != 1:
            raise ValueError("imputation is about one column: name it in about")
        if self.source == "febrl" and self.task == "entity_matching" and self.about and self.planted:
            raise ValueError("FEBRL's duplicates are as they are: about means nothing there")
        if self.other is not None and (self.planted or self.task != "schema_matching"):
            raise ValueError("other is for schema_matching with planted: false")
        if self.task == "schema_matching" and not self.planted and self.other is None:
            raise ValueError("schema_matching without planting compares two tables: name the second in other")
        if not self.planted and self.examples and self.task != "imputation":
            raise ValueError("without planting only imputation has examples")
        if not self.planted and self.noise_columns:
            raise ValueError("noise columns are planted")
        return self

    def files(self) -> Iterable[Path]:
        """Files that decide what the questions are."""
        if self.source != "file":
            return [assets.CATALOGUE]
        return [Path(name) for name in (self.table, self.other) if name is not None]
