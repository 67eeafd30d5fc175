"""Questions whose answers a program checks."""

from __future__ import annotations

import re

import pytest

from puna.decode.checked_tasks import Kind, begins_reward, list_reward, look_up_reward, make_tasks


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


def asked(kinds: tuple[Kind, ...], count: int, seed: int, *, held_out: bool) -> list[str]:
    tasks = make_tasks(kinds, count, seed, held_out=held_out)
    assert {task.kind for task in tasks} == set(kinds)
    return [task.messages[-1]["content"] for task in tasks]


def test_questions_depend_on_the_seed_and_are_all_different() -> None:
    found = asked(("list", "larger", "begins"), 45, 1, held_out=False)
    assert len(set(found)) == 45
    assert found == asked(("list", "larger", "begins"), 45, 1, held_out=False)
    assert found != asked(("list", "larger", "begins"), 45, 2, held_out=False)


def test_no_question_is_both_trained_and_judged_on() -> None:
    kinds: tuple[Kind, ...] = ("list", "begins")
    trained = {question for seed in range(5) for question in asked(kinds, 60, seed, held_out=False)}
    judged = {question for seed in range(5) for question in asked(kinds, 30, seed, held_out=True)}
    assert len(trained) > 150
    assert len(judged) > 50
    assert not trained & judged


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("dog", 1.0),
        (" Dog.", 1.0),
        ("cat", 0.0),
        ("dog, duck, deer", 0.5),
        ("dogs are my dear friends", 0.5),
        ("", 0.0),
    ],
)
def test_a_thing_that_begins_with_the_letter_is_worth_1_if_it_stands_alone(text: str, reward: float) -> None:
    assert begins_reward(text, "d") == reward


def test_the_larger_number_is_worth_1_and_anything_else_nothing() -> None:
    for task in make_tasks(("larger",), 20, 2, held_out=False):
        numbers = [
            int(word.strip("?")) for word in task.messages[-1]["content"].split() if word.strip("?").isdigit()
        ]
        assert task.reward(f" {max(numbers)}\n") == 1.0
        assert task.reward(str(min(numbers))) == 0.0
        assert task.reward(f"It is {max(numbers)}") == 0.0


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("garden 940639", 1.0),
        (" 940639.", 1.0),
        ("940639. bakery", 1.0),
        ("garden 940638", 0.0),
        ("garden 9406390", 0.0),
        ("garden 940639. bakery 1", 0.0),  # it is not the only number
        ("garden", 0.0),
    ],
)
def test_a_number_that_was_looked_up_is_right_if_no_other_is_said(text: str, reward: float) -> None:
    assert look_up_reward(text, "940639") == reward


def test_the_number_to_look_up_is_the_one_of_the_text() -> None:
    tasks = make_tasks(("look_up",), 20, 3, held_out=True)
    assert len(tasks) == 20
    for task in tasks:
        ((place, number),) = re.findall(r"code of the (\w+) is (\d{4})\.", task.messages[-1]["content"])
        assert task.messages[-1]["content"].endswith(f"What is the code of the {place}?")
        assert task.reward(f"The code of the {place} is {number}.") == 1.0
        assert task.reward(f"The code of the {place} is {int(number) + 1}.") == 0.0
