"""What an answer has told so far, as clients are told of it: log-probabilities, trace, accounting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from puna.decode.pieces import TextPieces

if TYPE_CHECKING:
    from puna.decode.ticket import Alternatives, Event
    from puna.decode.trace import TraceRow
    from puna.text.tokenizer import Tokenizer

_LEAST = -9999.0  # what OpenAI's interface writes for a probability of nothing; JSON has no infinity


class TokenTexts:
    """The text of single tokens, as it stands inside a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.special = tokenizer.special_ids
        self._tokenizer = tokenizer
        # Some tokenizers decode the first token of a run differently, so one stands before it.
        self._before = next(
            (
                [token]
                for token in range(tokenizer.vocab_size)
                if tokenizer.decode([token], skip_special=False).isalnum()
            ),
            [],
        )
        self._skipped = len(tokenizer.decode(self._before, skip_special=False))
        self._known: dict[int, str] = {}

    @cached_property
    def longest(self) -> int:
        """At least the characters of any token: a text of more than so many times the context cannot fit."""
        return max(map(len, self._tokenizer.vocabulary()))

    def of(self, token: int) -> str:
        """The text of a token; a special one's name, and U+FFFD for a piece of a character."""
        if token not in self._known:
            whole = self._tokenizer.decode([*self._before, token], skip_special=False)
            self._known[token] = whole[self._skipped :]
        return self._known[token]


class Told:
    """One answer, from its first event to its last."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.text = ""
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.top: list[Alternatives] = []
        self.rows: list[TraceRow] = []
        self.texts: list[str] = []
        self.finish_reason: str | None = None
        self._pieces = TextPieces(tokenizer.decode)

    def take(self, event: Event) -> None:
        """Take an event on."""
        self.text += event.text
        self.ids += event.ids
        self.logprobs += event.logprobs or ()
        self.top += event.top_logprobs or ()
        self.rows += event.trace
        self.texts += [self._pieces.push(token) for token in event.ids]
        self.finish_reason = event.finish_reason or self.finish_reason
        if event.finish_reason is not None and self.texts:
            self.texts[-1] += self._pieces.finish()

    def accounting(self) -> dict[str, Any]:
        """Where the tokens came from and what they cost."""
        bits = [row.entropy for row in self.rows if row.entropy is not None]
        return {
            "tokens": len(self.ids),
            "sources": dict(Counter(row.source for row in self.rows)),
            "judged": sum(row.accepted is not None for row in self.rows),
            "accepted": sum(bool(row.accepted) for row in self.rows),
            "cost": round(sum(row.cost or 0.0 for row in self.rows), 6),
            "mean_entropy": round(sum(bits) / len(bits), 6) if bits else None,
        }

    def trace(self, first: int = 0) -> list[dict[str, Any]]:
        """Every token from the place ``first`` on."""
        return [
            {
                "id": row.token,
                "text": text,
                "source": row.source,
                "entropy": None if row.entropy is None else round(row.entropy, 4),
                "accepted": row.accepted,
                "cost": round(row.cost or 0.0, 4),
            }
            for row, text in zip(self.rows[first:], self.texts[first:], strict=True)
        ]


def chat_logprobs(
    texts: TokenTexts, ids: Sequence[int], logprobs: Sequence[float], top: Sequence[Alternatives]
) -> dict[str, Any]:
    """Log-probabilities as chat completions write them; ``top`` is empty where none were asked for."""
    content = []
    for place, (token, logprob) in enumerate(zip(ids, logprobs, strict=True)):
        likeliest = top[place] if top else []
        content.append(
            {
                **_one(texts, token, logprob),
                "top_logprobs": [_one(texts, other, value) for other, value in likeliest],
            }
        )
    return {"content": content, "refusal": None}


def completion_logprobs(
    texts: TokenTexts,
    ids: Sequence[int],
    logprobs: Sequence[float | None],
    top: Sequence[Alternatives | None],
    offset: int,
) -> dict[str, Any]:
    """Log-probabilities as the older interface lists them; the first token's text begins at ``offset``."""
    written = [texts.of(token) for token in ids]
    offsets = []
    for token, text in zip(ids, written, strict=True):
        offsets.append(offset)
        # A special token has a name but is no part of the text.
        offset += 0 if token in texts.special else len(text)
    alternatives: list[dict[str, float] | None] = []
    for likeliest in top:
        found: dict[str, float] = {}
        for token, value in likeliest or ():
            found.setdefault(texts.of(token), max(value, _LEAST))  # of two with one text the likelier
        alternatives.append(found if likeliest is not None else None)
    return {
        "tokens": written,
        "token_logprobs": [None if value is None else max(value, _LEAST) for value in logprobs],
        "top_logprobs": alternatives,
        "text_offset": offsets,
    }


def _one(texts: TokenTexts, token: int, logprob: float) -> dict[str, Any]:
    text = texts.of(token)
    known = None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode())
    return {"token": text, "logprob": max(logprob, _LEAST), "bytes": known}
