"""Tokens of a batch, by any tokenizer that the library ``tokenizers`` opens."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from puna.core.errors import PunaError
from puna.data.curate.segments import Segments
from puna.data.curate.texts import Texts


def token_segments(texts: Texts, tokenizer: str) -> Segments:
    """The characters that each token covers, without special tokens; tokens that cover none are left out.

    ``tokenizer`` is a file ``tokenizer.json``, a model's folder, or an asset. Several tokens of one
    character (bytes of it) each cover it.
    """
    return texts.shared(("tokens", tokenizer), lambda batch: _segments(batch, tokenizer))


def token_counts(texts: Texts, tokenizer: str) -> NDArray[numpy.int64]:
    """[count] tokens of each document, without special ones."""
    encoded = texts.shared(("encoded", tokenizer), lambda batch: _encoded(batch, tokenizer))
    return numpy.fromiter((len(one.ids) for one in encoded), numpy.int64, texts.count)


def _segments(texts: Texts, tokenizer: str) -> Segments:
    encoded = texts.shared(("encoded", tokenizer), lambda batch: _encoded(batch, tokenizer))
    sizes = numpy.fromiter((len(one.offsets) for one in encoded), numpy.int64, texts.count)
    offsets = [pair for one in encoded for pair in one.offsets]
    places = numpy.array(offsets, dtype=numpy.int64).reshape(-1, 2)
    document = numpy.repeat(numpy.arange(texts.count), sizes)
    places += texts.bounds[document][:, None]
    found = Segments(texts, places[:, 0], places[:, 1], document)
    return found.where(found.lengths > 0)


def _encoded(texts: Texts, tokenizer: str) -> list[Any]:
    # A batch is encoded on one core: shards are what is worked on in parallel.
    previous = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        return list(_opened(tokenizer).encode_batch(texts.texts, add_special_tokens=False))
    finally:
        if previous is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = previous


@lru_cache(maxsize=4)
def _opened(name: str) -> Any:
    path = Path(name)
    if path.is_file() and path.suffix == ".json":
        from tokenizers import Tokenizer

        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # The library raises plain Exception.
            raise PunaError("not a tokenizer", where=path, found=error) from None
    from puna.text.pretrained import locate, read_tokenizer

    tokenizer = read_tokenizer(locate(name))
    if tokenizer is None:
        raise PunaError("no tokenizer stands beside this model", where=name)
    return tokenizer.core
