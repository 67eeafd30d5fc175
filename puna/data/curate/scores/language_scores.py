"""Languages of documents as signals: one detector's, and Data-Juicer's score (S50).

A language is a word and signals are numbers: ``code`` is the number of
:func:`puna.data.curate.languages.code_of`, and ``wanted`` says whether it is one of those asked for.
"""

from __future__ import annotations

import numpy

from puna.core.stage import Parameters
from puna.data.curate.detectors import Detector
from puna.data.curate.languages import Detected, code_of, detect, fasttext_languages
from puna.data.curate.operator import Signals, score
from puna.data.curate.texts import Texts

_SIGNALS = {
    "probability": "probability of the language that is most likely",
    "wanted": "1 if that is one of the languages asked for, else 0",
    "code": "number of the language",
}


class LanguageSettings(Parameters):
    """Languages asked for."""

    languages: list[str] = []  # noqa: RUF012  (pydantic copies defaults)
    """Tags of two or three letters; none: any language is wanted."""


class DetectorSettings(LanguageSettings):
    """Which detector."""

    detector: Detector = "fasttext"
    """fasttext (lid.176), langid (py3langid), cld3 or script."""


@score(
    "language.detected",
    settings=DetectorSettings,
    signals=_SIGNALS,
    source="lid.176: arXiv:1607.01759; langid.py: Lui and Baldwin 2012; CLD3: github.com/google/cld3",
    apart=True,
)
def detected(texts: Texts, settings: DetectorSettings) -> Signals:
    """The language that one detector finds."""
    return _signals(detect(texts, settings.detector), settings.languages)


@score(
    "data_juicer.language",
    settings=LanguageSettings,
    signals=_SIGNALS,
    source="arXiv:2309.02033, modelscope/data-juicer",
    apart=True,
)
def data_juicer_language(texts: Texts, settings: LanguageSettings) -> Signals:
    """What lid.176 says of the text in lower case (``language_id_score_filter``)."""
    lines = [text.replace("\n", " ") for text in texts.lower.texts]
    return _signals(fasttext_languages(lines), settings.languages)


def _signals(found: Detected, wanted: list[str]) -> Signals:
    known = [bool(name) and (not wanted or name in wanted) for name in found.languages]
    return {
        "probability": found.probabilities,
        "wanted": numpy.array(known, dtype=numpy.float64),
        "code": numpy.array([code_of(name) for name in found.languages]),
    }
