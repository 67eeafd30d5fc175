"""Short questions whose answers a program can check: rewards without a reward model.

Lists of so many things, and the larger of two numbers, after worked examples. The rewards
lie between 0 and 1. Small models get some of them right, which is what self-evaluation needs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from puna.core.seeds import numpy_generator

if TYPE_CHECKING:
    from numpy.random import Generator

Kind = Literal["list", "larger"]
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
_SYSTEM = "Answer briefly."
_EXAMPLES: dict[Kind, tuple[tuple[str, str], ...]] = {
    "list": (("List 3 birds.", "robin, eagle, owl"), ("List 2 metals.", "iron, gold")),
    "larger": (("Larger of 12 and 45?", "45"),),
}


@dataclass(frozen=True)
class Task:
    """A question as messages, and what its answer is worth, from 0 to 1."""

    kind: Kind
    messages: Messages
    reward: Callable[[str], float]


def make_tasks(kinds: Sequence[Kind], count: int, seed: int, purpose: str) -> list[Task]:
    """``count`` questions, the kinds in turn; drawn by ``seed`` and ``purpose``, none of them twice."""
    generator = numpy_generator(seed, "checked tasks", purpose)
    found: dict[str, Task] = {}
    for place in range(100 * count):
        if len(found) == count:
            break
        task = _MAKERS[kinds[place % len(kinds)]](generator)
        found.setdefault(task.messages[-1]["content"], task)
    return list(found.values())


def _asked(kind: Kind, question: str) -> Messages:
    messages = [{"role": "system", "content": _SYSTEM}]
    for example, answer in _EXAMPLES[kind]:
        messages += [{"role": "user", "content": example}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": question}]


def _list(generator: Generator) -> Task:
    count, topic = int(generator.integers(2, 8)), TOPICS[int(generator.integers(len(TOPICS)))]
    return Task("list", _asked("list", f"List {count} {topic}."), lambda text: list_reward(text, count))


def _larger(generator: Generator) -> Task:
    one, other = (int(number) for number in generator.choice(range(10, 100), 2, replace=False))
    right = str(max(one, other))
    return Task(
        "larger", _asked("larger", f"Larger of {one} and {other}?"), lambda text: float(text.strip() == right)
    )


_MAKERS: dict[Kind, Callable[[Generator], Task]] = {"list": _list, "larger": _larger}


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


_BETWEEN = re.compile(r",|\n+")
_ITEM = re.compile(r"[a-z][a-z' -]{1,24}")
