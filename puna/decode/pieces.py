"""Text from tokens as they come: whole characters only, cut at stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_BROKEN = "\N{REPLACEMENT CHARACTER}"


class TextPieces:
    """Turns a growing list of token ids into pieces of text that never have to be taken back.

    A character whose bytes are spread over several tokens appears once its last byte is there,
    and text that may be the beginning of a stop string waits until it is clear that it is not.
    ``decode`` is the tokenizer's. Each token decodes two short runs of ids, not the whole text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._decode = decode
        self._stop = stop
        self._ids: list[int] = []
        # Ids before `_shown` are text already; `_context` begins the run before it, because some
        # tokenizers decode the first token of a run differently (without its leading space).
        self._context = 0
        self._shown = 0
        self._waiting = ""

    def push(self, token: int) -> str:
        """Add a token; returns the text that is certain by now, maybe empty."""
        self._ids.append(token)
        new = self._new_text()
        if not new or new.endswith(_BROKEN):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return self._pass(new)

    def finish(self) -> str:
        """The text still held back when no more tokens come.

        Bytes that never became a character show as U+FFFD.
        """
        if self.stopped:
            return ""
        certain = self._pass(self._new_text())
        rest, self._waiting = self._waiting, ""
        return certain + rest

    def _new_text(self) -> str:
        before = self._decode(self._ids[self._context : self._shown])
        return self._decode(self._ids[self._context :])[len(before) :]

    def _pass(self, new: str) -> str:
        text = self._waiting + new
        ends = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if ends:
            self.stopped = True
            self._waiting = ""
            return text[: min(ends)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._waiting = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of ``stop`` with which ``text`` ends."""
    return next(
        (length for length in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:length])), 0
    )
