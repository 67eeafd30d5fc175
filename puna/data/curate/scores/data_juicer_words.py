"""Data-Juicer's scores of words (S50, arXiv:2309.02033): counts, repetition, stop words, flagged words.

Words are what stands between spaces, tabs and line breaks, without special characters at their ends;
for all but the count they are made lower case first. With a ``tokenizer`` they are a tokenizer's pieces
instead (Data-Juicer's ``tokenization: true``, which has SentencePiece models of its own; pieces are seen
here as the characters they cover, so that the mark of a word's beginning is never part of them). Lists of
words are the user's files: none comes with puna.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy
import pydantic
from numpy.typing import NDArray

from puna.core.stage import Parameters
from puna.data.curate.counting import word_ngrams
from puna.data.curate.operator import Signals, score
from puna.data.curate.scores.data_juicer_characters import SOURCE, or_zero
from puna.data.curate.segments import Segments
from puna.data.curate.texts import Texts, words
from puna.data.curate.tokens import token_segments
from puna.data.curate.wordlists import hashes_of_list


class WordSettings(Parameters):
    """What words are."""

    tokenizer: str | None = None
    """Tokenizer whose pieces are the words: a file tokenizer.json, a model's folder or an asset. Null: words
    are what stands between spaces, tabs and line breaks."""


class WordRepetitionSettings(WordSettings):
    """What words are, and how many make an n-gram."""

    n: pydantic.PositiveInt = 10
    """Words of an n-gram."""


class WordListSettings(WordSettings):
    """A list of words."""

    words: str | None = None
    """File with one word a line, a JSON file (a list of words, or lists by language), or an asset. Null:
    there is no list, and the ratio is null."""
    language: str | None = None
    """Which list of a JSON file with lists by language; "all" for all of them."""
    groups: list[pydantic.PositiveInt] = pydantic.Field(default_factory=list)
    """Numbers of neighbouring words that count as words too, joined: for Chinese or Vietnamese."""
    join: str = ""
    """What groups are joined by."""


@words("data_juicer")
def _words(texts: Texts) -> Segments:
    """What stands between spaces, tabs and line breaks, without special characters at its ends."""
    return _refined(texts.runs(~texts.is_class("data_juicer_separator")))


@words("without_punctuation")
def _without_punctuation(texts: Texts) -> Segments:
    r"""What spaces part once Unicode's punctuation is taken out: members of Data-Juicer's SimHash."""
    bare = texts.shared(("view", "without punctuation"), _bare)
    return bare.runs(bare.codes != ord(" "))


def _bare(texts: Texts) -> Texts:
    kept = ~texts.is_class("unicode_punctuation")
    joined = texts.codes[kept].tobytes().decode("utf-32-le", "surrogatepass")
    bounds = numpy.concatenate([[0], numpy.cumsum(texts.total(kept))]).tolist()
    return Texts([joined[first:last] for first, last in pairwise(bounds)])


def _refined(found: Segments) -> Segments:
    stripped = found.stripped("data_juicer_special")
    return stripped.where(stripped.lengths > 0)


def _words_of(texts: Texts, tokenizer: str | None, *, lower: bool) -> Segments:
    """The words of a batch; lower case needs a view of it, whose places are its own."""
    if tokenizer is not None:
        # Tokens are those of the text as it is; what they cover is then lowered.
        pieces = token_segments(texts, tokenizer)
        return _refined(_lowered(pieces) if lower else pieces)
    return (texts.lower if lower else texts).words("data_juicer")


def _lowered(pieces: Segments) -> Segments:
    """Segments of a batch in lower case where that keeps places, else of a batch made of them alone."""
    lower = pieces.texts.lower
    if numpy.array_equal(lower.lengths, pieces.texts.lengths):
        return Segments(lower, pieces.starts, pieces.ends, pieces.document)
    strings = [piece.lower() for piece in pieces.strings()]
    bounds = pieces.bounds.tolist()
    joined = ["".join(strings[a:b]) for a, b in pairwise(bounds)]
    lengths = numpy.fromiter(map(len, strings), numpy.int64, len(strings))
    ends = numpy.cumsum(lengths)
    return Segments(Texts(joined), ends - lengths, ends, pieces.document)


@score("data_juicer.words", settings=WordSettings, signals={"count": "words"}, source=SOURCE)
def word_count(texts: Texts, settings: WordSettings) -> Signals:
    """Words of a document (``words_num_filter``)."""
    return {"count": _words_of(texts, settings.tokenizer, lower=False).counts}


@score(
    "data_juicer.word_repetition",
    settings=WordRepetitionSettings,
    signals={"ratio": "share of n-grams of words that occur more than once"},
    source=SOURCE,
)
def word_repetition(texts: Texts, settings: WordRepetitionSettings) -> Signals:
    """Share of a document's n-grams of words that occur more than once (``word_repetition_filter``)."""
    found = word_ngrams(_words_of(texts, settings.tokenizer, lower=True), settings.n)
    return {"ratio": or_zero(found.in_repeated(), found.total)}


@score(
    "data_juicer.stop_words",
    settings=WordListSettings,
    signals={"ratio": "words of the list by words, at most 1"},
    source=SOURCE,
)
def stop_words(texts: Texts, settings: WordListSettings) -> Signals:
    """Share of words that are on a list of stop words (``stopwords_filter``)."""
    return {"ratio": _listed(texts, settings)}


@score(
    "data_juicer.flagged_words",
    settings=WordListSettings,
    signals={"ratio": "words of the list by words, at most 1"},
    source=SOURCE,
)
def flagged_words(texts: Texts, settings: WordListSettings) -> Signals:
    """Share of words that are on a list of flagged words (``flagged_words_filter``)."""
    return {"ratio": _listed(texts, settings)}


def _listed(texts: Texts, settings: WordListSettings) -> NDArray[numpy.float64]:
    if settings.words is None:
        return numpy.full(texts.count, numpy.nan)
    found = _words_of(texts, settings.tokenizer, lower=True)
    listed = hashes_of_list(Path(settings.words), settings.language)
    part, whole = found.total(found.among(listed)), found.counts
    for size in settings.groups:
        grouped = _grouped(found, size, settings.join)
        part = part + grouped.total(grouped.among(listed))
        whole = whole + grouped.counts
    return numpy.minimum(or_zero(part, whole), 1.0)


def _grouped(found: Segments, size: int, join: str) -> Segments:
    """Every run of ``size`` words of a document, joined, as segments of a batch of their own."""
    strings = found.strings()
    ngrams = found.ngrams(size)
    first = numpy.searchsorted(found.starts, ngrams.starts).tolist()
    texts = [join.join(strings[place : place + size]) for place in first]
    whole = Texts(texts).whole()
    return Segments(found.texts, ngrams.starts, ngrams.ends, ngrams.document, whole.hashes)
