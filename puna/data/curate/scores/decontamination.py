"""S33, S52: what documents share with evaluation sets, as in GPT-3, arXiv:2005.14165, appendix C.

Runs of 13 words in common, without case, punctuation and white space; a text of an evaluation set of 8 to 12
words counts as a whole. Whole texts are looked for as well. Simplified: GPT-3 leaves runs out that more than
ten training documents hold, since these are set phrases; that takes a pass over the whole corpus.
"""

from __future__ import annotations

from functools import lru_cache

import numpy
from numpy.typing import NDArray
from pydantic import Field

from puna.core.stage import Parameters
from puna.data.curate.learned.evaluation_sets import EvaluationSets, words_of
from puna.data.curate.operator import Signals, Spans, score
from puna.data.curate.segments import Segments, ratio
from puna.data.curate.texts import Texts


class SetsSettings(Parameters):
    """Which evaluation sets, and what is looked for."""

    sets: tuple[str, ...] = Field(min_length=1)
    """Corpora, .jsonl files (every string in them), or .txt files of lines."""
    ngram: int = Field(default=13, ge=2)
    """Words in a row that a document may not share."""
    shortest: int = Field(default=8, ge=1)
    """Words of the shortest text that is looked for as a whole."""


@lru_cache(maxsize=2)
def evaluation_sets(sets: tuple[str, ...], ngram: int, shortest: int) -> EvaluationSets:
    """The sets, read once in a process."""
    return EvaluationSets.read(sets, ngram, shortest)


def overlaps(texts: Texts, settings: SetsSettings) -> Segments:
    """The runs of words that a batch shares with the evaluation sets, in order."""
    key = ("overlaps", settings)
    chosen = evaluation_sets(settings.sets, settings.ngram, min(settings.shortest, settings.ngram))
    return texts.shared(key, chosen.found)


def covered(found: Segments) -> Segments:
    """Overlapping and touching segments of a document joined into one."""
    if not found.count:
        return found
    # Ends of earlier segments of other documents lie before any of this one's.
    reach = numpy.maximum.accumulate(found.ends)
    new = numpy.concatenate([[True], found.starts[1:] > reach[:-1]])
    new[1:] |= found.document[1:] != found.document[:-1]
    first = numpy.flatnonzero(new)
    last = numpy.append(first[1:], found.count) - 1
    return Segments(found.texts, found.starts[first], reach[last], found.document[first])


@score(
    "decontaminate.ngrams",
    settings=SetsSettings,
    signals={
        "matches": "runs of words in common with an evaluation set",
        "share": "share of the document's words that lie in such a run; null without any word",
        "texts": "texts of the evaluation sets that the document holds as a whole, word by word",
    },
    spans={"overlaps": "stretches that such runs cover, each with its number of words"},
    source="arXiv:2005.14165",
)
def contamination(texts: Texts, settings: SetsSettings) -> Signals:
    """Runs of words, and whole texts, that a document shares with evaluation sets."""
    found = overlaps(texts, settings)
    words = words_of(texts)
    stretches = covered(found)
    first = numpy.searchsorted(words.starts, stretches.starts)
    inside = numpy.searchsorted(words.starts, stretches.ends) - first
    shared = numpy.bincount(stretches.document, weights=inside, minlength=texts.count)
    return {
        "matches": numpy.bincount(found.document, minlength=texts.count),
        "share": ratio(shared, words.counts),
        "texts": _whole_texts(texts, found, settings),
        "overlaps": _told(texts, stretches, inside),
    }


def _told(texts: Texts, stretches: Segments, words: NDArray[numpy.int64]) -> Spans:
    """The stretches as parts of documents; one that lower case made longer is not left behind its end."""
    spans = Spans.of(stretches, words)
    limit = texts.lengths[spans.document]
    return Spans(
        spans.document, numpy.minimum(spans.starts, limit), numpy.minimum(spans.ends, limit), spans.values
    )


def _whole_texts(texts: Texts, found: Segments, settings: SetsSettings) -> NDArray[numpy.int64]:
    """[count] how many different texts of the sets each document holds: looked for where one begins."""
    begins = evaluation_sets(settings.sets, settings.ngram, min(settings.shortest, settings.ngram)).texts
    counts = numpy.zeros(texts.count, dtype=numpy.int64)
    words = words_of(texts)
    for document in numpy.unique(found.document).tolist():
        places = found.document == document
        candidates = {text for key in set(found.hashes[places].tolist()) for text in begins.get(key, ())}
        if candidates:
            first, last = words.bounds[document], words.bounds[document + 1]
            joined = " ".join(_strings(words, int(first), int(last)))
            counts[document] = sum(f" {text} " in f" {joined} " for text in candidates)
    return counts


def _strings(words: Segments, first: int, last: int) -> list[str]:
    joined = words.texts.joined
    places = zip(words.starts[first:last].tolist(), words.ends[first:last].tolist(), strict=True)
    return [joined[start:end] for start, end in places]
