"""A part of a corpus, drawn by seed, so that several stages learn from the same number of bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from puna.core.seeds import numpy_generator
from puna.data.corpus import Corpus, write_corpus
from puna.data.kinds import texts_of
from puna.data.ledger import Ledger
from puna.data.settings import SampleParameters

STEP = "sample"


def draw_sample(source: Corpus, parameters: SampleParameters, out: Path, *, seed: int) -> Corpus:
    """Write the drawn rows of ``source`` into ``out``, in the order they had.

    Rows are taken in a random order until the next would pass ``bytes`` or ``rows``; at least one is
    kept. Sizes are UTF-8 bytes of the rows' texts. Memory holds one number per row.
    """
    sizes = [_size(source, row) for row in source.rows()]
    kept: set[int] = set()
    used = 0
    for place in numpy_generator(seed, "sample").permutation(len(sizes)):
        over_bytes = parameters.bytes is not None and used + sizes[place] > parameters.bytes
        over_rows = parameters.rows is not None and len(kept) >= parameters.rows
        if kept and (over_bytes or over_rows):
            break
        kept.add(int(place))
        used += sizes[place]
    ledger = Ledger()
    rows = _chosen(source, kept, ledger)
    return write_corpus(out, source.kind, rows, provenance=source.meta["provenance"], ledger=ledger)


def _size(source: Corpus, row: dict[str, Any]) -> int:
    return sum(len(text.encode()) for text in texts_of(source.kind, row))


def _chosen(source: Corpus, kept: set[int], ledger: Ledger) -> Iterator[dict[str, Any]]:
    tally = ledger.step(STEP, "rows")
    for place, row in enumerate(source.rows()):
        if place in kept:
            tally.keep()
            yield row
        else:
            tally.drop("not drawn")
