"""Questions about rows: four tasks, one shape, kept as JSON lines with the answer where it is known.

The tasks are those of system S71 (arXiv:2308.16361). Error detection asks whether a cell is wrong, and
imputation what an empty one should hold; both are about one row and one of its columns. Schema matching
asks whether two attributes mean the same, entity matching whether two rows are the same thing; both
are about two rows, an attribute being written as a row of what is known of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from puna.core.errors import PunaError
from puna.core.files import write_text
from puna.data.tables.rows import Row

Task = Literal["error_detection", "imputation", "schema_matching", "entity_matching"]
Role = Literal["example", "asked"]
YES, NO = "Yes", "No"
PAIRS = ("schema_matching", "entity_matching")
_FIELDS = ("task", "records", "column", "choices", "answer", "reason", "role")


@dataclass(frozen=True)
class Question:
    """One question. ``choices`` are the answers it admits, or none where any value is one.

    ``answer`` is None where nobody knows it. ``reason`` says why, for an example that is shown to the
    model. ``role`` keeps the two apart: no question that is asked is shown as an example.
    """

    task: Task
    records: tuple[Row, ...]
    column: str | None = None
    choices: tuple[str, ...] = (YES, NO)
    answer: str | None = None
    reason: str | None = None
    role: Role = "asked"

    def __post_init__(self) -> None:
        wanted = 2 if self.task in PAIRS else 1
        if len(self.records) != wanted:
            raise PunaError(f"a question of {self.task} is about {wanted} rows", found=len(self.records))
        if self.task not in PAIRS and self.column not in self.records[0]:
            raise PunaError(
                f"a question of {self.task} names a column of its row",
                found=self.column,
                expected=f"one of {', '.join(self.records[0])}",
            )
        if self.choices and self.answer is not None and self.answer not in self.choices:
            raise PunaError(
                "the answer is none of the choices", found=self.answer, expected=" or ".join(self.choices)
            )

    def only(self, columns: Sequence[str]) -> Question:
        """The question with these columns of its rows alone, besides the one that it asks about."""
        kept = {*columns, self.column}
        rows = tuple({name: row[name] for name in row if name in kept} for row in self.records)
        return replace(self, records=rows)

    def emptied(self) -> Question:
        """The question about nothing: every cell null. What a model says of it is what it says anyway."""
        rows = tuple(dict.fromkeys(row) for row in self.records)
        return replace(self, records=rows, answer=None, reason=None)


def columns_of(questions: Iterable[Question]) -> list[str]:
    """Every column of the questions' rows, in the order in which they come."""
    return list(dict.fromkeys(name for question in questions for row in question.records for name in row))


def write(questions: Iterable[Question], path: Path) -> None:
    """Write questions as JSON lines."""
    write_text(path, "".join(json.dumps(asdict(q), ensure_ascii=False) + "\n" for q in questions))


def read(path: Path | str) -> list[Question]:
    """Questions out of JSON lines; a line that is none is an error that names it."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # not at other line ends: texts hold them
    except (OSError, UnicodeDecodeError) as error:
        raise PunaError("the questions cannot be read", where=path, found=error) from None
    found = [_question(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line]
    if not found:
        raise PunaError("the file holds no question", where=path)
    if len({question.task for question in found}) > 1:
        raise PunaError(
            "the questions of a file are of one task",
            where=path,
            found=", ".join(sorted({question.task for question in found})),
            fix="write a file for each task",
        )
    return found


def _question(line: str, where: str) -> Question:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise PunaError("not a line of JSON", where=where, found=error) from None
    if not isinstance(values, dict) or not {"task", "records"} <= set(values) <= set(_FIELDS):
        keys = sorted(values) if isinstance(values, dict) else type(values).__name__
        raise PunaError("not a question", where=where, found=keys, expected=", ".join(_FIELDS))
    problem = _wrong(values)
    if problem:
        raise PunaError("not a question", where=where, **problem)
    values["records"] = tuple(values["records"])
    values["choices"] = tuple(values.get("choices", (YES, NO)))
    try:
        return Question(**values)
    except PunaError as error:
        raise PunaError(error.message, where=where, found=error.found, expected=error.expected) from None


def _wrong(values: dict[str, Any]) -> dict[str, Any] | None:
    """What is wrong with the types of a question's values, if anything."""
    if values["task"] not in get_args(Task):
        return {"found": f"task {values['task']!r}", "expected": ", ".join(get_args(Task))}
    if values.get("role", "asked") not in get_args(Role):
        return {"found": f"role {values['role']!r}", "expected": ", ".join(get_args(Role))}
    records = values["records"]
    rows = isinstance(records, list) and all(isinstance(row, dict) for row in records)
    if not rows or any(not isinstance(cell, str | None) for row in records for cell in row.values()):
        return {"found": f"records {records!r}"[:200], "expected": "a list of rows of texts and nulls"}
    choices = values.get("choices", [])
    if not isinstance(choices, list) or any(not isinstance(choice, str) for choice in choices):
        return {"found": f"choices {choices!r}"[:200], "expected": "a list of texts"}
    for name in ("column", "answer", "reason"):
        if not isinstance(values.get(name), str | None):
            return {"found": f"{name} {values[name]!r}"[:200], "expected": "a text or null"}
    return None
