"""Fill in the middle: a document cut in three and put in another order, so that its middle comes last.

Bavarian et al. 2022 (arXiv:2207.14255), as S46 (Crystal, arXiv:2411.04156) uses it: the cuts are at two
characters, drawn evenly, so that tokens may be torn, and the parts are encoded again by themselves. Two
orders: PSM has prefix, suffix, middle; SPM suffix, then prefix and middle as one piece, in the form whose
markers stand first. Both can be undone to the character.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from puna.core.errors import PunaError

Order = Literal["psm", "spm"]


@dataclass(frozen=True)
class Markers:
    """The three special tokens, as they are spelt."""

    prefix: str = "<fim_prefix>"
    suffix: str = "<fim_suffix>"
    middle: str = "<fim_middle>"

    def __post_init__(self) -> None:
        if len({*self}) < 3 or not all(self):
            raise PunaError("three different markers are needed", where="markers", found=", ".join(self))

    def __iter__(self) -> Iterator[str]:
        return iter((self.prefix, self.suffix, self.middle))

    def found_in(self, text: str) -> str | None:
        """A marker that stands in a text, where none should."""
        return next((marker for marker in self if marker in text), None)


def permute(text: str, cuts: tuple[int, int], order: Order, markers: Markers) -> str:
    """``text`` cut before the characters ``cuts``, its parts in another order between the markers."""
    first, second = cuts
    if not 0 <= first <= second <= len(text):
        raise PunaError("cuts lie in the text, the first before the second", found=cuts, expected=len(text))
    if (marker := markers.found_in(text)) is not None:
        raise PunaError("the text holds a marker", found=marker, fix="leave the document out")
    prefix, middle, suffix = text[:first], text[first:second], text[second:]
    if order == "psm":
        return markers.prefix + prefix + markers.suffix + suffix + markers.middle + middle
    return markers.prefix + markers.suffix + suffix + markers.middle + prefix + middle


def restore(text: str, markers: Markers) -> str:
    """The document that :func:`permute` was given; a text without markers is one that was left alone."""
    if markers.found_in(text) is None:
        return text
    pieces = re.split("(" + "|".join(re.escape(marker) for marker in markers) + ")", text)
    if pieces[0] or pieces[1::2] != [*markers]:
        raise PunaError(
            "the markers are not those of one document",
            found=" ".join(pieces[1::2]),
            expected=" ".join(markers),
        )
    prefix, suffix, last = pieces[2::2]  # SPM's prefix is empty and is part of the last
    return prefix + last + suffix


def order_of(text: str, markers: Markers) -> Order | None:
    """The order a text was put in; None if it was left alone. Of an empty prefix both are the same: SPM."""
    if not text.startswith(markers.prefix):
        return None
    return "spm" if text.startswith(markers.prefix + markers.suffix) else "psm"


def places(text: str, markers: Sequence[str]) -> list[tuple[int, int]]:
    """Where the markers stand, in order."""
    if not markers:
        return []
    pattern = "|".join(re.escape(marker) for marker in markers)
    return [match.span() for match in re.finditer(pattern, text)]
