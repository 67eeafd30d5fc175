"""A batch of documents against the plain definitions, on texts that hypothesis makes up."""

from __future__ import annotations

import re
import string
from collections import Counter

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.data.curate.characters import CODE_POINTS, table_of
from puna.data.curate.texts import Texts, hashes_of

_CHARACTERS = st.sampled_from("ab cÄß 1²Ⅷ\t\n\n\r\x00_.,!\u3000中文ǅ\U0001f600")
DOCUMENTS = st.lists(st.one_of(st.text(_CHARACTERS, max_size=30), st.text(max_size=12)), max_size=6)


def strings_by_document(segments) -> list[list[str]]:
    strings = segments.strings()
    return [strings[a:b] for a, b in zip(segments.bounds, segments.bounds[1:], strict=False)]


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("alphabetic", str.isalpha),
        ("digit", str.isdigit),
        ("decimal", str.isdecimal),
        ("numeric", str.isnumeric),
        ("alphanumeric", str.isalnum),
        ("upper", str.isupper),
        ("lower", str.islower),
        ("white_space", str.isspace),
        ("punctuation", lambda c: c in string.punctuation),
        ("word", lambda c: re.match(r"\w", c) is not None),
    ],
)
def test_a_class_of_characters_is_pythons(name, method):
    by_hand = [method(chr(code)) for code in range(CODE_POINTS)]
    assert table_of(name).tolist() == by_hand


def test_an_unknown_class_is_told_with_the_nearest():
    with pytest.raises(PunaError, match="did you mean 'alphabetic'"):
        table_of("alphabetical")


@given(DOCUMENTS)
def test_codes_and_counts(documents):
    texts = Texts(documents)
    assert texts.codes.tolist() == [ord(c) for d in documents for c in d]
    assert texts.count_of("digit").tolist() == [sum(c.isdigit() for c in d) for d in documents]
    assert texts.document.tolist() == [place for place, d in enumerate(documents) for _ in d]
    assert texts.lower.texts == [d.lower() for d in documents]


def test_long_documents_are_counted_like_short_ones():
    texts = Texts(["a1" * 50_000, "", "1b2"])
    assert texts.count_of("digit").tolist() == [50_000, 0, 2]
    assert Texts(["a1"] * 9).count_of("digit").tolist() == [1] * 9


@given(DOCUMENTS)
def test_words_are_those_of_split_and_re(documents):
    texts = Texts(documents)
    assert strings_by_document(texts.words("white_space")) == [d.split() for d in documents]
    assert strings_by_document(texts.words("word")) == [re.findall(r"\w+", d) for d in documents]
    assert strings_by_document(texts.words("word_punct")) == [
        re.findall(r"\w+|[^\w\s]+", d) for d in documents
    ]


@given(DOCUMENTS)
def test_lines_are_those_of_split(documents):
    texts = Texts(documents)
    assert strings_by_document(texts.lines("newline")) == [d.split("\n") for d in documents]
    by_hand = [[line.strip() for line in d.split("\n") if line.strip()] for d in documents]
    assert strings_by_document(texts.lines("filled")) == by_hand
    assert strings_by_document(texts.lines("paragraph")) == [re.split(r"\n{2,}", d) for d in documents]


@given(DOCUMENTS)
def test_segments_are_counted_as_by_hand(documents):
    texts = Texts(documents)
    lines = texts.lines()
    split = [d.split("\n") for d in documents]
    assert lines.lengths.tolist() == [len(line) for d in split for line in d]
    assert lines.total(lines.lengths).tolist() == [sum(map(len, d)) for d in split]
    assert lines.largest(lines.lengths).tolist() == [max(map(len, d)) for d in split]
    by_hand = [sum(c.isalpha() for c in line) for d in split for line in d]
    assert lines.count_in(texts.is_class("alphabetic")).tolist() == by_hand
    assert [chr(code) for code in lines.last] == [line[-1] if line else "\0" for d in split for line in d]
    assert [chr(code) for code in lines.first] == [line[0] if line else "\0" for d in split for line in d]
    words = texts.words()
    means = words.mean(words.lengths)
    for mean, document in zip(means, documents, strict=True):
        lengths = [len(word) for word in document.split()]
        assert mean == pytest.approx(sum(lengths) / len(lengths)) if lengths else numpy.isnan(mean)


@given(DOCUMENTS)
def test_equal_segments_and_no_others_share_a_hash(documents):
    texts = Texts(documents)
    for segments in (texts.words(), texts.lines(), texts.whole()):
        strings = segments.strings()
        assert len(set(segments.hashes.tolist())) == len(set(strings))
        assert len(set(zip(strings, segments.hashes.tolist(), strict=True))) == len(set(strings))
        assert segments.hashes.tolist() == hashes_of(strings).tolist()


@given(DOCUMENTS)
def test_duplicates_lie_in_one_document(documents):
    lines = Texts(documents).lines()
    duplicated, counts = [], []
    for document in documents:
        split = document.split("\n")
        duplicated += [line in split[:place] for place, line in enumerate(split)]
        counts += [Counter(split)[line] for line in split]
    assert lines.duplicated().tolist() == duplicated
    assert lines.counts_of().tolist() == counts


@given(DOCUMENTS, st.integers(1, 4))
def test_ngrams_are_neighbours_of_one_document(documents, n):
    texts = Texts(documents)
    grams = texts.words().ngrams(n)
    by_hand, members = [], []
    for document in documents:
        words = document.split()
        by_hand.append(len(range(len(words) - n + 1)))
        members += [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    assert grams.counts.tolist() == by_hand
    assert [tuple(gram.split()) for gram in grams.strings()] == members
    assert len(set(zip(members, grams.hashes.tolist(), strict=True))) == len(set(members))
    assert len(set(grams.hashes.tolist())) == len(set(members))


@settings(max_examples=20)
@given(st.integers(0, 3))
def test_a_hash_does_not_depend_on_the_place(blocks):
    filler = "x" * (blocks * 16384 + 7)
    assert (
        Texts([filler + " llama", "llama"]).words().hashes[1:].tolist() == hashes_of(["llama"] * 2).tolist()
    )


@given(DOCUMENTS)
def test_chosen_documents_and_matches(documents):
    texts = Texts(documents, languages=[str(n) for n in range(len(documents))])
    taken = texts.take([place for place in range(len(documents)) if place % 2])
    assert taken.texts == documents[1::2]
    assert taken.languages == texts.languages[1::2]
    pattern = re.compile(r"^a|b+$")
    assert strings_by_document(texts.found(pattern)) == [pattern.findall(d) for d in documents]


def test_words_among_a_list():
    words = Texts(["the llama and the puna", "a puna"]).words()
    assert words.total(words.among(hashes_of(["the", "and"]))).tolist() == [3, 0]


def test_an_unknown_kind_of_words_is_told_with_the_nearest():
    with pytest.raises(PunaError, match="did you mean 'white_space'"):
        Texts(["a"]).words("whitespace")
