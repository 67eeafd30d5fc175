"""Chunks of a long prompt and their ranking, and the short prompt that is made of them."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.decode.rapid import Retrieval, short_prompt, token_texts
from puna.decode.retrieval import rank, split_tokens

DOCUMENT = "\n\n".join(
    f"the other cat number {number} sat on that mat. and then it went in again." for number in range(12)
)
FACT = "the code of the tower is seven. "
QUESTION = "what is the code of the tower"


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="ab ,.\n", max_size=80), st.integers(1, 9))
def test_chunks_are_all_of_the_text_in_order_and_not_too_long(text: str, most: int) -> None:
    chunks = split_tokens(list(text), most)
    assert [place for chunk in chunks for place in chunk] == list(range(len(text)))
    assert all(1 <= len(chunk) <= most for chunk in chunks)


def test_a_text_is_cut_at_the_coarsest_separator_that_serves() -> None:
    text = "One two. Three four.\nFive six.\n\nSeven eight nine ten eleven."
    chunks = [text[chunk.start : chunk.stop] for chunk in split_tokens(list(text), 32)]
    assert chunks == ["One two. Three four.\nFive six.\n\n", "Seven eight nine ten eleven."]
    chunks = [text[chunk.start : chunk.stop] for chunk in split_tokens(list(text), 21)]
    assert chunks == ["One two. Three four.\n", "Five six.\n\n", "Seven eight nine ten ", "eleven."]


def test_tokens_that_begin_with_a_space_are_where_a_text_may_be_cut() -> None:
    pieces = ["One", " two", ".", " Three", " four", "."]
    assert split_tokens(pieces, 4) == [range(3), range(3, 6)]


def test_bm25_is_okapis() -> None:
    chunks = ["the cat sat on the mat", "a dog", "the Dog and the cat", ""]
    counts = [Counter(chunk.lower().split()) for chunk in chunks]
    mean = sum(sum(count.values()) for count in counts) / 4

    def score(number: int) -> float:
        total = 0.0
        for word in {"dog", "cat", "bird"}:
            holding = sum(word in count for count in counts)
            often, length = counts[number][word], sum(counts[number].values())
            idf = math.log(1 + (4 - holding + 0.5) / (holding + 0.5))
            total += idf * often * 2.5 / (often + 1.5 * (0.25 + 0.75 * length / mean)) if often else 0.0
        return total

    found = rank(chunks, "Dog, cat; cat or bird?")
    assert {number: value for value, number in found} == pytest.approx({n: score(n) for n in range(4)})
    assert [number for _, number in found] == [2, 1, 0, 3]


def prompt_of(tokenizer: Any, document: str, question: str = QUESTION) -> list[int]:
    end = tokenizer.id_of("<|end|>")
    body = tokenizer.encode(f"user <Context>{document}</Context> {question}")
    return [tokenizer.bos_id, *body, end, *tokenizer.encode("assistant")]


def test_the_short_prompt_keeps_everything_but_the_document(tiny_tokenizer: Any) -> None:
    planted = DOCUMENT[:300] + "\n\n" + FACT + DOCUMENT[300:]
    ids = prompt_of(tiny_tokenizer, planted)
    found = short_prompt(ids, tiny_tokenizer, Retrieval(chunk_tokens=40, budget=80))
    text = tiny_tokenizer.decode(found, skip_special=False)
    assert text.startswith("<s>user <Context>")
    assert text.endswith(f"</Context> {QUESTION}<|end|>assistant")
    assert FACT.strip() in text
    inside = text.partition("<Context>")[2].partition("</Context>")[0]
    assert 0 < len(tiny_tokenizer.encode(inside)) <= 84  # a cut may fall inside what would be one token


def test_chunks_stand_in_the_documents_order(tiny_tokenizer: Any) -> None:
    parts = [f"part {number} of it. " + "cat " * 6 for number in (3, 1, 2)]
    ids = prompt_of(tiny_tokenizer, "\n\n".join(parts), "part 1 or part 2 or part 3")
    whole = short_prompt(ids, tiny_tokenizer, Retrieval(chunk_tokens=40, budget=1000))
    assert whole == ids  # everything fits


def test_the_question_alone_ranks_not_what_stands_before_the_document(tiny_tokenizer: Any) -> None:
    documents = "\n\n".join(["mat mat mat mat mat mat", FACT, "hat hat hat hat hat hat"])
    ids = tiny_tokenizer.encode(f"mat mat hat hat <Context>{documents}</Context> the code of the tower")
    found = short_prompt(ids, tiny_tokenizer, Retrieval(chunk_tokens=30, budget=30))
    inside = tiny_tokenizer.decode(found).partition("<Context>")[2].partition("</Context>")[0]
    assert inside.strip() == FACT.strip()


def test_random_chunks_are_drawn_by_the_seed_alone(tiny_tokenizer: Any) -> None:
    ids = prompt_of(tiny_tokenizer, DOCUMENT)
    drawn = [
        short_prompt(ids, tiny_tokenizer, Retrieval(chunk_tokens=40, budget=80, by="random", seed=seed))
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_prompt_without_the_marks_is_told(tiny_tokenizer: Any) -> None:
    for text in ("the cat", "<Context>the cat", "</Context>the cat<Context>"):
        with pytest.raises(PunaError, match="where its long document stands"):
            short_prompt(tiny_tokenizer.encode(text), tiny_tokenizer, Retrieval())


def test_texts_of_tokens_join_to_the_text(tiny_tokenizer: Any) -> None:
    text = "the cat é — 猫 sat\n"
    ids = [tiny_tokenizer.bos_id, *tiny_tokenizer.encode(text)]
    found = token_texts(tiny_tokenizer, ids)
    assert len(found) == len(ids) and "".join(found) == f"<s>{text}"
