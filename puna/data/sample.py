"""A part of a corpus, drawn by seed or from its beginning, so that several stages learn from equally much."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.core.errors import PunaError
from puna.core.seeds import numpy_generator
from puna.data.corpus import Corpus, write_corpus
from puna.data.kinds import texts_of
from puna.data.ledger import Ledger
from puna.data.settings import SampleParameters
from puna.text.encode import encode_document

if TYPE_CHECKING:
    from puna.text.tokenizer import Tokenizer

STEP = "sample"
_SHORTEST = 8  # tokens: a beginning of fewer is no document, and not every number below this can be met


@dataclass(frozen=True)
class Sample:
    """What was drawn, all other rows if there are any, and the tokens drawn where they were counted."""

    corpus: Corpus
    rest: Corpus | None
    tokens: int | None


def draw_sample(
    source: Corpus,
    parameters: SampleParameters,
    out: Path,
    *,
    seed: int,
    tokenizer: Tokenizer | None = None,
) -> Sample:
    """Write the drawn rows of ``source`` into ``out``/corpus, the others into ``out``/rest, in their order.

    Rows are taken in a random order, or their own, until the next would pass ``bytes`` or ``rows``; at least
    one is kept. Sizes are UTF-8 bytes of the rows' texts. The row that would pass ``tokens`` is cut. Memory
    holds one number per row.
    """
    if parameters.tokens is not None and (tokenizer is None or source.kind != "documents"):
        raise PunaError(
            "tokens of a sample are those of documents under a tokenizer",
            where="sample, tokens",
            found=f"a corpus of {source.kind}{'' if tokenizer else ' and no tokenizer'}",
            fix="give the stage an input tokenizer, or say bytes or rows",
        )
    if parameters.tokens is None and tokenizer is not None:
        raise PunaError("the tokenizer counts nothing", where="sample", fix="say how many tokens are drawn")
    rows = list(_sizes(source, tokenizer))
    order = range(len(rows)) if parameters.take == "first" else _permuted(seed, len(rows))
    kept: dict[int, str | None] = {}
    used = counted = 0
    for place in order:
        size, tokens = rows[place]
        over_bytes = parameters.bytes is not None and used + size > parameters.bytes
        over_rows = parameters.rows is not None and len(kept) >= parameters.rows
        if kept and (over_bytes or over_rows):
            break
        room = math.inf if parameters.tokens is None else parameters.tokens - counted
        if tokens > room and room < _SHORTEST and kept:  # too little for a document: the last one makes room
            last, _ = kept.popitem()
            used, counted, room = used - rows[last][0], counted - rows[last][1], room + rows[last][1]
        if tokens > room:
            assert tokenizer is not None
            text, beginning = _beginning(_text_at(source, place), int(room), tokenizer)
            kept[place] = text
            counted += beginning
            break
        kept[place] = None
        used += size
        counted += tokens
    others = dict.fromkeys(place for place in range(len(rows)) if place not in kept)
    return Sample(
        _written(source, kept, out / "corpus", "not drawn"),
        _written(source, others, out / "rest", "drawn") if others else None,
        counted if tokenizer else None,
    )


def _written(source: Corpus, kept: Mapping[int, str | None], out: Path, reason: str) -> Corpus:
    """The kept rows as a corpus, with another text where there is one; ``reason`` is told of the others."""
    ledger = Ledger()
    rows = _chosen(source, kept, ledger, reason)
    return write_corpus(out, source.kind, rows, provenance=source.meta["provenance"], ledger=ledger)


def _permuted(seed: int, count: int) -> list[int]:
    order: list[int] = numpy_generator(seed, "sample").permutation(count).tolist()
    return order


def _sizes(source: Corpus, tokenizer: Tokenizer | None) -> Iterator[tuple[int, int]]:
    """Bytes and tokens of each row; no tokens without a tokenizer."""
    for row in source.rows():
        size = sum(len(text.encode()) for text in texts_of(source.kind, row))
        yield size, len(encode_document(tokenizer, row["text"])) if tokenizer else 0


def _text_at(source: Corpus, place: int) -> str:
    found: str = next(row["text"] for number, row in enumerate(source.rows()) if number == place)
    return found


def _beginning(text: str, room: int, tokenizer: Tokenizer) -> tuple[str, int]:
    """The longest beginning of a document that takes ``room`` tokens, or else nearly so many; and its tokens.

    A beginning may be split otherwise than the whole, so that characters are added one by one near the end.
    """
    low, high = 1, len(text)
    while low < high:  # tokens grow with characters, but for steps of one or two back
        middle = (low + high) // 2
        if len(encode_document(tokenizer, text[:middle])) < room:
            low = middle + 1
        else:
            high = middle
    near = range(max(1, low - 20), min(len(text), low + 20) + 1)
    fitting = [(len(encode_document(tokenizer, text[:end])), end) for end in near]
    fitting = [pair for pair in fitting if pair[0] <= room]
    if not fitting:
        raise PunaError("so few tokens hold no beginning of a document", where="sample, tokens", found=room)
    tokens, end = max(fitting)
    return text[:end], tokens


def _chosen(
    source: Corpus, kept: Mapping[int, str | None], ledger: Ledger, reason: str
) -> Iterator[dict[str, Any]]:
    tally = ledger.step(STEP, "rows")
    for place, row in enumerate(source.rows()):
        if place in kept:
            tally.keep()
            text = kept[place]
            yield row if text is None else {**row, "text": text}
        else:
            tally.drop(reason)
