"""S52: importance weights of documents (DSIR), arXiv:2302.03169, as in RedPajama-V2, arXiv:2411.12372.

Words and bigrams of words (runs of word characters, and of what is neither these nor white space) are hashed
into 10,000 buckets. A target domain and a source have a distribution over buckets each, and a document's
score is the sum over its words and bigrams of log p(bucket) - log q(bucket), with 1e-8 added to both. It
grows with the document's length; the second score adds the log of the ratio of two Poisson probabilities of
the length, in words. RedPajama's code takes the mean length in words and the document's in characters, so
that both probabilities vanish for nearly every document; here both are in words.

Hashes are this project's and the same in every process; Python's ``hash``, which RedPajama calls, is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
from numpy.typing import NDArray

from puna.core.errors import PunaError
from puna.data.curate.learned.files import area_under_curve, load_model, save_model
from puna.data.curate.learned.settings import ImportanceParameters
from puna.data.curate.segments import by_document
from puna.data.curate.texts import Texts

KIND = "importance"
FIX = "fit one: puna stage importance_model"
SMOOTHING = 1e-8
_TEXTS_AT_ONCE = 1_000


@dataclass(frozen=True)
class ImportanceModel:
    """Counts of buckets [buckets] and mean lengths in words, of the target and of the source."""

    target: NDArray[numpy.int64]
    source: NDArray[numpy.int64]
    target_length: float
    source_length: float
    ngrams: int
    words: str

    @classmethod
    def fit(
        cls, target: Iterable[str], source: Iterable[str], parameters: ImportanceParameters
    ) -> ImportanceModel:
        """The model of two sides, read once, with a count per bucket in memory."""
        counts: list[NDArray[numpy.int64]] = []
        lengths: list[float] = []
        for side, texts in (("target", target), ("source", source)):
            total, words, documents = numpy.zeros(parameters.buckets, dtype=numpy.int64), 0, 0
            for batch in _batches(texts):
                for buckets, _ in bucketed(batch, parameters.words, parameters.ngrams, parameters.buckets):
                    total += numpy.bincount(buckets, minlength=parameters.buckets)
                words += batch.words(parameters.words).count
                documents += batch.count
            if not words:
                raise PunaError("no word to learn from", where=f"{side} texts")
            counts.append(total)
            lengths.append(words / documents)
        return cls(counts[0], counts[1], lengths[0], lengths[1], parameters.ngrams, parameters.words)

    @classmethod
    def measured(
        cls, target: Sequence[str], source: Sequence[str], parameters: ImportanceParameters
    ) -> tuple[ImportanceModel, dict[str, float]]:
        """The model of all texts but those held out, and how well its scores tell these apart."""
        sides = {}
        for name, texts in (("target", target), ("source", source)):
            count = max(1, round(len(texts) * parameters.held_out))
            if len(texts) <= count:
                raise PunaError(
                    "too few texts to learn from and to measure on",
                    where=f"{name} texts",
                    found=len(texts),
                    expected="at least 2",
                )
            sides[name] = (texts[count:], Texts(texts[:count]))
        model = cls.fit(sides["target"][0], sides["source"][0], parameters)
        wanted, other = model.scores(sides["target"][1]), model.scores(sides["source"][1])
        metrics = {"target.words": model.target_length, "source.words": model.source_length}
        for name, positive, negative in zip(("auc", "auc_with_length"), wanted, other, strict=True):
            filled = positive[~numpy.isnan(positive)], negative[~numpy.isnan(negative)]
            metrics[name] = area_under_curve(*filled)
        return model, metrics

    @classmethod
    def load(cls, path: Path | str) -> ImportanceModel:
        """A model that was saved."""
        arrays, about = load_model(Path(path), KIND, FIX)
        lengths = about["target_length"], about["source_length"]
        return cls(arrays["target"], arrays["source"], *lengths, about["ngrams"], about["words"])

    def save(self, path: Path) -> None:
        """Write it as safetensors."""
        about = {
            "target_length": self.target_length,
            "source_length": self.source_length,
            "ngrams": self.ngrams,
            "words": self.words,
        }
        save_model(path, KIND, {"target": self.target, "source": self.source}, about)

    def log_ratios(self) -> NDArray[numpy.float64]:
        """[buckets] log p - log q."""
        p, q = self.target / self.target.sum(), self.source / self.source.sum()
        return numpy.asarray(numpy.log(p + SMOOTHING) - numpy.log(q + SMOOTHING))

    def scores(self, texts: Texts) -> tuple[NDArray[numpy.float64], NDArray[numpy.float64]]:
        """[documents] the sums of log ratios, and those with the term of length; nan without a word."""
        ratios = self.log_ratios()
        score = numpy.zeros(texts.count)
        for buckets, bounds in bucketed(texts, self.words, self.ngrams, len(ratios)):
            score += by_document(ratios[buckets], bounds)
        lengths = texts.words(self.words).counts
        score[lengths == 0] = numpy.nan
        term = _log_poisson(lengths, self.target_length) - _log_poisson(lengths, self.source_length)
        return score, score + term


def bucketed(
    texts: Texts, words: str, ngrams: int, buckets: int
) -> Iterable[tuple[NDArray[numpy.int64], NDArray[numpy.int64]]]:
    """For words, bigrams and so on: the bucket of each, and the bounds of each document's."""
    found = texts.words(words)
    for n in range(1, ngrams + 1):
        segments = found.ngrams(n)
        yield (segments.hashes % numpy.uint64(buckets)).astype(numpy.int64), segments.bounds


def _batches(texts: Iterable[str]) -> Iterable[Texts]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == _TEXTS_AT_ONCE:
            yield Texts(batch)
            batch = []
    if batch:
        yield Texts(batch)


def _log_poisson(lengths: NDArray[numpy.int64], mean: float) -> NDArray[numpy.float64]:
    """[n] the log of the Poisson probability of each length, plus the smoothing."""
    different, inverse = numpy.unique(lengths, return_inverse=True)
    logs = [n * math.log(mean) - mean - math.lgamma(n + 1) for n in different.tolist()]
    return numpy.asarray(numpy.log(numpy.exp(numpy.array(logs)) + SMOOTHING)[inverse])
