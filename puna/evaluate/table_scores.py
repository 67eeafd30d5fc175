"""Scores of answers about tables, beside what answers that look at nothing would get.

F1 of "Yes" for detection and matching, accuracy for imputation (system S71, arXiv:2308.16361). A question
that was not answered counts as answered wrongly. Where few answers are "Yes", accuracy says little, and
where many are, so does F1: hence three baselines, the commonest answer of the examples, a random
one, and for F1 the answer "Yes" throughout.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from puna.core.seeds import numpy_generator
from puna.data.tables.questions import NO, YES, Question

_DRAWS = 500
Answers = Sequence["str | None"]


def is_yes_no(questions: Sequence[Question]) -> bool:
    """Whether the questions admit "Yes" and "No" alone, so that F1 is their score."""
    return all(set(question.choices) == {YES, NO} for question in questions)


def accuracy(answers: Answers, truths: Answers) -> float:
    """Share of right answers."""
    return sum(answer == truth for answer, truth in zip(answers, truths, strict=True)) / len(truths)


def f1(answers: Answers, truths: Answers) -> float:
    """F1 of "Yes"; what was not answered is wrong. 0 where nothing right was said to be so."""
    counts: Counter[tuple[bool, bool]] = Counter()
    for answer, truth in zip(answers, truths, strict=True):
        said = truth != YES if answer is None else answer == YES
        counts[said, truth == YES] += 1
    right, wrong = counts[True, True], counts[True, False] + counts[False, True]
    return 2 * right / (2 * right + wrong) if right else 0.0


def ranking(scores: Sequence[float], truths: Answers) -> float:
    """Probability that a "Yes" question scores above a "No" question (AUC; ties count half).

    0.5 is chance; nan if all truths are one. Says how much of F1 a better threshold could gain.
    """
    positive = [score for score, truth in zip(scores, truths, strict=True) if truth == YES]
    negative = [score for score, truth in zip(scores, truths, strict=True) if truth != YES]
    if not positive or not negative:
        return float("nan")
    above = sum((one > other) + 0.5 * (one == other) for one in positive for other in negative)
    return above / (len(positive) * len(negative))


def scores(answers: Answers, questions: Sequence[Question]) -> dict[str, float]:
    """``accuracy``, and ``f1`` of yes-or-no questions."""
    truths = [question.answer for question in questions]
    found = {"accuracy": accuracy(answers, truths)}
    if is_yes_no(questions):
        found["f1"] = f1(answers, truths)
    return found


def baselines(
    questions: Sequence[Question], examples: Sequence[Question], seed: int
) -> dict[str, dict[str, float]]:
    """Scores of ``majority``, ``random`` (the mean of many draws) and, for F1, ``always_yes``.

    The majority is that of the examples, or without any that of the questions themselves.
    """
    known = [question.answer for question in (examples or questions)]
    common = Counter(known).most_common(1)[0][0]
    found = {"majority": scores([common] * len(questions), questions)}
    generator = numpy_generator(seed, "random answers")
    pool = sorted({str(answer) for answer in known})
    drawn: Counter[str] = Counter()
    for _ in range(_DRAWS):
        answers = []
        for question in questions:
            among = question.choices or pool
            answers.append(among[int(generator.integers(len(among)))])
        drawn.update(scores(answers, questions))
    found["random"] = {name: total / _DRAWS for name, total in drawn.items()}
    if is_yes_no(questions):
        found["always_yes"] = scores([YES] * len(questions), questions)
    return found


def agreement(first: Answers, second: Answers) -> float:
    """Share of questions answered alike; one that either did not answer is not."""
    pairs = zip(first, second, strict=True)
    return sum(one is not None and one == other for one, other in pairs) / len(first)
