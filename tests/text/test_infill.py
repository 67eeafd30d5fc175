"""Fill in the middle: whatever the cuts, the document comes back; torn tokens, empty parts, mistakes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.text.encode import encode_documents, encode_rows
from puna.text.infill import Markers, order_of, permute, places, restore

MARKERS = Markers("<P>", "<S>", "<M>")


@given(
    text=st.text(max_size=60),
    cuts=st.tuples(st.integers(0, 60), st.integers(0, 60)),
    order=st.sampled_from(["psm", "spm"]),
)
def test_a_document_comes_back_to_the_character(text: str, cuts: tuple[int, int], order: Any) -> None:
    first, second = sorted(min(cut, len(text)) for cut in cuts)
    if MARKERS.found_in(text):
        return
    made = permute(text, (first, second), order, MARKERS)
    assert restore(made, MARKERS) == text and len(made) == len(text) + 9
    assert order_of(made, MARKERS) == ("spm" if order == "spm" or first == 0 else "psm")
    assert restore(text, MARKERS) == text and order_of(text, MARKERS) is None


def test_both_orders_as_they_are_written() -> None:
    assert permute("abcdef", (2, 4), "psm", MARKERS) == "<P>ab<S>ef<M>cd"
    assert permute("abcdef", (2, 4), "spm", MARKERS) == "<P><S>ef<M>abcd"
    assert places("<P>ab<S>", ["<P>", "<S>"]) == [(0, 3), (5, 8)]


def test_texts_that_cannot_be_undone_are_refused() -> None:
    with pytest.raises(PunaError, match="the text holds a marker"):
        permute("a<M>b", (1, 2), "psm", MARKERS)
    with pytest.raises(PunaError, match="cuts lie in the text"):
        permute("abc", (2, 1), "psm", MARKERS)
    with pytest.raises(PunaError, match="not those of one document"):
        restore("<P>a<S>b<M>c<P>d<S>e<M>f", MARKERS)
    with pytest.raises(PunaError, match="not those of one document"):
        restore("a<P>b<S>c<M>d", MARKERS)
    with pytest.raises(PunaError, match="three different markers"):
        Markers("<P>", "<P>", "<M>")


def test_parts_between_markers_are_encoded_by_themselves(tiny_tokenizer: Any) -> None:
    markers = ("<pad>", "<|end|>")
    text = "the c<pad>at sat<|end|>on"
    (plain,) = encode_documents(tiny_tokenizer, [("a", text)])
    (marked,) = encode_documents(tiny_tokenizer, [("a", text)], markers)
    pad, end = (tiny_tokenizer.id_of(marker) for marker in markers)
    assert pad not in plain.ids and marked.ids.count(pad) == marked.ids.count(end) == 1
    inner = marked.ids[1:-1]  # without BOS and EOS
    parts = [
        inner[: inner.index(pad)],
        inner[inner.index(pad) + 1 : inner.index(end)],
        inner[inner.index(end) + 1 :],
    ]
    assert parts == [tiny_tokenizer.encode(part) for part in ("the c", "at sat", "on")]
    assert marked.trained == [False] + [True] * (len(marked) - 1)
    rows = [{"id": "a", "text": text}]
    assert encode_rows(rows, "documents", tiny_tokenizer, markers=markers) == [marked]
    assert encode_documents(tiny_tokenizer, [("a", "no marks")], markers) == encode_documents(
        tiny_tokenizer, [("a", "no marks")]
    )
    with pytest.raises(PunaError, match="no special token of this tokenizer"):
        encode_documents(tiny_tokenizer, [("a", text)], ["<fim>"])
