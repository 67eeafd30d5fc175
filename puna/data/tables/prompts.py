"""The prompt compiler: questions about rows become the messages that a chat model is asked with.

As in system S71 (arXiv:2308.16361): a role, what the task is, a rule for the answer's format, some
examples as turns with or without reasons, then the data. With reasons the model answers in two lines,
the reason first and the bare answer below it. Several questions of one prompt are numbered, and each
answer repeats its number, so that a skipped one is noticed. The wordings are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from puna.core.errors import PunaError
from puna.data.tables.questions import NO, YES, Question, Task
from puna.data.tables.rows import cell, render

ROLE = "You are a database engineer."
_TASKS: dict[Task, str] = {
    "error_detection": "Decide whether the value of one attribute of a record is wrong, such as misspelt.",
    "imputation": "Say what the missing value of one attribute of a record should be.",
    "schema_matching": "Decide whether two attributes of different tables mean the same.",
    "entity_matching": "Decide whether two records are of the same thing, even if written differently.",
}
# What the model is told to write, where it is asked for the data of an answer and not for the answer.
_WRITES: dict[tuple[Task, str], str] = {
    ("entity_matching", YES): "Write each record once more, as another table has it: the same thing.",
    ("entity_matching", NO): "Write beside each record one of another thing.",
    ("schema_matching", YES): "Write for each attribute one of another table that means the same.",
    ("schema_matching", NO): "Write for each attribute one of another table that means something else.",
    (
        "error_detection",
        YES,
    ): "Fill in one attribute of each record, but with a misspelling.",
    ("error_detection", NO): "Fill in one attribute of each record, correctly.",
}
_SIDES = ("A", "B")
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Wording:
    """How a prompt is put together. ``hint`` says of what kind a missing value is, such as "a country"."""

    reasons: bool = False
    role: str = ROLE
    hint: str | None = None


def compile_prompt(
    asked: Sequence[Question], examples: Sequence[Question], wording: Wording, *, numbered: bool | None = None
) -> Messages:
    """The messages that ask ``asked``, all of one task, behind ``examples`` with their answers.

    Several questions are ``numbered`` unless that says otherwise; the examples come as the questions do:
    each in a turn of its own, or all in one with numbers.
    """
    if not asked:
        raise PunaError("there is no question to ask")
    many = len(asked) > 1 if numbered is None else numbered
    messages = [{"role": "system", "content": _instructions(asked[0], wording, many)}]
    turns = [examples] if many and examples else [[example] for example in examples]
    for turn in turns:
        messages.append({"role": "user", "content": _data(turn, many)})
        messages.append({"role": "assistant", "content": _answers(turn, wording, many)})
    messages.append({"role": "user", "content": _data(asked, many)})
    return messages


def compile_writing(
    asked: Sequence[Question], examples: Sequence[Question], answer: str, wording: Wording, *, numbered: bool
) -> Messages:
    """The messages that ask for the data of ``asked`` as they would be if ``answer`` were the answer.

    Examples are those with that answer. What is to be written is :func:`written_data`: the second row of a
    pair, or the cell that is asked about.
    """
    task = asked[0].task
    if (task, answer) not in _WRITES:
        raise PunaError(
            "only questions of yes or no can be asked the other way round",
            found=f"{answer!r} to {task}",
            expected=", ".join(sorted({name for name, _ in _WRITES})),
        )
    shown = [example for example in examples if example.answer == answer]
    messages = [{"role": "system", "content": f"{wording.role} {_WRITES[task, answer]}"}]
    turns = [shown] if numbered and shown else [[example] for example in shown]
    for turn in turns:
        messages.append({"role": "user", "content": _given(turn, numbered)})
        lines = [
            written_lead(number, example, numbered) + written_data(example)
            for number, example in enumerate(turn, 1)
        ]
        messages.append({"role": "assistant", "content": "\n".join(lines)})
    messages.append({"role": "user", "content": _given(asked, numbered)})
    return messages


def written_lead(number: int, question: Question, many: bool) -> str:
    """What stands before the data that are written: where there are several, a number and what is given.

    Given data are said again there, since a small model does not find them by the number alone.
    """
    return f"{answer_lead(number, many)}{_given_row(question)} " if many else ""


def written_data(question: Question) -> str:
    """What of a question's data is written: the second row of a pair, or the cell that is asked about."""
    if len(question.records) > 1:
        return render(question.records[1])
    assert question.column is not None
    return cell(question.records[0][question.column])


