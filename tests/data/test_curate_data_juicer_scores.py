"""Data-Juicer's scores: each against its definition worked out by hand, one document at a time."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from puna.core.errors import PunaError
from puna.core.stage import validate
from puna.data.curate import special
from puna.data.curate.operator import apply_score, get_operator
from puna.data.curate.texts import Texts

# Words and signs that tell definitions apart: special characters inside and around words, breaks of every
# kind, letters whose lower case is special, longer, or depends on what stands beside.
PARTS = ["a", "b", "the", "The", "ab", "--", "-x-", " ", "  ", "\n", "\r\n", "\r", "\t", "\u2028", "9", "ø"]
PARTS += ["Ø", "İ", "Σ", "ΟΣ", "😀", "«w»", "中", "\x1c", "\u00a0", "_", "…"]
documents = some.lists(some.lists(some.sampled_from(PARTS), max_size=40).map("".join), max_size=4)
SPECIAL = special.table_of("data_juicer_special")


def scored(
    name: str, texts: list[str], signal: str, metas: list[str] | None = None, **values: Any
) -> list[float]:
    operator = get_operator("score", f"data_juicer.{name}")
    made = validate(operator.settings, values, where="test")
    return apply_score(operator, Texts(texts, metas=metas), made)[signal].tolist()  # type: ignore[union-attr]


def words_by_hand(text: str, lower: bool = True) -> list[str]:
    words = [
        word for line in text.split("\n") for part in line.split("\t") for word in part.split(" ") if word
    ]
    words = [word.lower() if lower else word for word in words]
    return [stripped for word in words if (stripped := stripped_by_hand(word))]


def stripped_by_hand(word: str) -> str:
    while word and SPECIAL[ord(word[0])]:
        word = word[1:]
    while word and SPECIAL[ord(word[-1])]:
        word = word[:-1]
    return word


def character_repetition_by_hand(text: str, n: int) -> float:
    counts = sorted(Counter(text[i : i + n] for i in range(len(text) - n + 1)).values(), reverse=True)
    k = min(int(math.sqrt(len(counts))), sum(count > 1 for count in counts))
    return sum(counts[:k]) / sum(counts) if counts else 0.0


def word_repetition_by_hand(text: str, n: int) -> float:
    words = words_by_hand(text)
    counts = Counter(" ".join(words[i : i + n]) for i in range(len(words) - n + 1))
    total = sum(counts.values())
    return sum(count for count in counts.values() if count > 1) / total if total else 0.0


@settings(max_examples=60, deadline=None)
@given(documents)
def test_characters_and_lines_as_by_hand(texts):
    share = [sum(map(str.isalnum, text)) / len(text) if text else 0.0 for text in texts]
    assert scored("alphanumeric", texts, "ratio") == share
    special = [sum(bool(SPECIAL[ord(c)]) for c in text) / len(text) if text else 0.0 for text in texts]
    assert scored("special_characters", texts, "ratio") == special
    lines = [text.splitlines() for text in texts]
    mean = [len(text) / len(found) if found else 0.0 for text, found in zip(texts, lines, strict=True)]
    assert scored("average_line_length", texts, "characters") == mean
    longest = [max(map(len, found), default=0) for found in lines]
    assert scored("maximum_line_length", texts, "characters") == longest
    assert scored("text_length", texts, "characters") == [len(text) for text in texts]


@settings(max_examples=60, deadline=None)
@given(documents, some.integers(1, 12))
def test_repetition_as_by_hand(texts, n):
    found = scored("character_repetition", texts, "ratio", n=n)
    assert found == pytest.approx([character_repetition_by_hand(text, n) for text in texts])
    found = scored("word_repetition", texts, "ratio", n=n)
    assert found == pytest.approx([word_repetition_by_hand(text, n) for text in texts])


@settings(max_examples=60, deadline=None)
@given(documents)
def test_words_as_by_hand(texts):
    assert scored("words", texts, "count") == [len(words_by_hand(text, lower=False)) for text in texts]


def test_repetition_counts_only_what_is_repeated():
    # 91 different runs of 10 characters: without the cap at repeated ones the ratio would be 9 / 91.
    text = "".join(chr(0x4E00 + 3 * i) for i in range(100))
    assert scored("character_repetition", [text, "ab" * 20, "short"], "ratio") == [0.0, 16 / 31, 0.0]


def test_special_characters_count_spaces_and_digits():
    assert scored("special_characters", ["ab 1!", "abé", "", "😀x"], "ratio") == [0.6, 0.0, 0.0, 0.5]


def test_lists_of_words_are_files(tmp_path: Path):
    listed = tmp_path / "stop.txt"
    listed.write_text("the\nof\n\n", encoding="utf-8")
    found = scored("stop_words", ["The house of, (the) dog", "none here", ""], "ratio", words=str(listed))
    assert found == [3 / 5, 0.0, 0.0]
    by_language = tmp_path / "flagged.json"
    by_language.write_text(json.dumps({"en": ["bad"], "nl": ["slecht"]}), encoding="utf-8")
    given_ = ["bad slecht", "good"]
    assert scored("flagged_words", given_, "ratio", words=str(by_language), language="nl") == [0.5, 0.0]
    assert scored("flagged_words", given_, "ratio", words=str(by_language), language="all") == [1.0, 0.0]


def test_groups_of_words_count_as_words(tmp_path: Path):
    listed = tmp_path / "list.txt"
    listed.write_text("ab\n", encoding="utf-8")
    found = scored("flagged_words", ["a b c", "ab"], "ratio", words=str(listed), groups=[2])
    assert found == [1 / 5, 1.0]  # Words a, b, c and groups ab, bc.


@pytest.mark.parametrize(
    ("name", "content", "language", "message"),
    [
        ("gone.txt", None, None, "cannot read"),
        ("empty.txt", "\n", None, "empty"),
        ("list.json", "{", None, "JSON"),
        ("list.json", '{"en": ["a"]}', None, "say which"),
        ("list.json", '{"en": ["a"]}', "xx", "unknown language"),
        ("list.json", "[1]", None, "strings"),
        ("list.txt", "a", "en", "only JSON"),
    ],
)
def test_a_bad_list_of_words_is_told(tmp_path, name, content, language, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(PunaError, match=message):
        scored("stop_words", ["a"], "ratio", words=str(path), language=language)


def test_tokens_are_those_of_a_given_tokenizer(tiny_tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tiny_tokenizer.save(tmp_path)
    text = "the cat sat on the mat"
    tokens = len(tiny_tokenizer.encode(text))
    assert scored("tokens", [text, ""], "count", tokenizer=str(path)) == [tokens, 0]
    ratio = scored("alphabetic_tokens", [text, ""], "ratio", tokenizer=str(path))
    assert ratio == [sum(map(str.isalpha, text)) / tokens, 0.0]
    by_tokens = scored("words", ["The cat", ""], "count", tokenizer=str(path))
    assert 2 <= by_tokens[0] <= 7
    assert by_tokens[1] == 0


def test_fields_come_from_the_row():
    metas = ['{"stars": 5, "path": "a/b.py", "tags": ["x", "y"], "deep": {"n": "7.5"}}', "", "not JSON"]
    texts = ["a", "b", "c"]
    found = scored("specified_field", texts, "target", metas, field="tags", values=["x", "y", "z"])
    assert found[0] == 1
    assert numpy.isnan(found[1:]).all()
    assert scored("specified_field", texts[:1], "target", metas[:1], field="tags", values=["x"]) == [0]
    found = scored("specified_number", texts, "value", metas, field="deep.n")
    assert found[0] == 7.5
    assert numpy.isnan(found[1:]).all()
    assert scored("suffix", texts, "target", metas, field="path", suffixes=[".py"]) == [1, 0, 0]


def test_chunks_are_spans_of_a_whole_document():
    operator = get_operator("score", "data_juicer.chunks")
    signals = apply_score(operator, Texts(["aa\n\nbbbbbbb", ""]), operator.settings(maximum=7))
    spans = signals["characters"]
    assert spans.starts.tolist() == [0, 4, 0]
    assert spans.ends.tolist() == [2, 11, 0]
    assert signals["count"].tolist() == [2, 1]


@settings(max_examples=60, deadline=None)
@given(some.text(alphabet="ab \n", max_size=60), some.integers(3, 9), some.integers(0, 2))
def test_chunks_keep_to_the_maximum_and_lose_no_letter(text, maximum, overlap):
    operator = get_operator("score", "data_juicer.chunks")
    made = operator.settings(maximum=maximum, overlap=overlap)
    spans = apply_score(operator, Texts([text]), made)["characters"]
    assert all(end - start <= maximum for start, end in zip(spans.starts, spans.ends, strict=True))
    covered = {place for a, b in zip(spans.starts, spans.ends, strict=True) for place in range(a, b)}
    assert all(place in covered for place, character in enumerate(text) if character in "ab")
