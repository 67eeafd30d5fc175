from __future__ import annotations

import math
from typing import Any

from puna.evaluate import fertility


def test_counts_are_tokens_bytes_and_words(tiny_tokenizer: Any) -> None:
    texts = ["the cat", "à la carte"]
    found = fertility.measure(tiny_tokenizer, texts)
    tokens = sum(len(tiny_tokenizer.encode(text)) for text in texts)
    assert (found.tokens, found.bytes, found.words, found.documents, found.lossy) == (tokens, 18, 5, 2, 0)
    assert found.per_byte == tokens / 18
    assert found.per_word == tokens / 5
    assert fertility.measure(tiny_tokenizer, texts, [[1], [2, 3]]).tokens == 3


def test_a_text_without_words_has_no_tokens_per_word(tiny_tokenizer: Any) -> None:
    assert math.isnan(fertility.measure(tiny_tokenizer, [" \n"]).per_word)


def test_documents_that_do_not_come_back_are_counted() -> None:
    class Forgetful:
        def encode(self, text: str) -> list[int]:
            return [ord(character) for character in text.lower()]

        def decode(self, ids: list[int]) -> str:
            return "".join(map(chr, ids))

    found = fertility.measure(Forgetful(), ["abc", "Abc", "ABC"])  # type: ignore[arg-type]
    assert found.lossy == 2
