"""Fertility: how many tokens a tokenizer spends on a byte and on a word of a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from puna.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Fertility:
    """Counts over a corpus: tokens (no special ones), UTF-8 bytes, and words.

    A word is what stands between white space, so ``per_word`` says little for scripts that are
    written without spaces. ``lossy`` counts documents that do not come back from decoding as they
    went in: bits per byte of such a tokenizer flatter it.
    """

    tokens: int
    bytes: int
    words: int
    documents: int
    lossy: int

    @property
    def per_byte(self) -> float:
        """Tokens per UTF-8 byte."""
        return self.tokens / self.bytes

    @property
    def per_word(self) -> float:
        """Tokens per white-space word."""
        return self.tokens / self.words if self.words else float("nan")


def measure(
    tokenizer: Tokenizer, texts: Sequence[str], encoded: Sequence[Sequence[int]] | None = None
) -> Fertility:
    """Count tokens, bytes and words of ``texts``; ``encoded`` saves a second encoding."""
    ids = [tokenizer.encode(text) for text in texts] if encoded is None else encoded
    return Fertility(
        tokens=sum(map(len, ids)),
        bytes=sum(len(text.encode()) for text in texts),
        words=sum(len(text.split()) for text in texts),
        documents=len(texts),
        lossy=sum(tokenizer.decode(list(row)) != text for row, text in zip(ids, texts, strict=True)),
    )
