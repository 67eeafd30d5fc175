"""Data-Juicer's quality of documents, and its two rules of keeping (S50, arXiv:2309.02033).

``label`` keeps what is more probably good than not: a gate on ``score`` above 0.5. ``pareto`` is the rule
of GPT-3 with its exponent 9: a document with score s stays if s is above 1 minus a number drawn from Lomax's
distribution, which has probability (2 - s)**-9: a gate on ``margin`` above 0.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy
import pydantic
from numpy.typing import NDArray

from puna.core import seeds
from puna.core.stage import Parameters
from puna.data.curate.hashed_classifier import HashedClassifier
from puna.data.curate.operator import Signals, score
from puna.data.curate.scores.data_juicer_characters import SOURCE
from puna.data.curate.texts import Texts


class QualitySettings(Parameters):
    """Which classifier, and how the draw of the second rule is made."""

    model: str
    """File of a classifier that ``puna data quality`` trained."""
    exponent: pydantic.PositiveFloat = 9.0
    """Exponent of the distribution."""
    seed: int = 0
    """Seed of the draws; a draw depends on it and on the document's text."""


@score(
    "data_juicer.quality",
    settings=QualitySettings,
    signals={
        "score": "probability that the document is of the good kind",
        "margin": "the score less its bound of the second rule: above 0 it is kept",
    },
    source=SOURCE,
)
def quality(texts: Texts, settings: QualitySettings) -> Signals:
    """The probability that a classifier gives to a document, and how far it is from being drawn out."""
    path = Path(settings.model)
    stamp = path.stat().st_mtime_ns if path.is_file() else 0
    scores = _opened(path, stamp).probabilities(texts)
    return {"score": scores, "margin": scores - (1 - draws(texts, settings.exponent, settings.seed))}


def draws(texts: Texts, exponent: float, seed: int) -> NDArray[numpy.float64]:
    """[count] numbers from Lomax's distribution, one for each text; equal texts have equal ones."""
    key = numpy.uint64(seeds.derive(seed, "data_juicer.quality"))
    mixed = texts.whole().hashes ^ key
    # The finaliser of splitmix64, so that a bit of the seed changes every bit.
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> numpy.uint64(shift))) * numpy.uint64(factor)
    mixed ^= mixed >> numpy.uint64(31)
    uniform = ((mixed >> numpy.uint64(11)).astype(numpy.float64) + 0.5) * 2.0**-53
    result: NDArray[numpy.float64] = uniform ** (-1 / exponent) - 1
    return result


@lru_cache(maxsize=4)
def _opened(path: Path, stamp: int) -> HashedClassifier:
    return HashedClassifier.load(path)
