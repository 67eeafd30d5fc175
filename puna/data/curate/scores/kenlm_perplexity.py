"""S50, S52: perplexity under an n-gram model that KenLM reads, arXiv:1911.00359 (CCNet).

10 to the power of minus log10 p, by the number of tokens and lines: every line is a sentence, whose end is
one token more, as CCNet and Data-Juicer count. Tokens are words, or the pieces of a tokenizer. No model comes
with puna: those of CCNet are for the pieces of its own SentencePiece models, in lower case, with digits as 0
and without accents; a text that is not prepared as the model's was has a meaningless perplexity. KenLM's
package reads models (ARPA files and its own binary ones); its programs, which are not in the package, make
them. Lines are scored one by one, by the library.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy

from puna.core.errors import PunaError
from puna.core.stage import Parameters
from puna.data.curate.operator import Signals, score
from puna.data.curate.texts import Texts


class PerplexitySettings(Parameters):
    """Settings of perplexity."""

    model: str
    """File of the model: ARPA, or KenLM's binary form."""
    tokenizer: str | None = None
    """A tokenizer.json whose pieces are the model's tokens; none: words between white space."""


@lru_cache(maxsize=2)
def _model(path: str, stamp: int) -> Any:
    try:
        import kenlm
    except ImportError:
        raise PunaError(
            "KenLM is needed here",
            where="package ufal-kenlm",
            found="it is not installed",
            fix="pip install 'puna[curate]'",
        ) from None
    config = kenlm.Config()
    config.show_progress = False
    try:
        return kenlm.Model(path, config)
    except OSError as error:
        raise PunaError("not a model that KenLM reads", where=path, found=error) from None


@lru_cache(maxsize=2)
def _tokenizer(path: str) -> Any:
    from tokenizers import Tokenizer

    if not Path(path).is_file():
        raise PunaError("file not found", where=path)
    try:
        return Tokenizer.from_file(path)
    except Exception as error:
        raise PunaError("not a tokenizer.json", where=path, found=error) from None


def _tokens(lines: Sequence[str], tokenizer: str | None) -> list[list[str]]:
    if tokenizer is None:
        return [line.split() for line in lines]
    encoded = _tokenizer(tokenizer).encode_batch(list(lines), add_special_tokens=False)
    return [" ".join(one.tokens).split() for one in encoded]  # A piece of white space is none to KenLM.


@score(
    "kenlm.perplexity",
    settings=PerplexitySettings,
    signals={"perplexity": "perplexity of a token or line's end; null for a document without a token"},
    source="arXiv:1911.00359",
)
def perplexity(texts: Texts, settings: PerplexitySettings) -> Signals:
    """Perplexity of a document under an n-gram model."""
    file = Path(settings.model)
    if not file.is_file():
        raise PunaError(
            "file not found", where=file, fix="settings.kenlm.perplexity.model is a file of KenLM's"
        )
    model = _model(settings.model, file.stat().st_mtime_ns)
    result = numpy.full(texts.count, numpy.nan)
    for place, text in enumerate(texts.texts):
        lines = _tokens(text.split("\n"), settings.tokenizer)
        tokens = sum(map(len, lines))
        if tokens:
            logarithm = sum(model.score(" ".join(line)) for line in lines)
            result[place] = 10.0 ** (-logarithm / (tokens + len(lines)))
    return {"perplexity": result}
