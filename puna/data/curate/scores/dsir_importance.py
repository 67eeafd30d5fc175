"""S52: importance weights of documents for a target domain (DSIR): see :mod:`..learned.importance`."""

from __future__ import annotations

from functools import lru_cache

import numpy

from puna.core.stage import Parameters
from puna.data.curate.learned.importance import ImportanceModel
from puna.data.curate.operator import Signals, score
from puna.data.curate.redpajama_texts import DECIMALS
from puna.data.curate.texts import Texts


class ImportanceSettings(Parameters):
    """Settings of importance."""

    model: str
    """File of the distributions: .safetensors of ``puna stage importance_model``."""


@lru_cache(maxsize=4)
def _model(path: str) -> ImportanceModel:
    return ImportanceModel.load(path)


@score(
    "dsir.importance",
    settings=ImportanceSettings,
    signals={
        "log_ratio": "log of target over source probability of the document's words; null without any",
        "log_ratio_with_length": "the same plus that of the Poisson probabilities of its length in words",
    },
    source="arXiv:2302.03169",
)
def importance(texts: Texts, settings: ImportanceSettings) -> Signals:
    """How much more probable a document is in the target domain than in the source."""
    plain, with_length = _model(settings.model).scores(texts)
    return {
        "log_ratio": numpy.round(plain, DECIMALS),
        "log_ratio_with_length": numpy.round(with_length, DECIMALS),
    }
