"""Short questions whose answers a program can check: rewards without a reward model.

Lists of so many things, the larger of two numbers, a thing that begins with a letter, all after worked
examples; and a number that stands in a short text. The rewards lie between 0 and 1; small models get some of
them right, which is what self-evaluation needs. A quarter of all questions is held out: no question is both
trained and judged on, whatever the seeds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from puna.core.seeds import derive, numpy_generator

if TYPE_CHECKING:
    from numpy.random import Generator

Kind = Literal["list", "larger", "begins", "look_up"]
Messages = list[dict[str, str]]
TOPICS = (
    "animals",
    "body parts",
    "cities",
    "clothes",
    "colors",
    "countries",
    "drinks",
    "flowers",
    "fruits",
    "insects",
    "jobs",
    "languages",
    "musical instruments",
    "planets",
    "rivers",
    "rooms of a house",
    "school subjects",
    "sports",
    "tools",
    "trees",
    "vegetables",
    "vehicles",
)
PLACES = (
    "tower",
    "library",
    "harbour",
    "bakery",
    "garden",
    "museum",
    "station",
    "workshop",
    "castle",
    "school",
    "church",
    "bridge",
    "market",
    "theatre",
    "hotel",
    "hospital",
)
_SYSTEM = "Answer briefly."
_EXAMPLES: dict[Kind, tuple[tuple[str, str], ...]] = {
    "list": (("List 3 birds.", "robin, eagle, owl"), ("List 2 metals.", "iron, gold")),
    "larger": (("Larger of 12 and 45?", "45"),),
    "begins": (("animals, with d?", "dog"), ("colors, with g?", "green")),
    "look_up": (),
}


@dataclass(frozen=True)
class Task:
    """A question as messages, and what its answer is worth, from 0 to 1."""

    kind: Kind
    messages: Messages
    reward: Callable[[str], float]


def make_tasks(kinds: Sequence[Kind], count: int, seed: int, *, held_out: bool) -> list[Task]:
    """``count`` questions or fewer if there are no more, the kinds in turn; none of them twice."""
    generator = numpy_generator(seed, "checked tasks")
    found: dict[str, Task] = {}
    for place in range(100 * count):
        if len(found) == count:
            break
        task = _MAKERS[kinds[place % len(kinds)]](generator)
        question = task.messages[-1]["content"]
        if is_held_out(question) == held_out:
            found.setdefault(question, task)
    return list(found.values())


def is_held_out(question: str) -> bool:
    """Whether a question is one to judge on, not to train on."""
    return derive(0, "held-out questions", question) % 4 == 0


def _asked(kind: Kind, question: str) -> Messages:
    messages = [{"role": "system", "content": _SYSTEM}]
    for example, answer in _EXAMPLES[kind]:
        messages += [{"role": "user", "content": example}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": question}]


def _list(generator: Generator) -> Task:
    count, topic = int(generator.integers(2, 6)), TOPICS[int(generator.integers(len(TOPICS)))]
    return Task("list", _asked("list", f"List {count} {topic}."), lambda text: list_reward(text, count))


def _larger(generator: Generator) -> Task:
    one, other = (int(number) for number in generator.choice(range(10, 100), 2, replace=False))
    right = str(max(one, other))
    return Task(
        "larger", _asked("larger", f"Larger of {one} and {other}?"), lambda text: float(text.strip() == right)
    )


def _begins(generator: Generator) -> Task:
    topic = TOPICS[int(generator.integers(len(TOPICS)))]
    letter = _LETTERS[int(generator.integers(len(_LETTERS)))]
    return Task(
        "begins", _asked("begins", f"{topic}, with {letter}?"), lambda text: begins_reward(text, letter)
    )


def _look_up(generator: Generator) -> Task:
    """A number that stands in the text, behind the words that an answer begins with."""
    place, number = PLACES[int(generator.integers(len(PLACES)))], str(int(generator.integers(1000, 10_000)))
    question = f"The code of the {place} is {number}. What is the code of the {place}?"
    return Task("look_up", _asked("look_up", question), lambda said: look_up_reward(said, number))


_MAKERS: dict[Kind, Callable[[Generator], Task]] = {
    "list": _list,
    "larger": _larger,
    "begins": _begins,
    "look_up": _look_up,
}


def look_up_reward(text: str, number: str) -> float:
    """1 if the only number that is said is the right one, else 0."""
    return float(_NUMBER.findall(text) == [number])


def list_reward(text: str, count: int) -> float:
    """From 1 for ``count`` different short items in one line between commas, down to 0.

    Every missing, surplus, double or strange item takes off 1 / ``count``; a list that is not one line
    of words is worth half.
    """
    said = text.strip()
    items = [
        re.sub(r"^\s*(\d+[.)]|[-*])\s*|[ .]+$", "", item).strip().lower() for item in _BETWEEN.split(said)
    ]
    good = {item for item in items if _ITEM.fullmatch(item)}
    wrong = len(items) - len(good)
    worth = max(0.0, 1.0 - (abs(len(good) - count) + wrong) / count)
    return worth if "\n" not in said and not re.search(r"\d", said) else worth / 2


def begins_reward(text: str, letter: str) -> float:
    """1 for one short thing that begins with the letter, half for more than that, else 0."""
    said = text.strip().lower()
    if not said.startswith(letter):
        return 0.0
    return 1.0 if _ITEM.fullmatch(said.rstrip(".")) and said.count(" ") <= 1 else 0.5


_LETTERS = "abcdefghlmoprstw"
_NUMBER = re.compile(r"\d+")
_BETWEEN = re.compile(r",|\n+")
_ITEM = re.compile(r"[a-z][a-z' -]{1,24}")
