"""S33: a classifier of quality trained with fastText, arXiv:2406.11794 (DataComp-LM).

Positives are texts as one wants them (OpenHermes 2.5 and well-rated answers in the paper), negatives texts as
the crawl has them (RefinedWeb), about 200,000 of each; words and bigrams, the library's other defaults: rate
.1, 100 dimensions, 5 epochs, words that occur once count. Line breaks become spaces. One thread trains, so
that a seed gives the same model; the library's several threads overwrite each other's steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from puna.core.errors import PunaError
from puna.core.seeds import derive, numpy_generator
from puna.data.corpus import Corpus
from puna.data.curate.learned.fasttext_model import FastTextModel, import_library
from puna.data.curate.learned.files import area_under_curve
from puna.data.curate.learned.settings import QualityClassifierParameters
from puna.data.curate.texts import Texts
from puna.data.kinds import texts_of

WANTED, OTHER = "wanted", "other"
_FEWEST = 10


def texts_of_corpora(corpora: Iterable[Corpus]) -> Iterator[str]:
    """One text for each row: of a conversation or a pair all its texts, line by line."""
    for corpus in corpora:
        for row in corpus.rows():
            yield "\n".join(texts_of(corpus.kind, row, system=False))


def drawn(texts: Iterable[str], rows: int, generator: numpy.random.Generator) -> list[str]:
    """At most ``rows`` of the texts, each as likely as any other, in the order drawn (reservoir sampling)."""
    kept: list[str] = []
    for seen, text in enumerate(texts):
        if len(kept) < rows:
            kept.append(text)
        else:
            place = int(generator.integers(seen + 1))
            if place < rows:
                kept[place] = text
    return [kept[place] for place in generator.permutation(len(kept))]


def train(
    positives: Sequence[Corpus],
    negatives: Sequence[Corpus],
    parameters: QualityClassifierParameters,
    out: Path,
    *,
    seed: int,
) -> tuple[FastTextModel, dict[str, float]]:
    """The classifier of two sides, and what is measured of it on texts held out. ``out`` is a free folder."""
    import_library()
    import fasttext

    learn: dict[str, list[str]] = {}
    test: dict[str, list[str]] = {}
    for label, corpora in ((WANTED, positives), (OTHER, negatives)):
        texts = drawn(texts_of_corpora(corpora), parameters.rows, numpy_generator(seed, "texts", label))
        if len(texts) < _FEWEST:
            raise PunaError(
                "too few texts to learn from and to measure on",
                where=f"{label} texts",
                found=len(texts),
                expected=f"at least {_FEWEST}",
            )
        count = max(1, round(len(texts) * parameters.held_out))
        test[label], learn[label] = texts[:count], texts[count:]
    file = out / "texts.txt"
    lines = [(label, text) for label, texts in learn.items() for text in texts]
    order = numpy_generator(seed, "order").permutation(len(lines))
    with open(file, "w", encoding="utf-8", errors="surrogatepass") as writer:
        for place in order.tolist():
            label, text = lines[place]
            writer.write(f"__label__{label} {_one_line(text)}\n")
    try:
        model = fasttext.train_supervised(
            input=str(file),
            lr=parameters.learning_rate,
            dim=parameters.dimensions,
            epoch=parameters.epochs,
            minCount=parameters.least_count,
            wordNgrams=parameters.ngrams,
            bucket=parameters.buckets,
            thread=1,
            seed=derive(seed, "fasttext") % (1 << 31),
            verbose=0,
        )
    finally:
        file.unlink()
    made = FastTextModel.of_library(model, where="training")
    return made, {**_measured(made, test), **{f"texts.{label}": float(len(t)) for label, t in learn.items()}}


def _one_line(text: str) -> str:
    """A text in one line of the library's format, in which no word looks like a label."""
    return " ".join(text.split("\n")).replace("__label__", "__label_").replace("\0", " ")


def _measured(model: FastTextModel, test: dict[str, list[str]]) -> dict[str, float]:
    scores = {label: wanted_probability(model, Texts(texts)) for label, texts in test.items()}
    positive, negative = (scores[label][~numpy.isnan(scores[label])] for label in (WANTED, OTHER))
    right = float((positive > 0.5).sum() + (negative <= 0.5).sum()) / (len(positive) + len(negative))
    return {
        "auc": area_under_curve(positive, negative),
        "accuracy": right,
        "held_out.texts": float(sum(map(len, test.values()))),
    }


def wanted_probability(model: FastTextModel, texts: Texts, label: str = WANTED) -> NDArray[numpy.float64]:
    """[documents] the probability of one label."""
    if label not in model.labels:
        raise PunaError(
            f"the classifier has no label {label!r}", where="label", expected=", ".join(model.labels)
        )
    column: NDArray[Any] = model.probabilities(texts)[:, model.labels.index(label)]
    return column
