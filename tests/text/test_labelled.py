"""Labelled rows as tokens: where a label stands, and that it comes through packing where it was."""

from __future__ import annotations

from typing import Any

import pytest

from puna.core.errors import PunaError
from puna.text.encode import IGNORED
from puna.text.labelled import encode_labelled
from puna.text.packing import collate, pack

NAMES = ("B-CAT", "I-CAT", "O")


def words(row: str, labels: str) -> dict[str, Any]:
    return {"id": row, "words": row.split(), "labels": labels.split()}


def test_a_word_is_labelled_at_its_first_token_and_is_the_same_tokens_everywhere(tiny_tokenizer: Any) -> None:
    row = words("the zebra the", "O B-CAT O")
    (found,) = encode_labelled([row], "labelled_words", tiny_tokenizer, NAMES)
    assert found.ids[0] == tiny_tokenizer.bos_id and found.labels is not None and found.labels[0] == IGNORED
    the = tiny_tokenizer.encode_continuation(" the")
    zebra = tiny_tokenizer.encode_continuation(" zebra")
    assert len(zebra) > 1, "the test needs a word of several tokens"
    assert found.ids[1:] == [*the, *zebra, *the]
    expected = [2] + [IGNORED] * (len(the) - 1) + [0] + [IGNORED] * (len(zebra) - 1)
    assert found.labels[1:] == [*expected, 2] + [IGNORED] * (len(the) - 1)
    assert found.trained == [label != IGNORED for label in found.labels]


def test_a_text_has_its_label_at_its_first_token(tiny_tokenizer: Any) -> None:
    row = {"id": "1", "text": "the cat sat", "label": "good"}
    (found,) = encode_labelled([row], "labelled_texts", tiny_tokenizer, ("bad", "good"))
    assert found.ids == [tiny_tokenizer.bos_id, *tiny_tokenizer.encode("the cat sat")]
    assert found.labels == [1] + [IGNORED] * (len(found.ids) - 1)


def test_a_label_of_another_model_is_said(tiny_tokenizer: Any) -> None:
    with pytest.raises(PunaError, match=r"row the cat: a label[^~]*B-DOG[^~]*B-CAT, I-CAT, O"):
        encode_labelled([words("the cat", "O B-DOG")], "labelled_words", tiny_tokenizer, NAMES)


def test_labels_stay_at_their_tokens_in_packed_rows(tiny_tokenizer: Any) -> None:
    """Of text the label is the next token; these stand where they are, the first and the last token's too."""
    tiny_tokenizer = tiny_tokenizer.with_stop_tokens([])
    rows = [words("a b c", "B-CAT I-CAT O"), words("d", "O")]
    encoded = encode_labelled(rows, "labelled_words", tiny_tokenizer, NAMES)
    packed = pack(encoded, 64, mode="fit")
    assert packed.report.targets == 4 and len(packed) == 1
    batch = collate(packed)
    assert batch.targets == 4
    for segment, each in enumerate(encoded):
        assert batch.labels[batch.segments == segment].tolist() == each.labels
        assert batch.input_ids[batch.segments == segment].tolist() == each.ids
    cut = pack(encoded[:1], 4, mode="fit")
    assert cut.report.truncated == len(encoded[0]) - 4
    assert cut.report.targets == sum(encoded[0].trained[:4])
