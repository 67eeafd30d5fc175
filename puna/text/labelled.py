"""Labelled texts and words as token ids, each with the number of its label or none.

A text's label stands at its first token, which is never cut off; which states it is learnt from is the
model's affair. A word's label stands at the word's first token, its other tokens have none. Every word is
encoded with the space before it, the first one too, as S75 does (``add_prefix_space``), so that a word is the
same tokens wherever it stands.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from puna.core.errors import PunaError
from puna.text.encode import IGNORED, Encoded
from puna.text.tokenizer import Tokenizer

LABELLED = ("labelled_texts", "labelled_words")
"""The kinds of corpora whose rows have labels."""


def names_in(rows: Iterable[Mapping[str, Any]], kind: str) -> list[str]:
    """The labels that rows have, sorted."""
    per_row = ([row["label"]] if kind == "labelled_texts" else row["labels"] for row in rows)
    return sorted({label for labels in per_row for label in labels})


def encode_labelled(
    rows: Iterable[Mapping[str, Any]], kind: str, tokenizer: Tokenizer, names: Sequence[str]
) -> list[Encoded]:
    """Rows of a corpus of ``labelled_texts`` or ``labelled_words``; ``names`` are the labels by number.

    A BOS stands in front if the tokenizer adds one, no EOS behind. A label that is not among the names is a
    :class:`PunaError`.
    """
    numbers = {name: number for number, name in enumerate(names)}
    bos = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    pieces = functools.cache(lambda word: tokenizer.encode_continuation(f" {word}"))
    found = []
    for row in rows:
        ids, labels = [*bos], [IGNORED] * len(bos)
        try:
            if kind == "labelled_texts":
                ids += tokenizer.encode(row["text"])
                labels = [numbers[row["label"]]] + [IGNORED] * (len(ids) - 1)
            else:
                for word, label in zip(row["words"], row["labels"], strict=True):
                    ids += pieces(word)
                    labels += [numbers[label]] + [IGNORED] * (len(ids) - len(labels) - 1)
        except KeyError as error:
            raise PunaError(
                "a label that the model does not know",
                where=f"row {row['id']}",
                found=error.args[0],
                expected=", ".join(names),
                fix="train on a corpus that has it, or leave such rows out",
            ) from None
        found.append(Encoded(ids, [label != IGNORED for label in labels], str(row["id"]), labels))
    return found
