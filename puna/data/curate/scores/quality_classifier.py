"""S33: quality by a trained classifier: the probability that a document is of the wanted kind.

A probability of *this* classifier: DataComp-LM's .018112 is the ninetieth percentile of its own, and no rule
for another one. The gate for it is one by quantile: ``quantile_minimum: 0.9`` keeps the best tenth.
"""

from __future__ import annotations

from functools import lru_cache

from puna.core.stage import Parameters
from puna.data.curate.learned.fasttext_model import FastTextModel
from puna.data.curate.learned.quality_classifier import WANTED, wanted_probability
from puna.data.curate.operator import Signals, score
from puna.data.curate.texts import Texts


class QualitySettings(Parameters):
    """Settings of quality by a classifier."""

    model: str
    """File of the classifier: .safetensors of ``puna stage quality_classifier``, or fastText's .bin."""
    label: str = WANTED
    """The label whose probability is told; the classifier of DataComp-LM calls it ``hq``."""


@lru_cache(maxsize=2)
def _model(path: str) -> FastTextModel:
    return FastTextModel.load(path)


@score(
    "quality.fasttext",
    settings=QualitySettings,
    signals={"probability": "probability of the wanted label; null where no word is known"},
    source="arXiv:2406.11794",
)
def quality(texts: Texts, settings: QualitySettings) -> Signals:
    """The probability, by a model of fastText, that a document is of the wanted kind."""
    return {"probability": wanted_probability(_model(settings.model), texts, settings.label)}
