"""Calibration text: rows of equally many tokens out of a corpus of documents, drawn by the seed.

Conversations serve too: they stay whole, several in a row where they fit, and of their tokens answers count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.core.errors import PunaError
from puna.core.seeds import numpy_generator
from puna.data.corpus import Corpus
from puna.text.encode import Encoded, encode_rows
from puna.text.packing import Batch, Row, collate, pack, usual_mode

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
    """``rows`` rows of ``length`` tokens, of conversations at most so many, ``batch_rows`` in a batch.

    Documents come in an order drawn by the seed and are laid end to end; what is left of the last is not
    read. ``wanted`` says by its id whether a row is one to draw from. A corpus that is too small, or of
    another kind, is an error.
    """
    opened = Corpus.open(corpus)
    if opened.kind not in ("documents", "messages"):
        raise PunaError(
            "calibration reads a corpus of documents or messages",
            where=corpus,
            found=f"a corpus of {opened.kind}",
        )
    drawn = [row for row in opened.rows() if wanted(row["id"])]
    packed = _pack(model, drawn, opened.kind, rows, length, seed)
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


def _pack(
    model: Llama, found: list[dict[str, Any]], kind: str, rows: int, length: int, seed: int
) -> list[Row]:
    """Rows of enough documents, or conversations; only those are encoded."""
    order = numpy_generator(seed, "calibration").permutation(len(found))
    chosen: list[Encoded] = []
    tokens = 0
    mode = usual_mode(kind)
    for encoded in _encoded(model, [found[int(place)] for place in order], kind):
        chosen.append(encoded)
        tokens += len(encoded)
        if tokens >= (rows + 1) * length * (2 if mode == "fit" else 1):  # whole ones leave rows half empty
            break
    packed = pack(chosen, length, mode=mode)
    return [row for row in packed if mode == "fit" or row.tokens == length]


def _encoded(model: Llama, rows: list[dict[str, Any]], kind: str) -> Iterator[Encoded]:
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise PunaError("the model has no tokenizer", where=model.source, fix="put tokenizer.json beside it")
    for row in rows:
        yield from encode_rows([row], kind, tokenizer, model.template)
