"""Words whose labels the next word decides: what a causal model cannot know, and one that looks ahead can.

The test of S14 and S75: a word is labelled B-MARK if the word behind it is one of the triggers, else O.
Words are drawn independently, fewer than half of them triggers, so that whoever does not see the next word
does best to say O always: the majority, without a single entity.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pydantic

from puna.core.seeds import numpy_generator
from puna.core.stage import Parameters, PlanOnly

MARKED, OTHER = "B-MARK", "O"
_WORDS = "time year people way day man thing woman life child world school state family student group"


class NextWordParameters(Parameters):
    """How many rows, of which words, and how many of these are triggers."""

    rows: pydantic.PositiveInt = 2000
    """Rows of the training side."""
    held_out_rows: pydantic.PositiveInt = 200
    """Rows of the other."""
    words: tuple[str, ...] = pydantic.Field(tuple(_WORDS.split()), min_length=2)
    """The words that are drawn, all equally often."""
    triggers: int = pydantic.Field(4, ge=1)
    """How many of them mark the word before them: the first."""
    shortest: int = pydantic.Field(8, ge=2)
    """Words of a row at least."""
    longest: int = pydantic.Field(16, ge=2)
    """Words of a row at most."""
    expected_tokens: Annotated[dict[Literal["train", "held_out"], pydantic.PositiveInt], PlanOnly()] = (
        pydantic.Field(default_factory=dict)
    )
    """How many tokens each side will hold, where that is known: what a plan goes by."""

    @pydantic.model_validator(mode="after")
    def _unknowable(self) -> NextWordParameters:
        if not 2 * self.triggers < len(set(self.words)) == len(self.words):
            raise ValueError("fewer than half of the words, all different, can be triggers")
        if self.shortest > self.longest:
            raise ValueError("shortest is above longest")
        return self


def next_word_rows(parameters: NextWordParameters, side: str, seed: int) -> Iterator[dict[str, Any]]:
    """The rows of one side."""
    generator = numpy_generator(seed, "next word", side)
    triggers = set(parameters.words[: parameters.triggers])
    for number in range(parameters.rows if side == "train" else parameters.held_out_rows):
        length = int(generator.integers(parameters.shortest, parameters.longest + 1))
        words = [parameters.words[drawn] for drawn in generator.integers(len(parameters.words), size=length)]
        labels = [MARKED if behind in triggers else OTHER for behind in [*words[1:], ""]]
        row = {"id": f"{side}/{number}", "words": words, "labels": labels}
        yield {**row, "source": "next_word", "language": "en"}
