"""Batches of equally long rows out of a corpus of documents, without end and in bounded memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from puna.core.errors import PunaError
from puna.core.seeds import numpy_generator
from puna.data.corpus import Corpus
from puna.text.encode import encode_documents
from puna.text.packing import Batch, Row, collate, pack

if TYPE_CHECKING:
    from puna.model.llama import Llama

_AT_ONCE = 512  # documents that are held, and drawn in turn


def text_stream(model: Llama, corpus: Path | str, *, rows: int, length: int, seed: int) -> Iterator[Batch]:
    """Batches of ``rows`` rows of ``length`` tokens, again from the beginning when the corpus ends.

    Documents are drawn by the seed among 512 neighbours and laid end to end; what is left of the last row of
    those is not read in that pass. A corpus of other rows, or with less than one batch, is an error.
    """
    opened = Corpus.open(corpus, kind="documents")
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise PunaError("the model has no tokenizer", where=model.source, fix="put tokenizer.json beside it")
    for epoch in itertools.count():
        waiting: list[Row] = []
        batches = 0
        for number, documents in enumerate(_neighbours(opened)):
            order = numpy_generator(seed, "text stream", epoch, number).permutation(len(documents))
            encoded = encode_documents(tokenizer, [documents[int(place)] for place in order])
            waiting += [row for row in pack(encoded, length, mode="wrap") if row.tokens == length]
            while len(waiting) >= rows:
                yield collate(waiting[:rows])
                del waiting[:rows]
                batches += 1
        if not batches:
            raise PunaError(
                "the corpus is too small for one batch",
                where=corpus,
                found=f"{len(waiting)} rows of {length} tokens",
                expected=f"at least {rows}",
                fix="fewer or shorter rows, or more text",
            )


def _neighbours(corpus: Corpus) -> Iterator[list[tuple[str, str]]]:
    rows = ((row["text"], row["id"]) for row in corpus.rows())
    while documents := list(itertools.islice(rows, _AT_ONCE)):
        yield documents
