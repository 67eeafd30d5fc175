"""Prompts hold what they should, and answers are aligned with their questions or are none."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.data.tables.answers import parse_answers
from puna.data.tables.prompts import Wording, answer_lead, compile_prompt, one_line
from puna.data.tables.questions import NO, YES, Question

ERROR = Question(
    "error_detection", ({"city": "Utrehct", "zip": None},), "city", answer=YES, reason="It is Utrecht."
)
GAP = Question(
    "imputation", ({"name": "Ann", "city": None},), "city", ("Ede", "Utrecht"), "Ede", "Ann is there."
)
PAIR = Question("entity_matching", ({"name": "Ann"}, {"name": "Anne"}), answer=YES, reason="Alike.")


def text(question: Question, **wording: Any) -> str:
    messages = compile_prompt([question], [], Wording(**wording))
    return "\n".join(message["content"] for message in messages)


def test_a_prompt_has_role_task_rule_examples_and_data_in_this_order() -> None:
    messages = compile_prompt([ERROR], [PAIR, PAIR], Wording())
    assert [message["role"] for message in messages] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
        "user",
    ]
    system = messages[0]["content"]
    assert system.startswith("You are a database engineer.") and system.endswith("Answer only Yes or No.")
    assert messages[2]["content"] == "Yes"
    assert messages[-1]["content"] == (
        'Record: [city: "Utrehct", zip: null]\nIs there an error in city: "Utrehct"?'
    )


def test_no_answer_of_an_asked_question_is_in_its_prompt() -> None:
    assert "Ede" not in compile_prompt([GAP], [], Wording())[-1]["content"]
    assert "null" not in compile_prompt([GAP], [], Wording())[-1]["content"]  # the gap itself is not shown
    for question in (ERROR, GAP, PAIR):
        assert question.reason is not None and question.reason not in text(question)
        assert question.reason not in text(question, reasons=True)


def test_imputation_hints_at_the_kind_of_value_and_lists_the_choices() -> None:
    said = text(GAP, hint="a city of the Netherlands")
    assert "It is a city of the Netherlands." in said and "Answer only Ede or Utrecht." in said


def test_reasons_stand_before_answers_and_the_answer_stands_alone() -> None:
    messages = compile_prompt([ERROR], [PAIR], Wording(reasons=True))
    assert messages[2]["content"] == "Alike.\nYes"
    with pytest.raises(PunaError, match="has no reason"):
        compile_prompt(
            [ERROR], [Question("entity_matching", PAIR.records, answer=YES)], Wording(reasons=True)
        )
    with pytest.raises(PunaError, match="has no answer"):
        compile_prompt([ERROR], [Question("entity_matching", PAIR.records)], Wording())


def test_a_batch_numbers_its_questions_and_its_examples_in_one_turn() -> None:
    messages = compile_prompt([ERROR, ERROR], [PAIR, PAIR, PAIR], Wording())
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert messages[2]["content"] == "1. Yes\n2. Yes\n3. Yes"
    assert messages[3]["content"].startswith("1. Record: ") and "\n2. Record: " in messages[3]["content"]


@settings(deadline=None)
@given(st.lists(st.sampled_from([YES, NO]), min_size=2, max_size=12), st.booleans())
def test_what_the_examples_look_like_parses_as_their_answers(answers: list[str], reasons: bool) -> None:
    questions = [
        Question("error_detection", ({"a": "x"},), "a", answer=answer, reason=f"Says {number}. yes")
        for number, answer in enumerate(answers)
    ]
    said = compile_prompt(questions, questions, Wording(reasons=reasons))[2]["content"]
    found = parse_answers(said, questions, reasons=reasons)
    assert [one.answer for one in found] == answers


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("1. Yes\n2. No\n3. Yes", [YES, NO, YES]),
        ("1. yes.\n\n2.  NO \n3. Yes", [YES, NO, YES]),
        ("1. Yes\n3. No", [YES, None, NO]),  # a skipped one is missed, not shifted
        ("1. Yes\n3. No\n2. Yes", [None, None, None]),  # an order that drifts makes all doubtful
        ("1. Yes\n2. No\n2. Yes", [None, None, None]),
        ("1. Yes\n2. No\n3. Yes\n4. No", [None, None, None]),
        ("Yes\nNo\nYes", [None, None, None]),
        ("1. Yes, surely\n2. No\n3. Yes", [None, NO, YES]),
        ("1. Yes\nbecause it is\n2. No\n3. Yes", [None, NO, YES]),
        ("", [None, None, None]),
    ],
)
def test_answers_of_a_batch_are_aligned_by_number_or_are_none(said: str, expected: list[str | None]) -> None:
    found = parse_answers(said, [ERROR] * 3)
    assert [one.answer for one in found] == expected
    assert all((one.problem is None) == (one.answer is not None) for one in found)


def test_a_yes_in_a_reason_is_not_an_answer() -> None:
    (found,) = parse_answers("Yes, it looks wrong.\nNo", [ERROR], reasons=True)
    assert found.answer == NO
    (found,) = parse_answers("Yes, it looks wrong.", [ERROR], reasons=True)
    assert found.answer is None and found.problem == "1 lines instead of 2"


def test_a_free_value_is_taken_without_its_quotes_and_a_choice_whatever_its_case() -> None:
    free = Question("imputation", GAP.records, "city", ())
    assert parse_answers('"New York"', [free])[0].answer == "New York"
    assert parse_answers("1.5", [free])[0].answer == "1.5"
    assert parse_answers('1. "1.5"\n2. 2.5', [free, free])[1].answer == "2.5"
    assert parse_answers("UTRECHT.", [GAP])[0].answer == "Utrecht"
    assert parse_answers("Utrecht or Ede", [GAP])[0].answer is None


@settings(deadline=None)
@given(st.text(max_size=40), st.integers(1, 4), st.booleans())
def test_whatever_is_said_each_question_has_an_answer_or_a_problem(
    said: str, count: int, reasons: bool
) -> None:
    found = parse_answers(said, [ERROR] * count, reasons=reasons)
    assert len(found) == count
    assert all((one.answer is None) == (one.problem is not None) for one in found)


def test_numbers_stand_where_there_are_several() -> None:
    assert answer_lead(3, True) == "3. " and answer_lead(1, False) == ""
    assert one_line(" a\n b\t c ") == "a b c"
