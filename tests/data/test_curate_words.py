"""Words by Unicode's boundaries and fastText's, and strings that are looked for in a batch."""

from __future__ import annotations

import re

import regex
from curate_texts import DOCUMENTS
from hypothesis import given
from hypothesis import strategies as st

from puna.data.curate import boundaries, matching  # noqa: F401  (boundaries registers kinds of words)
from puna.data.curate.texts import Texts

_CHARACTERS = st.sampled_from("ab'’.,:;_1２3\"א ש\n\r é\u0301\u200d😀カタひ漢 -")


def by_document(segments):
    strings = segments.strings()
    return [strings[a:b] for a, b in zip(segments.bounds, segments.bounds[1:], strict=False)]


@given(st.lists(st.one_of(st.text(_CHARACTERS, max_size=15), st.text(max_size=10)), max_size=5))
def test_words_by_unicodes_boundaries(documents):
    boundary = regex.compile(r"(?wV1)\b")
    by_hand = [[word for word in boundary.split(text) if word[:1].isalnum()] for text in documents]
    assert by_document(Texts(documents).words("unicode")) == by_hand


def test_a_word_ends_with_its_document():
    # One text after another reads a'b and 1.2; each text alone does not.
    assert by_document(Texts(["a'", "b", "1.", "2"]).words("unicode")) == [["a"], ["b"], ["1"], ["2"]]


@given(DOCUMENTS)
def test_fasttexts_words_part_at_ascii_white_space(documents):
    by_hand = [[word for word in re.split("[ \n\r\t\v\f\0]+", text) if word] for text in documents]
    assert by_document(Texts(documents).words("fasttext")) == by_hand


@given(DOCUMENTS)
def test_strings_are_found_where_str_finds_them(documents):
    texts = Texts(documents)
    strings = ("...", "…", "the", "3 likes")
    assert matching.occurrences(texts, *strings).tolist() == [sum(map(d.count, strings)) for d in documents]
    lines = texts.lines("newline")
    assert matching.begins_with(lines, strings).tolist() == [s.startswith(strings) for s in lines.strings()]
    assert matching.ends_with(lines, strings).tolist() == [s.endswith(strings) for s in lines.strings()]
    words = texts.words("white_space")
    digits = matching.any_in(words, texts.is_class("digit"))
    assert digits.tolist() == [any(map(str.isdigit, word)) for word in words.strings()]
    assert matching.kinds_of(words, strings).tolist() == [len({*strings} & {*d.split()}) for d in documents]
