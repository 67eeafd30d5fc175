"""Nudging: an untuned base model writes, an aligned model of any vocabulary takes over where it wavers.

System S68, Nudging (Fei, Razeghi and Singh 2024, arXiv:2410.09300). The base writes greedily from a
plain prompt; where the probability of its likeliest token falls below ``confidence``, the aligned
model, the nudger, goes on with the same text under its own chat template. They hand over at words:
of up to 16 tokens of the nudger the first word is always taken; before each later word the base is
asked, and goes on itself if its next token begins that word or is likely enough. If it never is,
all words but the last, which may be cut, are taken and a new nudge begins. The answer ends where
the nudger stops.

Both see text: each keeps its own tokens of it (:class:`TextView`), and its lane reads what is new to
it. Simplified: a repeat at the end of the answer is not cut off afterwards, since the answer has been
streamed by then (:func:`without_trailing_repeats` does it to a whole text); a word begins at a token that
begins with a space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

import pydantic

from puna.decode.sampling import entropy_bits
from puna.decode.strategy import StrategySettings, strategy
from puna.decode.text_view import TextView, words_of

if TYPE_CHECKING:
    from torch import Tensor

    from puna.decode.lane import Lane, Steps
    from puna.text.tokenizer import Tokenizer

Source = Literal["base", "nudge"]
Ended = Literal["stop", "unsure", "full"]
_LONG_REPEAT = 30  # characters
_FEW_WORDS = 5


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
        self._lane, self._prompt = lane, list(prompt)
        self._stop_ids = tokenizer.stop_ids
        self._view = TextView(tokenizer)

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
        pieces: list[Piece] = []
        piece = first if first is not None else (yield from self._read())
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
                return Written(pieces[: self._view.whole() - before], ended)
            piece = yield from self._read()

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


@strategy("nudging")
class NudgingSettings(StrategySettings):
    """Settings of nudging. The engine's own model is the base."""

    nudger: str = "nudge"
    """Name of the aligned model among the engine's models."""
    confidence: float = pydantic.Field(0.3, ge=0)
    """The paper's gamma: the base writes where its likeliest token has at least this probability."""
    prefix_rule: bool = True
    """The base also goes on where its next token begins the nudger's next word."""
    nudge_tokens: int = pydantic.Field(16, ge=1)
    """Tokens of a nudge at most."""
    burst_tokens: int = pydantic.Field(16, ge=1)
    """Tokens of the base between two looks for repetition."""
    rounds: int = pydantic.Field(150, ge=1)
    """Nudges of an answer at most."""
    same_nudges: int = pydantic.Field(3, ge=1)
    """The answer ends when the same nudge has come so many times more."""
    base_prompt: str = "Question: {question}\nAnswer:\n"
    """How the base, which has no chat template, is asked a user's message."""

    @pydantic.field_validator("base_prompt")
    @classmethod
    def _fillable(cls, value: str) -> str:
        if value.count("{question}") != 1:
            raise ValueError("there is to be one place for the {question}")
        return value

    def build(self) -> Nudging:
        """The strategy."""
        return Nudging(self)


Write = Callable[[Source, Sequence[Piece]], bool]
"""Takes what was written to the answer; returns whether the answer has ended."""


def converse(base: Voice, nudger: Voice, settings: NudgingSettings, write: Write) -> Steps[bool]:
    """Write an answer by turns; returns whether the nudger stopped, rather than a limit."""
    text, last, same = "", "", 0
    for _ in range(settings.rounds):
        nudge = yield from nudger.write(text, settings.nudge_tokens)
        if nudge.ended == "stop":
            write("nudge", nudge.pieces)
            return True
        taken, first = yield from _taken(base, text, nudge.pieces, settings)
        said = "".join(piece.text for piece in taken)
        same = same + 1 if said == last else 0
        if same >= settings.same_nudges:
            return False
        last, text = said, text + said
        if write("nudge", taken):
            return False
        if first is not None:
            turn = yield from _base_turn(base, text, first, settings, write)
            if turn is None:
                return False
            text += turn
    return False


def _base_turn(
    base: Voice, text: str, first: Piece, settings: NudgingSettings, write: Write
) -> Steps[str | None]:
    """Let the base write from ``first`` on until it wavers, stops or repeats; None: the answer has ended."""
    said = ""
    start: Piece | None = first
    while True:
        burst = yield from base.write(
            text + said, settings.burst_tokens, confidence=settings.confidence, first=start
        )
        circles = burst.ended == "full" and burst.text in said
        if not burst.text or circles or _repeats(burst, text + said):
            return said
        said += burst.text
        if write("base", burst.pieces):
            return None
        if burst.ended != "full":
            return said
        start = None


def _taken(
    base: Voice, text: str, pieces: Sequence[Piece], settings: NudgingSettings
) -> Steps[tuple[list[Piece], Piece | None]]:
    """The words of a nudge that are taken, and the base's first piece behind them if it goes on."""
    words = words_of([piece.text for piece in pieces])
    end = 1
    for end in range(1, len(words)):
        before = [pieces[place] for word in words[:end] for place in word]
        piece = yield from base.next(text + "".join(each.text for each in before))
        if piece.token is None:  # the base would stop, which only the nudger may
            return before, None
        word = "".join(pieces[place].text for place in words[end])
        begins = settings.prefix_rule and piece.text != "" and word.startswith(piece.text)
        if begins or _confident(piece, settings):
            return before, piece
    return [pieces[place] for word in words[:end] for place in word], None


def _confident(piece: Piece, settings: NudgingSettings) -> bool:
    return piece.probability >= settings.confidence


def _repeats(burst: Written, text: str) -> bool:
    """Whether more than a few words are in the answer already, so that the base goes in circles."""
    return len(burst.text.split(" ")) > _FEW_WORDS and burst.text in text


def without_trailing_repeats(text: str) -> str:
    """``text`` without the second copy of a run of at least 30 characters at its end, however often."""
    while True:
        lengths = range(len(text) // 2, _LONG_REPEAT - 1, -1)
        repeated = next((n for n in lengths if text[-2 * n : -n] == text[-n:]), 0)
        if not repeated:
            return text
        text = text[:-repeated]


class Nudging:
    """The base of the engine and an aligned model, by turns; greedy."""

    name: ClassVar[str] = "nudging"
    lossless: ClassVar[bool] = False

    def __init__(self, settings: NudgingSettings) -> None:
        self.settings = settings
