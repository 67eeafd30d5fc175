"""A benchmark out of any text: which of several endings follows a passage.

In the form of HellaSwag, which system S38 (arXiv:2412.13335) watches while it trains: a passage, its own
ending and others, and the likeliest for its length is taken. Simplified: the other endings are those of other
passages, drawn by the seed, not ones that a model wrote to mislead; so it is easier, and measures something
at the size of a laptop. Its figures share nothing with HellaSwag's but the chance of a quarter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from puna.core.errors import PunaError
from puna.core.seeds import numpy_generator
from puna.evaluate.choices import Slot, score

if TYPE_CHECKING:
    from puna.model.llama import Llama

CHOICES = 4
_TO_A_SPACE = 24  # characters that a cut may move to stand before a word


@dataclass(frozen=True)
class Question:
    """A passage, endings to choose among, and the place of its own."""

    passage: str
    endings: tuple[str, ...]
    right: int


def questions(
    texts: Sequence[str], *, count: int, passage: int, ending: int, seed: int, name: str
) -> list[Question]:
    """At most ``count`` questions, from as many texts, of so many characters of passage and ending."""
    generator = numpy_generator(seed, "endings", name)
    long_enough = [text for text in texts if len(text) >= passage + ending + 2 * _TO_A_SPACE]
    if len(long_enough) < CHOICES:
        raise PunaError(
            "too few texts are long enough for a passage and its ending",
            where=f"endings of {name}",
            found=f"{len(long_enough)} of {len(texts)}",
            expected=f"at least {CHOICES} of {passage + ending + 2 * _TO_A_SPACE} characters",
        )
    chosen = [long_enough[int(place)] for place in generator.permutation(len(long_enough))[:count]]
    cut = []
    for text in chosen:
        start = int(generator.integers(len(text) - passage - ending - 2 * _TO_A_SPACE + 1))
        middle = _before_a_word(text, start + passage)
        cut.append((text[start:middle], text[middle : _before_a_word(text, middle + ending)]))
    different = list(dict.fromkeys(own for _, own in cut))
    if len(different) < CHOICES:
        raise PunaError(
            "too few endings differ", where=f"endings of {name}", found=len(different), expected=CHOICES
        )
    found = []
    for before, own in cut:
        others = [other for other in different if other != own]
        drawn = [others[int(each)] for each in generator.permutation(len(others))[: CHOICES - 1]]
        right = int(generator.integers(CHOICES))
        found.append(Question(before, (*drawn[:right], own, *drawn[right:]), right))
    return found


def _before_a_word(text: str, place: int) -> int:
    """The first place from ``place`` on that is before a space, if one is near; else ``place``."""
    space = text.find(" ", place, place + _TO_A_SPACE)
    return place if space < 0 else space


def answered(model: Llama, asked: Sequence[Question]) -> list[bool]:
    """Whether the ending that is likeliest for each of its bytes is the passage's own."""
    from puna.decode.engine import Engine

    slots = [[Slot("", question.endings)] for question in asked]
    told = []
    scored = score(Engine(model), [question.passage for question in asked], slots)
    for question, (_, method) in zip(asked, scored, strict=True):
        rates = [
            nats / len(ending.encode())
            for nats, ending in zip(method.scores[0], question.endings, strict=True)
        ]
        told.append(max(range(CHOICES), key=rates.__getitem__) == question.right)
    return told
