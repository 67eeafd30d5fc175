"""Questions whose answers a program checks."""

from __future__ import annotations

import pytest

from puna.decode.checked_tasks import list_reward, make_tasks


@pytest.mark.parametrize(
    ("text", "count", "reward"),
    [
        ("lion, tiger, bear", 3, 1.0),
        ("Lion, tiger, polar bear.", 3, 1.0),
        ("lion, tiger, bear", 4, 0.75),
        ("lion, tiger, bear, cat", 3, 2 / 3),
        ("lion, tiger, bear, lion", 4, 0.5),  # one missing, one double
        ("lion, tiger, the animal that I like most of all", 3, 1 / 3),
        ("lion\ntiger\nbear", 3, 0.5),
        ("1. lion, 2. tiger, 3. bear", 3, 0.5),
        ("I like animals very much, but what is it to you?", 5, 0.0),
        ("", 3, 0.0),
    ],
)
def test_a_list_is_worth_what_it_holds(text: str, count: int, reward: float) -> None:
    assert list_reward(text, count) == pytest.approx(reward)


def test_questions_depend_on_seed_and_purpose_and_are_all_different() -> None:
    tasks = make_tasks(("list", "larger"), 40, 1, "training")
    asked = [task.messages[-1]["content"] for task in tasks]
    assert len(set(asked)) == 40
    assert asked == [
        task.messages[-1]["content"] for task in make_tasks(("list", "larger"), 40, 1, "training")
    ]
    other = [task.messages[-1]["content"] for task in make_tasks(("list", "larger"), 40, 1, "held out")]
    assert asked != other
    assert {task.kind for task in tasks} == {"list", "larger"}


def test_the_larger_number_is_worth_1_and_anything_else_nothing() -> None:
    for task in make_tasks(("larger",), 20, 2, "x"):
        numbers = [
            int(word.strip("?")) for word in task.messages[-1]["content"].split() if word.strip("?").isdigit()
        ]
        assert task.reward(f" {max(numbers)}\n") == 1.0
        assert task.reward(str(min(numbers))) == 0.0
        assert task.reward(f"It is {max(numbers)}") == 0.0
