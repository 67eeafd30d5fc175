"""Data-Juicer's augmentations that need no model: noise in words and characters (S50, arXiv:2309.02033).

``nlpaug_en_mapper`` makes further rows of a text; here a text is changed in its place, one augmentation
after another. What is changed is drawn by the seed and the text alone, so that it does not depend on
which documents a batch holds. Typing and reading errors of tables that nlpaug ships are left out.
"""

from __future__ import annotations

import re
import string
from typing import Literal

import numpy
import pydantic

from puna.core import seeds
from puna.core.stage import Parameters
from puna.data.curate.operator import mapper
from puna.data.curate.scores.data_juicer_characters import SOURCE
from puna.data.curate.texts import Texts

_WORD = re.compile(r"\S+")
Change = Literal[
    "delete_word",
    "swap_words",
    "split_word",
    "delete_character",
    "swap_characters",
    "insert_character",
]


class AugmentSettings(Parameters):
    """What noise, and how much."""

    changes: list[Change] = pydantic.Field(min_length=1)
    """Augmentations, one after the other."""
    share: float = pydantic.Field(0.1, gt=0, le=1)
    """Share of the words that each of them changes, at least one word."""
    seed: int = 0
    """Seed of the draws."""


@mapper("data_juicer.augment", settings=AugmentSettings, source=SOURCE)
def augment(texts: Texts, settings: AugmentSettings) -> list[str | None]:
    """Deletes, swaps or splits some words, or characters inside of some words, at random."""
    hashes = texts.whole().hashes.tolist()
    made = []
    for text, key in zip(texts.texts, hashes, strict=True):
        generator = seeds.numpy_generator(settings.seed, "augment", key)
        for change in settings.changes:
            text = _changed(text, change, settings.share, generator)
        made.append(text)
    return [new if new != old else None for new, old in zip(made, texts.texts, strict=True)]


def _changed(text: str, change: Change, share: float, generator: numpy.random.Generator) -> str:
    spans = [match.span() for match in _WORD.finditer(text)]
    least = 2 if change in ("swap_words", "delete_word") else 1
    if len(spans) < least:
        return text
    number = max(1, round(share * len(spans)))
    if change == "swap_words":
        return _with_swaps(text, spans, number, generator)
    words = [text[start:end] for start, end in spans]
    for place in generator.choice(len(spans), size=min(number, len(spans)), replace=False).tolist():
        words[place] = _changed_word(words[place], change, generator)
    return _joined(text, spans, words)


def _with_swaps(
    text: str, spans: list[tuple[int, int]], number: int, generator: numpy.random.Generator
) -> str:
    words = [text[start:end] for start, end in spans]
    for place in generator.integers(0, len(words) - 1, size=number).tolist():
        words[place], words[place + 1] = words[place + 1], words[place]
    return _joined(text, spans, words)


def _changed_word(word: str, change: Change, generator: numpy.random.Generator) -> str:
    if change == "delete_word":
        return ""
    if change == "insert_character":
        place = int(generator.integers(0, len(word) + 1))
        drawn = string.ascii_lowercase[int(generator.integers(0, 26))]
        return word[:place] + drawn + word[place:]
    if len(word) < 2:
        return word
    place = int(generator.integers(1, len(word)))
    if change == "split_word":
        return word[:place] + " " + word[place:]
    if change == "delete_character":
        return word[:place] + word[place + 1 :]
    return word[: place - 1] + word[place] + word[place - 1] + word[place + 1 :]


def _joined(text: str, spans: list[tuple[int, int]], words: list[str]) -> str:
    """The text with other words in the places of its own; the space behind a word that is gone goes too."""
    parts: list[str] = []
    done = 0
    for (start, end), word in zip(spans, words, strict=True):
        gap = text[done:start]
        parts += [gap if word or not parts else "", word]
        done = end
    return "".join([*parts, text[done:]])
