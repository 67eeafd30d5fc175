"""Evaluation sets that training text is checked against: their n-grams of words, and their texts.

Words are runs of word characters in lower case, so that punctuation and white space do not count, as GPT-3's
appendix C compares (arXiv:2005.14165). A text of fewer words than an n-gram, but not fewer than ``shortest``,
is one n-gram by itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from puna.core.errors import PunaError
from puna.data.corpus import Corpus
from puna.data.curate.learned.lookup import HashTable
from puna.data.curate.segments import Segments
from puna.data.curate.texts import Texts
from puna.data.kinds import texts_of


def words_of(texts: Texts) -> Segments:
    """The words that are compared."""
    return texts.lower.words("word")


def texts_in(path: str) -> Iterator[str]:
    """The texts of an evaluation set: a corpus, strings of a .jsonl file, or lines of a .txt file."""
    file = Path(path)
    if file.is_dir():
        corpus = Corpus.open(file)
        for row in corpus.rows():
            yield from texts_of(corpus.kind, row, system=False)
        return
    if file.suffix not in (".jsonl", ".txt"):
        raise PunaError(
            "not an evaluation set", where=path, expected="a corpus, a .jsonl file or a .txt file of lines"
        )
    try:
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if file.suffix == ".txt":
                    yield line.strip()
                    continue
                try:
                    yield from _strings(json.loads(line))
                except json.JSONDecodeError as error:
                    raise PunaError("not valid JSON", where=f"{path}, line {number}", found=error) from None
    except FileNotFoundError:
        raise PunaError("file not found", where=path) from None
    except UnicodeDecodeError as error:
        raise PunaError("not UTF-8", where=path, found=error) from None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for inside in value.values() if isinstance(value, dict) else value:
            yield from _strings(inside)


@dataclass(frozen=True)
class EvaluationSets:
    """Hashes of n-grams by their number of words, as tables; ``texts`` by the hash they begin with.

    Memory: about 40 bytes per n-gram, and the texts themselves.
    """

    tables: dict[int, HashTable]
    texts: dict[int, list[str]]

    @classmethod
    def read(cls, paths: tuple[str, ...], ngram: int, shortest: int) -> EvaluationSets:
        """All sets; one that holds no text of at least ``shortest`` words is an error."""
        hashes: dict[int, list[NDArray[numpy.uint64]]] = {}
        begins: dict[int, list[str]] = {}
        for path in paths:
            texts = Texts([text for text in texts_in(path) if text])
            words = words_of(texts)
            long = words.ngrams(ngram)
            hashes.setdefault(ngram, []).append(long.hashes)
            for size in range(min(shortest, ngram), ngram):
                exact = words.counts == size
                short = words.ngrams(size)
                hashes.setdefault(size, []).append(short.hashes[exact[short.document]])
            strings = words.strings()
            for document in numpy.flatnonzero(words.counts >= shortest).tolist():
                first, last = words.bounds[document], words.bounds[document + 1]
                size = min(int(last - first), ngram)
                begin = Texts([" ".join(strings[first : first + size])])
                key = int(words_of(begin).ngrams(size).hashes[0])
                begins.setdefault(key, []).append(" ".join(strings[first:last]))
            if not (words.counts >= shortest).any():
                raise PunaError(
                    "no text of the evaluation set is long enough to be looked for",
                    where=path,
                    expected=f"a text of at least {shortest} words",
                )
        tables = {size: HashTable(numpy.unique(numpy.concatenate(found))) for size, found in hashes.items()}
        return cls({size: table for size, table in tables.items() if len(table.keys)}, begins)

    def found(self, texts: Texts) -> Segments:
        """The runs of words of a batch that an evaluation set holds, longer n-grams first."""
        words = words_of(texts)
        runs: list[Segments] = []
        for size, table in sorted(self.tables.items(), reverse=True):
            candidates = words.ngrams(size)
            known = table.places(candidates.hashes) >= 0
            runs.append(candidates.where(known))
        starts, ends, document, hashes = (
            numpy.concatenate([getattr(run, name) for run in runs])
            for name in ("starts", "ends", "document", "hashes")
        )
        order = numpy.argsort(starts, kind="stable")
        return Segments(words.texts, starts[order], ends[order], document[order], hashes[order])
