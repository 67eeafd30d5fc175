"""The stage ``table_questions``: a table becomes questions, with what is planted in it or as it is."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

from puna.core.errors import PunaError
from puna.core.stage import Context, Outcome
from puna.data.tables import planting
from puna.data.tables.questions import Question, write
from puna.data.tables.rows import broken, render
from puna.data.tables.settings import TableQuestions
from puna.data.tables.table import Table, febrl, r_table, read_file


def run(context: Context, parameters: TableQuestions) -> Outcome:
    """Write the questions and count them."""
    table = load(parameters)
    questions = make(parameters, context.seed, table)
    path = context.out / "questions.jsonl"
    write(questions, path)
    asked = [question for question in questions if question.role == "asked"]
    rows = [*table.rows, *(row for question in questions for row in question.records)]
    metrics = {"asked": float(len(asked)), "examples": float(len(questions) - len(asked))}
    metrics |= {"rows": float(len(rows)), "broken_rows": float(broken(rows))}
    known = [question for question in asked if question.answer is not None]
    if known:
        metrics["yes"] = sum(question.answer == "Yes" for question in known) / len(known)
    context.report.setdefault("samples", []).extend(
        {
            "prompt": "\n".join([question.task, *map(render, question.records)]),
            "outputs": {"known": str(question.answer), "reason": str(question.reason)},
        }
        for question in questions[:3]
    )
    return Outcome({"questions": path}, metrics)


def make(parameters: TableQuestions, seed: int, table: Table | None = None) -> list[Question]:
    """The questions, examples first; of ``table`` if it is loaded already."""
    table = load(parameters) if table is None else table
    return _planted(parameters, table, seed) if parameters.planted else _as_it_is(parameters, table, seed)


def load(parameters: TableQuestions) -> Table:
    """The table with the columns that are kept; FEBRL keeps the ids that tell its true links."""
    if parameters.source == "febrl":
        table = febrl(parameters.table)
        linked = parameters.task == "entity_matching" and parameters.planted
        table = table if linked else table.without(["rec_id"])
        kept = ("rec_id", *parameters.columns) if linked else parameters.columns
        return table.only(kept) if parameters.columns else table
    table = r_table(parameters.table) if parameters.source == "r" else read_file(parameters.table)
    return table.only(parameters.columns) if parameters.columns else table


def _planted(parameters: TableQuestions, table: Table, seed: int) -> list[Question]:
    count = parameters.questions + parameters.examples
    about = list(parameters.about) or [name for name in table.columns if name != "rec_id"]
    share = parameters.share
    if parameters.task == "error_detection":
        made = planting.error_questions(table, about, count, share=share, seed=seed)
    elif parameters.task == "imputation":
        made = planting.imputation_questions(table, about[0], count, choices=parameters.choices, seed=seed)
    elif parameters.task == "schema_matching":
        made = planting.schema_questions(table, count, share=share, values=parameters.values, seed=seed)
    elif parameters.source == "febrl":
        made = planting.febrl_questions(table, count, share=share, seed=seed)
    else:
        edits = parameters.edits
        made = planting.duplicate_questions(table, about, count, share=share, edits=edits, seed=seed)
    made = planting.as_examples(made, parameters.examples)
    return planting.with_noise(made, parameters.noise_columns, seed)


def _as_it_is(parameters: TableQuestions, table: Table, seed: int) -> list[Question]:
    for name in parameters.about:
        table.require(name)
    about = list(parameters.about) or list(table.columns)
    examples: list[Question] = []
    if parameters.task == "imputation" and parameters.examples:
        known = planting.imputation_questions(
            table, about[0], parameters.examples, choices=parameters.choices, seed=seed
        )
        examples = [replace(question, role="example") for question in known]
    asked = {
        "error_detection": lambda: _cells(table, about),
        "imputation": lambda: _gaps(table, about[0], parameters.choices),
        "entity_matching": lambda: _row_pairs(table, list(parameters.about)),
        "schema_matching": lambda: _attribute_pairs(
            table, read_file(str(parameters.other)), parameters.values
        ),
    }[parameters.task]()
    found = list(itertools.islice(asked, parameters.questions))
    if not found:
        raise PunaError("the table leaves nothing to ask", where=table.name, found=parameters.task)
    return [*examples, *found]


def _cells(table: Table, about: list[str]) -> Iterator[Question]:
    for row in table.rows:
        yield from (Question("error_detection", (row,), name) for name in about if row[name] is not None)


def _gaps(table: Table, column: str, choices: int | None) -> Iterator[Question]:
    offered = planting.commonest(table, column, choices) if choices is not None else ()
    for row in table.rows:
        if row[column] is None:
            yield Question("imputation", (row,), column, offered)


def _row_pairs(table: Table, shared: list[str]) -> Iterator[Question]:
    groups: dict[tuple[str | None, ...], list[int]] = {}
    for place, row in enumerate(table.rows):
        groups.setdefault(tuple(row[name] for name in shared), []).append(place)
    for places in groups.values():
        for one, other in itertools.combinations(places, 2):
            yield Question("entity_matching", (table.rows[one], table.rows[other]))


def _attribute_pairs(table: Table, other: Table, values: int) -> Iterator[Question]:
    for left, right in itertools.product(table.columns, other.columns):
        rows = (_attribute(table, left, values), _attribute(other, right, values))
        yield Question("schema_matching", rows)


def _attribute(table: Table, column: str, values: int) -> dict[str, str | None]:
    known = list(dict.fromkeys(str(value) for value in table.values(column) if value is not None))
    return {"name": column, "values": "; ".join(known[:values])}
