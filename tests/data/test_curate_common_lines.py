"""Lines of many documents, and C4's duplicates: against the definitions, document by document."""

from __future__ import annotations

import re
import string
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from puna.data.curate.duplicates.in_memory import over_batches
from puna.data.curate.globals.c4_duplicates import sentences_of
from puna.data.curate.texts import Texts


def after(name, shards, **chosen):
    """Texts of all shards with what was cut left out, and one signal of each."""
    left, shares = [], []
    for shard, told in zip(shards, over_batches(name, map(Texts, shards), **chosen), strict=True):
        pieces = [list(text) for text in shard]
        if told.cut is not None:
            for document, start, end in zip(told.cut.document, told.cut.starts, told.cut.ends, strict=True):
                assert 0 <= start < end <= len(shard[document])
                pieces[document][start:end] = [""] * (end - start)
        left += ["".join(piece) for piece in pieces]
        shares += told.signals["share"].tolist()
    return left, shares


# Lines of many documents


def lines_by_hand(texts, documents, lower=False, ignore_special=False):
    def key(line):
        line = line.lower() if lower else line
        if ignore_special:
            line = re.sub(rf"\s+|\d+|[{re.escape(string.punctuation)}]", "", line)
        return line.strip()

    def stays(line):
        line = line.strip()
        return (
            len(line) < 2
            or set(line) <= set("{}[]();")
            or line.startswith("#")
            or re.match(r"\\(begin|end)\{", line)
            or re.fullmatch(r"</?[a-z][a-z0-9]*[^>]*>?", line, re.IGNORECASE)
        )

    counts = Counter(
        key_ for text in texts for key_ in {key(line) for line in text.split("\n") if not stays(line)}
    )
    return [
        "\n".join(line for line in text.split("\n") if stays(line) or counts[key(line)] <= documents)
        for text in texts
    ]


LINES = ["ab", " ab ", "AB", "ab 1", "x", "", "();", "# ab", "\\begin{ab}", "<b c>", "<b> ab", "ab.", "\tab"]
SHARDS = some.lists(
    some.lists(some.lists(some.sampled_from(LINES), max_size=5).map("\n".join), max_size=4), max_size=3
)


@settings(max_examples=150, deadline=None)
@given(SHARDS, some.integers(1, 3), some.booleans(), some.booleans())
def test_lines_of_many_documents_go_from_all(shards, documents, lower, ignore_special):
    chosen = {"documents": documents, "lower": lower, "ignore_special": ignore_special}
    left, _ = after("data_juicer.common_lines", shards, **chosen)
    assert left == lines_by_hand([text for shard in shards for text in shard], **chosen)


def test_a_line_goes_from_one_document_more_than_may_share_it():
    def page(number):
        return f"home about contact\nText of page {number}.\nall rights reserved"

    for copies, share in ((6, 0.0), (7, 2 / 3)):
        left, shares = after("data_juicer.common_lines", [[page(number) for number in range(copies)]])
        assert shares == pytest.approx([share] * copies)
        assert left[1] == (page(1) if copies == 6 else "Text of page 1.")


@pytest.mark.parametrize(
    ("line", "setting"),
    [
        ("(){};", "keep_brackets"),
        ("# Usage", "keep_headings"),
        ("\\end{x}", "keep_environments"),
        ("<br/>", "keep_tags"),
    ],
)
def test_lines_that_many_share_by_rights_stay_unless_told_otherwise(line, setting):
    shard = [f"{line}\nText {number}" for number in range(3)]
    for keep in (True, False):
        left, _ = after("data_juicer.common_lines", [shard], documents=1, **{setting: keep})
        assert left[0] == (shard[0] if keep else "Text 0")
    left, _ = after("data_juicer.common_lines", [["ab\nx", "ab\ny"]], documents=1, shortest=3)
    assert left == ["ab\nx", "ab\ny"]


# C4's spans of sentences, and lines


def sentences_by_hand(text):
    """Start and end of each sentence of a text."""
    found, at = [], 0
    for line in text.split("\n"):
        begin = 0
        for match in [*re.finditer(r"[.?!…]+[\"'”’»)\]]{0,2}(?=\s|$)", line), None]:
            end = len(line) if match is None else match.end()
            piece = line[begin:end]
            if piece.strip():
                left = len(piece) - len(piece.lstrip())
                found.append((at + begin + left, at + begin + left + len(piece.strip())))
            begin = end
        at += len(line) + 1
    return found


@settings(max_examples=200, deadline=None)
@given(some.lists(some.text('ab.?!"…) \n', max_size=25), max_size=4))
def test_sentences_are_those_of_the_definition(texts):
    batch = Texts(texts)
    found = sentences_of(batch)
    pairs = zip(
        found.starts - batch.bounds[found.document], found.ends - batch.bounds[found.document], strict=True
    )
    assert [(document, *pair) for document, pair in zip(found.document.tolist(), pairs, strict=True)] == [
        (document, *pair) for document, text in enumerate(texts) for pair in sentences_by_hand(text)
    ]


def spans_by_hand(texts, n):
    seen, left, shares = set(), [], []
    for text in texts:
        places, gone = sentences_by_hand(text), set()
        for at in range(len(places) - n + 1):
            span = tuple(text[a:b] for a, b in places[at : at + n])
            if span in seen:
                gone |= set(range(places[at][0], places[at + n - 1][1]))
            seen.add(span)
        left.append("".join(character for place, character in enumerate(text) if place not in gone))
        shares.append(len(gone) / len(text) if text else None)
    return left, shares


SENTENCES = ["A b.", "C?", "D e!", "F", "A b. ", " C?", "\n", "\n"]
PAGES = some.lists(
    some.lists(some.lists(some.sampled_from(SENTENCES), max_size=9).map(" ".join), max_size=3), max_size=3
)


@settings(max_examples=150, deadline=None)
@given(PAGES, some.integers(1, 3))
def test_all_but_the_first_of_a_span_go(shards, n):
    left, shares = after("c4.duplicate_spans", shards, sentences=n)
    expected, parts = spans_by_hand([text for shard in shards for text in shard], n)
    assert left == expected
    assert [share for share, part in zip(shares, parts, strict=True) if part is not None] == pytest.approx(
        [part for part in parts if part is not None]
    )


def test_two_sentences_are_no_span_of_three():
    first = "One here. Two here. Three here. Four here."
    left, shares = after(
        "c4.duplicate_spans", [[first], ["Two here. Three here. Five.", "Two here. Three here. Four here."]]
    )
    assert left == [first, "Two here. Three here. Five.", ""]
    assert shares == [0, 0, 1]


def c4_lines_by_hand(texts):
    seen, left = set(), []
    for text in texts:
        kept = []
        for line in text.split("\n"):
            key = line.lower().strip()
            if not key or key not in seen:
                kept.append(line)
            seen.add(key)
        left.append("\n".join(kept))
    return left


@settings(max_examples=150, deadline=None)
@given(SHARDS)
def test_all_but_the_first_of_a_line_go(shards):
    left, _ = after("c4.duplicate_lines", shards)
    assert left == c4_lines_by_hand([text for shard in shards for text in shard])
    assert after("c4.duplicate_lines", [["Menu\na", "b\nMENU"]]) == (["Menu\na", "b"], [0, 0.5])
