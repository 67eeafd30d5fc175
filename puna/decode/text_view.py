"""One model's tokens of a text that others write too.

Models of different vocabularies can only share text. A :class:`TextView` holds the tokens under which
one of them sees it: its own tokens as it chose them, and what others wrote as its tokenizer spells
it. When the text changes, as few tokens as possible change with it, so that a lane which has read
the old ones reads little again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from puna.text.tokenizer import Tokenizer

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_INSIDE = -1
_CONTEXT = 4  # tokens decoded before a new one, since some tokenizers decode the first of a run differently


class TextView:
    """The tokens ``ids`` of the text ``text``, which begins where a prompt ends."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.ids: list[int] = []
        self.text = ""
        self._tokenizer = tokenizer
        self._ends: list[int] = []  # characters of the text up to and with each token; -1 inside a character

    def push(self, token: int) -> str:
        """Add a token that the model chose; returns its text, empty inside a character."""
        self.ids.append(token)
        settled = len(self.ids) - 1
        while settled and self._ends[settled - 1] == _INSIDE:
            settled -= 1
        context = max(0, settled - _CONTEXT)
        before = self._tokenizer.decode(self.ids[context:settled])
        new = self._tokenizer.decode(self.ids[context:])[len(before) :]
        if new.endswith(_BROKEN):
            self._ends.append(_INSIDE)
            return ""
        self.text += new
        self._ends.append(len(self.text))
        return new

    def peek(self, token: int) -> str:
        """The text that :meth:`push` would add."""
        new = self.push(token)
        self.ids.pop()
        self._ends.pop()
        self.text = self.text[: len(self.text) - len(new)]
        return new

    def whole(self) -> int:
        """How many of the tokens make the text: without those of a character that has not ended."""
        count = len(self.ids)
        while count and self._ends[count - 1] == _INSIDE:
            count -= 1
        return count

    def follow(self, text: str) -> None:
        """Stand for ``text`` from now on.

        Tokens up to where the two texts part stay. Where others wrote on, their part is encoded from the
        beginning of the word it continues, so that a word begun by one model and ended by another has the
        tokens that its tokenizer gives it.
        """
        shared = _shared(self.text, text)
        count = self.whole()
        while count and not 0 <= self._ends[count - 1] <= shared:
            count -= 1
        if self._end(count) != len(text):
            while count and text[self._end(count)] != " ":
                count -= 1
                while count and self._ends[count - 1] == _INSIDE:
                    count -= 1
        self._crop(count)
        rest = text[len(self.text) :]
        if rest:
            for token in self._tokenizer.encode_continuation(rest):
                self.push(token)

    def _end(self, count: int) -> int:
        return self._ends[count - 1] if count else 0

    def _crop(self, count: int) -> None:
        self.text = self.text[: self._end(count)]
        del self.ids[count:], self._ends[count:]


def _shared(first: str, second: str) -> int:
    """With how many characters both begin."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


def words_of(pieces: Sequence[str]) -> list[list[int]]:
    """Places of the pieces that make each word: a word begins with a piece that begins with a space.

    Cut between pieces only, so that what is kept of a text keeps its tokens.
    """
    words: list[list[int]] = []
    for place, piece in enumerate(pieces):
        if place == 0 or piece.startswith(" "):
            words.append([])
        words[-1].append(place)
    return words
