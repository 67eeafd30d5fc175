"""Mistakes made in real text, for a judge of tokens to learn from (S44, Judge Decoding).

A word or a number of a text gives way to another of its kind, a number as often as a word where there are
both. Where the two texts part, the tokens of what was put in are mistaken; everything in the untouched
text is right.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from puna.core.seeds import numpy_generator

if TYPE_CHECKING:
    import numpy

    from puna.text.tokenizer import Tokenizer

_WORD = re.compile(r"[^\W\d_]{3,}|\d+")


@dataclass(frozen=True)
class Passage:
    """A text, the tokens that stand before it, and the name of where it is from."""

    before: list[int]
    text: str
    source: str = ""


@dataclass(frozen=True)
class Spoilt:
    """Ids of a text, ``right``, and of the same with one mistake, ``wrong``, at the places ``mistaken``.

    The first ``start`` ids of both stand before the text. ``number`` says that a number was changed,
    ``source`` is the passage's.
    """

    right: list[int]
    wrong: list[int]
    mistaken: tuple[int, int]
    start: int
    number: bool
    source: str = ""


def spoil(passages: Sequence[Passage], tokenizer: Tokenizer, *, tokens: int, seed: int) -> list[Spoilt]:
    """One mistake in each text that has a word to spoil, cut to ``tokens``; the others are left out.

    A word is replaced by another of the texts of about its length and case, a number from one of its
    digits on by others; neither is a text's first word.
    """
    generator = numpy_generator(seed, "mistakes")
    every = {word for passage in passages for word in _WORD.findall(passage.text)}
    words = sorted(word for word in every if not word[0].isdigit())
    found = []
    for passage in passages:
        right = tokenizer.encode(passage.text)[:tokens]
        reach = len(tokenizer.decode(right))  # of the text, what the cut tokens show
        spots = list(_WORD.finditer(passage.text, 0, reach))[1:]
        if not spots:
            continue
        kinds = [[spot for spot in spots if spot[0][0].isdigit() is number] for number in (False, True)]
        kind = kinds[int(generator.integers(2))] or spots
        spot = kind[int(generator.integers(len(kind)))]
        other = _other(spot[0], words, generator)
        if other is None:
            continue
        ahead = passage.text[: spot.start()] + other
        wrong = tokenizer.encode(ahead + passage.text[spot.end() :])[:tokens]
        span = _differing(right, wrong, len(tokenizer.encode(ahead)))
        if span is not None:
            start = len(passage.before)
            places = (start + span[0], start + span[1])
            ids = ([*passage.before, *right], [*passage.before, *wrong])
            found.append(Spoilt(*ids, places, start, spot[0][0].isdigit(), passage.source))
    return found


def _other(word: str, words: Sequence[str], generator: numpy.random.Generator) -> str | None:
    """Another word of about the same length and case, or a number that differs from some digit on."""
    if word[0].isdigit():
        place = int(generator.integers(len(word)))
        digit = (int(word[place]) + int(generator.integers(1, 10))) % 10
        after = generator.integers(0, 10, len(word) - place - 1)
        return "".join([word[:place], str(digit), *map(str, after)])
    alike = [
        other
        for other in words
        if abs(len(other) - len(word)) <= 2
        and other.lower() != word.lower()
        and (other.istitle(), other.isupper()) == (word.istitle(), word.isupper())
    ]
    return alike[int(generator.integers(len(alike)))] if alike else None


def _differing(right: Sequence[int], wrong: Sequence[int], end: int) -> tuple[int, int] | None:
    """From the first token that differs to ``end``, where what was put in ends; None if that is nothing."""
    shorter = min(len(right), len(wrong))
    same = next((place for place in range(shorter) if right[place] != wrong[place]), shorter)
    return (same, min(max(end, same + 1), len(wrong))) if same < shorter else None
