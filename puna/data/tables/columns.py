"""Feature selection: which columns tell anything about the answers of the examples.

System S71 (arXiv:2308.16361) keeps the informative columns of a table, chosen by hand. Here a column's
information is measured: the mutual information, in bits, between the answers of labelled questions
and what the column shows of them, which for two rows is how their cells compare (agree, alike, differ,
unknown), and for one row the cell itself. A column of many values fits any answers by chance; so it must
tell more than it does of every one of some random orders of the answers (a permutation test).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from puna.core.seeds import numpy_generator
from puna.data.tables.planting import agreement
from puna.data.tables.questions import PAIRS, Question, columns_of

_SHUFFLES = 50


def informative(questions: Sequence[Question], seed: int) -> list[str]:
    """The columns that tell more about the answers than by chance, the most telling first.

    Needs questions whose answers are known; with none, or where no column tells anything, all columns
    are kept: nothing is known against them.
    """
    known = [question for question in questions if question.answer is not None]
    columns = columns_of(questions)
    gains = {column: gain(known, column, seed) for column in columns} if known else {}
    telling = [column for column in columns if gains.get(column, 0.0) > 0]
    return sorted(telling, key=lambda column: -gains[column]) or columns


def gain(questions: Sequence[Question], column: str, seed: int) -> float:
    """Bits that the column tells of the answers, beyond the most that it tells of shuffled ones."""
    shown = [_shown(question, column) for question in questions]
    answers = [question.answer for question in questions]
    generator = numpy_generator(seed, "shuffled answers", column)
    chance = max(
        mutual_information(shown, [answers[int(place)] for place in generator.permutation(len(answers))])
        for _ in range(_SHUFFLES)
    )
    return mutual_information(shown, answers) - chance


def mutual_information(left: Sequence[object], right: Sequence[object]) -> float:
    """Mutual information of two equally long lists, in bits."""
    count = len(left)
    lefts, rights = Counter(left), Counter(right)
    return sum(
        both / count * math.log2(both * count / (lefts[one] * rights[other]))
        for (one, other), both in Counter(zip(left, right, strict=True)).items()
    )


def _shown(question: Question, column: str) -> str | None:
    cells = [row.get(column) for row in question.records]
    if question.task in PAIRS:
        return agreement(cells[0], cells[1])
    return cells[0]