def _given(questions: Sequence[Question], many: bool) -> str:
    """The data of questions without what is to be written."""
    return "\n".join(
        answer_lead(number, many) + _given_row(question) for number, question in enumerate(questions, 1)
    )


def _given_row(question: Question) -> str:
    if len(question.records) > 1:
        return render(question.records[0])
    row = {name: value for name, value in question.records[0].items() if name != question.column}
    return f"{render(row)} {question.column}:"


def answer_lead(number: int, many: bool) -> str:
    """What stands before an answer, or before its reason: its number, where there are several."""
    return f"{number}. " if many else ""


def reminder(problem: str, question: Question, wording: Wording) -> str:
    """What is said to a model that did not keep to the format."""
    return f"That is not an answer in the format asked for: {problem}. {_rule(question, wording, False)}"


def _instructions(question: Question, wording: Wording, many: bool) -> str:
    task = _TASKS[question.task]
    if question.task == "imputation" and wording.hint:
        task += f" It is {wording.hint}."
    return f"{wording.role} {task} {_rule(question, wording, many)}"


def _rule(question: Question, wording: Wording, many: bool) -> str:
    said = " or ".join(question.choices) if question.choices else "the value alone"
    if many and wording.reasons:
        return (
            "You get several numbered questions. Answer each in two lines: the first holds its number and "
            f"the reason, the second only {said}."
        )
    if many:
        return (
            "You get several numbered questions. Answer each in a line of its own: its number, then only "
            f"{said}."
        )
    if wording.reasons:
        return f"Answer in two lines: the first holds the reason, the second only {said}."
    return f"Answer only {said}."


def _data(questions: Sequence[Question], many: bool) -> str:
    return "\n".join(
        answer_lead(number, many) + _question(question) for number, question in enumerate(questions, 1)
    )


def _question(question: Question) -> str:
    if question.task == "entity_matching":
        return f"{_sides('Record', question)}\nAre record A and record B the same?"
    if question.task == "schema_matching":
        return f"{_sides('Attribute', question)}\nDo attribute A and attribute B mean the same?"
    row = question.records[0]
    assert question.column is not None  # checked where a question is made
    if question.task == "error_detection":
        value = f"{question.column}: {cell(row[question.column])}"
        return f"Record: {render(row)}\nIs there an error in {value}?"
    known = {name: value for name, value in row.items() if name != question.column}
    return f"Record: {render(known)}\nWhat is {question.column}?"


def _sides(what: str, question: Question) -> str:
    pairs = zip(_SIDES, question.records, strict=True)
    return "\n".join(f"{what} {side}: {render(row)}" for side, row in pairs)


def _answers(questions: Sequence[Question], wording: Wording, many: bool) -> str:
    lines = []
    for number, question in enumerate(questions, 1):
        if question.answer is None or (wording.reasons and not question.reason):
            lacking = "answer" if question.answer is None else "reason"
            raise PunaError(f"an example has no {lacking}", found=_question(question)[:200])
        lead = answer_lead(number, many)
        if wording.reasons:
            lines.append(f"{lead}{one_line(str(question.reason))}\n{one_line(question.answer)}")
        else:
            lines.append(lead + one_line(question.answer))
    return "\n".join(lines)


def one_line(text: str) -> str:
    """The text with white space of any length as one space: answers are told apart by lines."""
    return " ".join(text.split())
