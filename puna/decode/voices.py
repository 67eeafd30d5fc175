"""Models that go on with a text greedily, whatever their tokens: the parts of methods over text.

A :class:`Voice` is asked with a text and answers with pieces of text; a model's lane is one
(:class:`LaneVoice`), and a test may script another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from puna.core.errors import PunaError
from puna.decode.sampling import entropy_bits
from puna.decode.text_view import TextView

if TYPE_CHECKING:
    from torch import Tensor

    from puna.decode.lane import Lane, Steps
    from puna.text.tokenizer import Tokenizer

Ended = Literal["stop", "unsure", "full"]


@dataclass(frozen=True)
class Piece:
    """A token that a voice would write: its text, its probability, its distribution's entropy in bits.

    ``token`` is None where the voice would stop.
    """

    token: int | None
    text: str
    probability: float
    entropy: float | None = None


@dataclass(frozen=True)
class Written:
    """What a voice wrote, and why no more: it stopped, it was not confident, or that was all it was to."""

    pieces: list[Piece]
    ended: Ended

    @property
    def text(self) -> str:
        """The text of all pieces."""
        return "".join(piece.text for piece in self.pieces)


class Voice(Protocol):
    """A model that goes on with a text, greedily."""

    def next(self, text: str) -> Steps[Piece]:
        """The piece that it would write behind ``text``."""
        ...

    def write(
        self, text: str, tokens: int, *, confidence: float = 0.0, first: Piece | None = None
    ) -> Steps[Written]:
        """Write up to ``tokens`` pieces behind ``text``, as long as each is at least so likely.

        ``first`` is the first piece, taken as it is. What is written ends with a whole character.
        """
        ...


class LaneVoice:
    """A model's lane as a voice; ``prompt`` are the tokens that the text is an answer to."""

    def __init__(self, lane: Lane, prompt: Sequence[int], tokenizer: Tokenizer) -> None:
        if len(prompt) >= lane.stepper.spec.max_positions:
            raise PunaError(
                "the question does not fit the model's context",
                found=f"{len(prompt)} tokens",
                expected=f"fewer than {lane.stepper.spec.max_positions}",
            )
        self._lane, self._prompt = lane, list(prompt)
        self._stop_ids = tokenizer.stop_ids
        self._view = TextView(tokenizer)
        self._foretold: tuple[str, list[Piece]] = ("", [])  # what the model would write behind a text

    def room(self, text: str) -> int:
        """Tokens that the model's context has room for behind ``text``."""
        self._view.follow(text)
        return self._lane.stepper.spec.max_positions - len(self._prompt) - len(self._view.ids)

    def next(self, text: str) -> Steps[Piece]:
        """See :meth:`Voice.next`."""
        self._view.follow(text)
        return (yield from self._read())

    def write(
        self, text: str, tokens: int, *, confidence: float = 0.0, first: Piece | None = None
    ) -> Steps[Written]:
        """See :meth:`Voice.write`."""
        self._view.follow(text)
        before = len(self._view.ids)
        ahead = self._ahead(text)
        pieces: list[Piece] = []
        piece = (yield from self._following(ahead)) if first is None else first
        if first is not None:
            del ahead[:1]
        while True:
            ended: Ended | None = None
            if piece.token is None:
                ended = "stop"
            elif piece.probability < confidence and piece is not first:
                ended = "unsure"
            else:
                self._view.push(piece.token)
                pieces.append(piece)
                ended = "full" if len(pieces) >= tokens else None
            if ended is not None:
                self._foretold = text, [*pieces, *([] if ended == "full" else [piece]), *ahead]
                return Written(pieces[: self._view.whole() - before], ended)
            piece = yield from self._following(ahead)

    def _ahead(self, text: str) -> list[Piece]:
        """What is known already of what the model would write behind ``text``, it being greedy.

        That is where others took over the beginning of what it wrote, and no more.
        """
        start, pieces = self._foretold
        if not text.startswith(start):
            return []
        rest = text[len(start) :]
        for place, piece in enumerate(pieces):
            if not rest:
                return pieces[place:]
            if not piece.text or not rest.startswith(piece.text):
                return []
            rest = rest[len(piece.text) :]
        return []

    def _following(self, ahead: list[Piece]) -> Steps[Piece]:
        """The next piece: known already, or read."""
        return ahead.pop(0) if ahead else (yield from self._read())

    def _read(self) -> Steps[Piece]:
        result = yield from self._lane.catch_up([*self._prompt, *self._view.ids])
        return self._likeliest(result.logits[-1])

    def _likeliest(self, logits: Tensor) -> Piece:
        token = int(logits.argmax())
        probability = float((logits[token] - logits.double().logsumexp(0)).exp())
        entropy = entropy_bits(logits)
        if token in self._stop_ids:
            return Piece(None, "", probability, entropy)
        return Piece(token, self._view.peek(token), probability, entropy)
