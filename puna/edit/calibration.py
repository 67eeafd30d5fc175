"""Calibration text: rows of equally many tokens out of a corpus of documents, drawn by the seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from puna.core.errors import PunaError
from puna.core.seeds import numpy_generator
from puna.data.corpus import Corpus
from puna.text.encode import Encoded, encode_document
from puna.text.packing import Batch, Row, collate, pack

if TYPE_CHECKING:
    from puna.model.llama import Llama


def calibration_batches(
    model: Llama,
    corpus: Path | str,
    *,
    rows: int,
    length: int,
    batch_rows: int,
    seed: int,
    wanted: Callable[[str], bool] = lambda _name: True,
) -> list[Batch]:
    """``rows`` rows of ``length`` tokens, ``batch_rows`` in a batch.

    Documents come in an order drawn by the seed and are laid end to end; what is left of the last is not
    read. ``wanted`` says by its id whether a document is one to draw from. A corpus that is too small, or
    not of documents, is an error.
    """
    opened = Corpus.open(corpus)
    if opened.kind != "documents":
        raise PunaError(
            "calibration reads a corpus of documents", where=corpus, found=f"a corpus of {opened.kind}"
        )
    texts = [(row["text"], row["id"]) for row in opened.rows() if wanted(row["id"])]
    packed = _pack(model, texts, rows, length, seed)
    if len(packed) < rows:
        raise PunaError(
            "the corpus is too small for so much calibration text",
            where=corpus,
            found=f"{sum(row.tokens for row in packed):,} tokens",
            expected=f"{rows:,} rows of {length:,} tokens",
            fix="fewer or shorter rows, or more text",
        )
    chosen = packed[:rows]
    return [collate(chosen[start : start + batch_rows]) for start in range(0, rows, batch_rows)]


def _pack(model: Llama, texts: list[tuple[str, str]], rows: int, length: int, seed: int) -> list[Row]:
    """Whole rows of enough documents; only those documents are encoded."""
    order = numpy_generator(seed, "calibration").permutation(len(texts))
    chosen: list[Encoded] = []
    tokens = 0
    for encoded in _encoded(model, [texts[int(place)] for place in order]):
        chosen.append(encoded)
        tokens += len(encoded)
        if tokens >= (rows + 1) * length:
            break
    return [row for row in pack(chosen, length, mode="wrap") if row.tokens == length]


def _encoded(model: Llama, texts: list[tuple[str, str]]) -> Iterator[Encoded]:
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise PunaError("the model has no tokenizer", where=model.source, fix="put tokenizer.json beside it")
    for text, name in texts:
        yield encode_document(tokenizer, text, source=name)
