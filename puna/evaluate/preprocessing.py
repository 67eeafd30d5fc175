"""Asking a model about tables: prompts, batches, answers that are aligned, and asking again.

System S71, large language models as data preprocessors (Zhang and others 2023, arXiv:2308.16361). Every
question ends with an answer of its own or with none: what was said out of format is asked again, alone
and with a reminder, and after the last attempt it counts as failed. Nothing is guessed.

Beyond the paper: answers of small models are scored instead of read (``choices.py``); or the data are, by
Bayes' rule with equal priors: which answer makes the second row likelier to stand beside the first, behind
examples with that answer (the noisy channel, Min and others 2022, arXiv:2108.04106). Two calibrations take
off what a model says anyway: its scores of a question whose cells are all null (contextual
calibration, Zhao and others 2021, arXiv:2102.09690), or their mean over the questions asked (batch
calibration, Zhou and others 2023, arXiv:2309.17249).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from puna.core.errors import PunaError
from puna.data.tables.answers import parse_answers
from puna.data.tables.columns import informative
from puna.data.tables.grouping import group
from puna.data.tables.prompts import (
    Messages,
    Wording,
    answer_lead,
    compile_prompt,
    compile_writing,
    one_line,
    reminder,
    written_data,
    written_lead,
)
from puna.data.tables.questions import Question
from puna.evaluate.choices import Slot

if TYPE_CHECKING:
    from puna.evaluate.askers import Asker, Said
    from puna.evaluate.preprocessing_stage import Way

Offsets = tuple[float, ...]


@dataclass
class Answered:
    """What came of the questions, in their order.

    ``scores`` are those of the choices before calibration, where choices were scored. ``problems`` tell why
    a question has no answer. ``attempts`` counts how often each was asked.
    """

    answers: list[str | None]
    scores: list[tuple[float, ...] | None]
    attempts: list[int]
    problems: dict[int, str] = field(default_factory=dict)
    prompts: int = 0
    prompt_tokens: int = 0
    columns: list[str] = field(default_factory=list)

    @classmethod
    def nothing(cls, count: int) -> Answered:
        """No answer yet to so many questions."""
        return cls([None] * count, [None] * count, [0] * count)

    def note(self, said: Sequence[Said]) -> None:
        """Count what prompts cost."""
        self.prompts += len(said)
        self.prompt_tokens += sum(each.prompt_tokens for each in said)

    def counts(self) -> dict[str, float]:
        """Of the questions asked, how many were answered at first, when asked again, and never; tokens a row.

        The first three add up to the questions.
        """
        given = [answer is not None for answer in self.answers]
        again = sum(1 for place, attempts in enumerate(self.attempts) if given[place] and attempts > 1)
        return {
            "asked": float(len(given)),
            "answered": float(sum(given) - again),
            "answered_again": float(again),
            "failed": float(len(given) - sum(given)),
            "prompts": float(self.prompts),
            "tokens": self.prompt_tokens / len(given),
        }


def preprocess(
    asker: Asker, questions: Sequence[Question], labelled: Sequence[Question], way: Way, seed: int
) -> Answered:
    """Ask ``questions`` in a way; its examples are the first of ``labelled``, which also choose columns."""
    if len(labelled) < way.examples:
        raise PunaError(
            "there are fewer examples than are to be shown",
            found=len(labelled),
            expected=way.examples,
            fix="lower the way's examples, or give questions with the role example",
        )
    columns = _columns(questions, labelled, way, seed)
    asked = [question.only(columns) for question in questions]
    examples = [question.only(columns) for question in labelled[: way.examples]]
    asking = _Asking(asker, asked, examples, way)
    groups = group(asked, way.batch, way.grouping, seed)
    how = {"scored": asking.scored, "written": asking.written, "channel": asking.channel}
    found = how[way.answer](groups)
    found.columns = columns
    return found


def _columns(questions: Sequence[Question], labelled: Sequence[Question], way: Way, seed: int) -> list[str]:
    present = list(dict.fromkeys(name for question in questions for row in question.records for name in row))
    if way.columns == "all":
        return present
    if way.columns == "informative":
        return informative(labelled, seed) if labelled else present
    unknown = [name for name in way.columns if name not in present]
    if unknown:
        raise PunaError(
            f"the questions have no column {unknown[0]!r}", expected=f"one of {', '.join(present)}"
        )
    return list(way.columns)


@dataclass
class _Asking:
    asker: Asker
    questions: Sequence[Question]
    examples: Sequence[Question]
    way: Way

    @property
    def wording(self) -> Wording:
        return Wording(self.way.reasons, self.way.role, self.way.hint)

    @property
    def many(self) -> bool:
        """Whether questions are numbered: also in a last group of one, since the examples are."""
        return self.way.batch > 1

    def prompt(self, questions: Sequence[Question]) -> Messages:
        return compile_prompt(questions, self.examples, self.wording, numbered=self.many)

    # ---- scored ----------------------------------------------------------------------------------------

    def scored(self, groups: Sequence[Sequence[int]]) -> Answered:
        """Score the choices of every question and take the best after calibration."""
        if self.many and not self.asker.scores_batches:
            raise PunaError("a server scores one question at a time", fix="batch: 1, or answer: written")
        if any(not question.choices for question in self.questions):
            raise PunaError(
                "questions without choices cannot be scored", fix="answer: written, or give choices"
            )
        found = Answered.nothing(len(self.questions))
        batches = [[self.questions[place] for place in places] for places in groups]
        prompts = [self.prompt(batch) for batch in batches]
        leads = self._leads(prompts, batches, found)
        offsets: dict[int, list[Offsets]] = {}
        if self.way.calibration == "empty_row":
            offsets = {
                size: self._of_nothing(size, found) for size in sorted({len(batch) for batch in batches})
            }
        slots = [
            [
                Slot(lead, question.choices, offsets[len(batch)][place] if offsets else ())
                for place, (lead, question) in enumerate(zip(each, batch, strict=True))
            ]
            for each, batch in zip(leads, batches, strict=True)
        ]
        said = self.asker.score(prompts, slots)
        found.note(said)
        for places, each in zip(groups, said, strict=True):
            for place in places:
                found.attempts[place] = 1
                if not each.scores:
                    found.problems[place] = "no choice is among the likeliest tokens"
            for place, scores, taken in zip(places, each.scores, each.taken, strict=bool(each.scores)):
                found.scores[place] = scores
                found.answers[place] = self.questions[place].choices[taken]
        if self.way.calibration == "mean":
            self._over_the_mean(found)
        return found

    def _leads(
        self, prompts: Sequence[Messages], batches: Sequence[Sequence[Question]], found: Answered
    ) -> list[list[str]]:
        """What stands before each answer; with reasons that is one of the model's own."""
        if not self.way.reasons:
            return [[answer_lead(number, self.many) for number in range(1, len(b) + 1)] for b in batches]
        said = self.asker.write(prompts, [self.way.max_tokens] * len(prompts), ("\n",))
        found.note(said)
        return [[f"{one_line(each.text)}\n"] for each in said]

    def _of_nothing(self, size: int, found: Answered) -> list[Offsets]:
        """Scores of so many questions whose cells are all null, less their mean; by place in the prompt."""
        empty = [question.emptied() for question in self.questions[:1]] * size
        slots = [Slot(answer_lead(number, self.many), empty[0].choices) for number in range(1, size + 1)]
        (said,) = self.asker.score([self.prompt(empty)], [slots])
        found.note([said])
        return [tuple(score - sum(scores) / len(scores) for score in scores) for scores in said.scores]

    def _over_the_mean(self, found: Answered) -> None:
        """Take the choice that is furthest above its mean over all questions."""
        known = [scores for scores in found.scores if scores is not None]
        means = [sum(column) / len(known) for column in zip(*known, strict=True)]
        for place, scores in enumerate(found.scores):
            if scores is not None:
                best = max(range(len(scores)), key=lambda index: scores[index] - means[index])
                found.answers[place] = self.questions[place].choices[best]

    # ---- scored the other way round --------------------------------------------------------------------

    def channel(self, groups: Sequence[Sequence[int]]) -> Answered:
        """For each answer how likely the data are to be written; the answer that makes them likeliest."""
        if not self.asker.scores_batches:
            raise PunaError("a server does not score the data", fix="answer: scored, or answer: written")
        found = Answered.nothing(len(self.questions))
        batches = [[self.questions[place] for place in places] for places in groups]
        choices = self.questions[0].choices
        slots = [
            [
                # Alone: earlier data, which are as they are and not as the answer would have them, mislead.
                Slot(written_lead(number, question, self.many), (written_data(question),), alone=True)
                for number, question in enumerate(batch, 1)
            ]
            for batch in batches
        ]
        by_choice: list[dict[int, float]] = []
        for choice in choices:
            prompts = [
                compile_writing(batch, self.examples, choice, self.wording, numbered=self.many)
                for batch in batches
            ]
            said = self.asker.score(prompts, slots)
            found.note(said)
            found.prompt_tokens += sum(each.choice_tokens for each in said)
            by_choice.append(
                {
                    place: scores[0]
                    for places, each in zip(groups, said, strict=True)
                    for place, scores in zip(places, each.scores, strict=True)
                }
            )
        for place in range(len(self.questions)):
            scores = tuple(each[place] for each in by_choice)
            found.attempts[place] = 1
            found.scores[place] = scores
            found.answers[place] = choices[max(range(len(choices)), key=scores.__getitem__)]
        if self.way.calibration == "mean":
            self._over_the_mean(found)
        return found

    # ---- written ---------------------------------------------------------------------------------------

    def written(self, groups: Sequence[Sequence[int]]) -> Answered:
        """Read what the model writes; what is not aligned is asked again, alone."""
        found = Answered.nothing(len(self.questions))
        batches = [[self.questions[place] for place in places] for places in groups]
        said = self.asker.write(
            [self.prompt(batch) for batch in batches], [self.way.max_tokens * len(b) for b in batches]
        )
        found.note(said)
        for places, batch, each in zip(groups, batches, said, strict=True):
            parsed = parse_answers(each.text, batch, reasons=self.way.reasons, numbered=self.many)
            for place, one in zip(places, parsed, strict=True):
                self._note(found, place, one.answer, one.problem)
        for _ in range(self.way.attempts - 1):
            missing = [place for place, answer in enumerate(found.answers) if answer is None]
            if not missing:
                break
            self._again(missing, found)
        return found

    def _again(self, places: Sequence[int], found: Answered) -> None:
        prompts = []
        for place in places:
            question = self.questions[place]
            prompt = compile_prompt([question], self.examples, self.wording)
            prompt[-1]["content"] += "\n" + reminder(found.problems[place], question, self.wording)
            prompts.append(prompt)
        said = self.asker.write(prompts, [self.way.max_tokens] * len(prompts))
        found.note(said)
        for place, each in zip(places, said, strict=True):
            (one,) = parse_answers(each.text, [self.questions[place]], reasons=self.way.reasons)
            self._note(found, place, one.answer, one.problem)

    @staticmethod
    def _note(found: Answered, place: int, answer: str | None, problem: str | None) -> None:
        found.attempts[place] += 1
        found.answers[place] = answer
        found.problems.pop(place, None)
        if problem is not None:
            found.problems[place] = problem
