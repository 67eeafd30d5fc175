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

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import pydantic

from puna.core.errors import PunaError
from puna.decode.strategy import StrategySettings, strategy
from puna.decode.text_view import words_of
from puna.decode.trace import TraceRow
from puna.decode.voices import LaneVoice, Piece, Voice, Written
from puna.text.encode import encode_prompt

if TYPE_CHECKING:
    from puna.decode.lane import Steps
    from puna.decode.request import Running
    from puna.text.tokenizer import Tokenizer

Source = Literal["base", "nudge"]
_LONG_REPEAT = 30  # characters
_FEW_WORDS = 5


@strategy("nudging")
class NudgingSettings(StrategySettings):
    """Settings of nudging. The engine's own model is the base."""

    companions: ClassVar[tuple[str, ...]] = ("nudger",)
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
    repeat_rule: bool = True
    """The base hands back where it would repeat itself."""
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
        if not burst.text or (settings.repeat_rule and _repeats(burst, said, text)):
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


def _repeats(burst: Written, said: str, text: str) -> bool:
    """Whether the base goes in circles.

    A whole burst that it has ``said`` in this turn is one, and more than a few words that are in the answer,
    ``text`` and what was said.
    """
    circles = burst.ended == "full" and burst.text in said
    return circles or (len(burst.text.split(" ")) > _FEW_WORDS and burst.text in text + said)


def without_trailing_repeats(text: str) -> str:
    """``text`` without the second copy of a run of at least 30 characters at its end, however often."""
    while True:
        lengths = range(len(text) // 2, _LONG_REPEAT - 1, -1)
        repeated = next((n for n in lengths if text[-2 * n : -n] == text[-n:]), 0)
        if not repeated:
            return text
        text = text[:-repeated]


def plain_prompt(messages: Sequence[Mapping[str, Any]], question: str) -> str:
    """A conversation for a model without a chat template: ``question`` holds {question}."""
    text = ""
    for message in messages:
        asked = message["role"] in ("user", "tool")
        text += question.replace("{question}", message["content"]) if asked else f"{message['content']}\n\n"
    return text


class Nudging:
    """The base of the engine and an aligned model, by turns; greedy."""

    name: ClassVar[str] = "nudging"
    lossless: ClassVar[bool] = False

    def __init__(self, settings: NudgingSettings) -> None:
        self.settings = settings

    def run(self, request: Running) -> Steps[None]:
        """Ask both models the question, each in its own way, and let them write by turns."""
        _check(request)
        aligned = request.model(self.settings.nudger)
        if aligned.tokenizer is None or aligned.template is None:
            raise PunaError(
                "the nudger must have a tokenizer and a chat template",
                where=f"model {self.settings.nudger!r}",
                found=aligned.source,
            )
        messages, plain = self._prompts(request)
        lane = request.open_lane(self.settings.nudger)
        asked = encode_prompt(aligned.tokenizer, aligned.template, messages)
        base = LaneVoice(request.lane, plain, request.tokenizer)
        nudger = LaneVoice(lane, asked, aligned.tokenizer)

        said: list[str] = []
        most = max(self.settings.nudge_tokens, self.settings.burst_tokens)

        def write(source: Source, pieces: Sequence[Piece]) -> bool:
            said.append("".join(piece.text for piece in pieces))
            for token, row in _rows(source, pieces, request.tokenizer):
                if request.emit(token, row):
                    return True
            if min(voice.room("".join(said)) for voice in (base, nudger)) <= most:
                request.end("length")
            return request.finished

        stopped = yield from converse(base, nudger, self.settings, write)
        request.end("stop" if stopped else "length")

    def _prompts(self, request: Running) -> tuple[list[Mapping[str, Any]], list[int]]:
        """The question as messages for the nudger, and as the base's token ids.

        A prompt that is no conversation is the base's as it is, and one user's message to the nudger.
        """
        asked = request.asked
        if isinstance(asked, str):
            return [{"role": "user", "content": asked}], request.prompt
        if not isinstance(asked[0], Mapping):
            return [{"role": "user", "content": request.tokenizer.decode(request.prompt)}], request.prompt
        messages = cast("list[Mapping[str, Any]]", list(asked))
        start = [request.tokenizer.bos_id] if request.tokenizer.adds_bos else []
        text = plain_prompt(messages, self.settings.base_prompt)
        return messages, [*start, *request.tokenizer.encode(text)]


def _rows(source: Source, pieces: Sequence[Piece], tokenizer: Tokenizer) -> Iterator[tuple[int, TraceRow]]:
    """The base's tokens for what was written, with their rows of the trace."""
    if source == "base":
        for piece in pieces:
            if piece.token is not None:
                yield piece.token, TraceRow(piece.token, source, piece.entropy)
        return
    for token in tokenizer.encode_continuation("".join(piece.text for piece in pieces)):
        yield token, TraceRow(token, source)


def _check(request: Running) -> None:
    """Refuse sampling that words handed from one model to another cannot follow."""
    sampling = request.sampling
    unfit = {
        "temperature": sampling.temperature != 0,
        "penalties": sampling.penalised,
        "logprobs": bool(sampling.logprobs),
        "ignore_eos": sampling.ignore_eos,
        "json_schema": sampling.json_schema is not None,
        "regex": sampling.regex is not None,
    }
    if found := [name for name, given in unfit.items() if given]:
        raise PunaError(
            "nudging is greedy and hands over text, so it cannot follow this sampling",
            where="strategy 'nudging'",
            found=", ".join(found),
            expected="temperature 0 and nothing else that acts on single tokens; the nudger ends the answer",
        )
