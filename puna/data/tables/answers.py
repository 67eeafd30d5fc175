"""Strict parsing of a model's answers: each is aligned with its question, or it is none.

A small model often fails the format (system S71, arXiv:2308.16361, says so of Vicuna). Guessing what it
meant would hide that, and would read a "yes" out of a reason. So an answer counts if it stands alone
in its line, behind its own number where there are several, and is one of the choices; white space,
letter case and a full stop at its end do not matter. What does not count is asked again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from puna.data.tables.prompts import one_line
from puna.data.tables.questions import Question

_NUMBERED = re.compile(r"(\d+)\.(?: (.*))?")


@dataclass(frozen=True)
class Parsed:
    """The answer to a question, or the ``problem`` with what was said."""

    answer: str | None
    problem: str | None = None


def parse_answers(
    text: str, questions: Sequence[Question], *, reasons: bool = False, numbered: bool | None = None
) -> list[Parsed]:
    """For each question its answer in ``text``, in their order."""
    many = len(questions) > 1 if numbered is None else numbered
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    if not many:
        return [_block(lines, questions[0], reasons)]
    blocks, problem = _blocks(lines, len(questions))
    if problem is not None:
        return [Parsed(None, problem)] * len(questions)
    return [
        _block(blocks[number], question, reasons)
        if number in blocks
        else Parsed(None, f"there is no answer with number {number}")
        for number, question in enumerate(questions, 1)
    ]


def _blocks(lines: Sequence[str], count: int) -> tuple[dict[int, list[str]], str | None]:
    """The lines from each number on, and what makes all of them doubtful."""
    blocks: dict[int, list[str]] = {}
    last = 0
    for line in lines:
        found = _NUMBERED.fullmatch(line)
        if found is None:
            if not last:
                return {}, "the first line has no number"
            blocks[last].append(line)
            continue
        number = int(found[1])
        # A number out of order may belong to a reason or to another question: nothing behind it is sure.
        if not last < number <= count:
            return {}, f"number {number} comes after number {last} of {count}"
        blocks[number] = [found[2] or ""]
        last = number
    return blocks, None


def _block(lines: Sequence[str], question: Question, reasons: bool) -> Parsed:
    wanted = 2 if reasons else 1
    if len(lines) != wanted:
        return Parsed(None, f"{len(lines)} lines instead of {wanted}")
    said = one_line(lines[-1])
    if not question.choices:
        value = said[1:-1] if len(said) > 1 and said[0] == said[-1] == '"' else said
        return Parsed(value) if value else Parsed(None, "the answer is empty")
    for choice in question.choices:
        if said.removesuffix(".").casefold() == one_line(choice).removesuffix(".").casefold():
            return Parsed(choice)
    return Parsed(None, f"{said[:40]!r} is none of {', '.join(question.choices)}")
