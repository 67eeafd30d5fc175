"""Detectors of languages, and their vote.

Four detectors: ``fasttext`` (lid.176 by Facebook, 176 languages), ``langid`` (py3langid, 97), ``cld3``
(Google's network, 107) and ``script``, an own rule: the share of letters in the script that most of them
are in, for scripts that hardly any other language of size is written in. Each says one language of a text
(two or three letters, "" if it knows none) and a probability.

The vote is that of Setu (S60) with its gate made real: a detector's voice counts only if its probability
reaches the gate, unless it is among those that always have a voice. The language with the most voices
wins; of several, the one with the larger sum of probabilities; of those, the one whose first voice comes
first in the list of detectors. Without a voice there is no language.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy
from numpy.typing import NDArray

from puna.core import assets
from puna.core.errors import PunaError
from puna.data.curate.detectors import Detector
from puna.data.curate.texts import Texts

LID = "lid-176"
_OTHER_NAMES = {"iw": "he", "in": "id", "ji": "yi", "nb": "no", "und": "", "jw": "jv", "tl": "fil"}
_INSTALL = "pip install 'puna[curate]'"
_CLD3_BYTES = 1000

# Scripts and the language that is almost alone in each: blocks of Unicode, both ends included.
_SCRIPTS = {
    "bn": (0x980, 0x9FF),
    "pa": (0xA00, 0xA7F),
    "gu": (0xA80, 0xAFF),
    "or": (0xB00, 0xB7F),
    "ta": (0xB80, 0xBFF),
    "te": (0xC00, 0xC7F),
    "kn": (0xC80, 0xCFF),
    "ml": (0xD00, 0xD7F),
    "si": (0xD80, 0xDFF),
    "th": (0xE00, 0xE7F),
    "lo": (0xE80, 0xEFF),
    "my": (0x1000, 0x109F),
    "ka": (0x10A0, 0x10FF),
    "km": (0x1780, 0x17FF),
    "sat": (0x1C50, 0x1C7F),
    "el": (0x370, 0x3FF),
    "hy": (0x530, 0x58F),
    "he": (0x590, 0x5FF),
    "ko": (0xAC00, 0xD7AF),
    "mni": (0xABC0, 0xABFF),
    "hi": (0x900, 0x97F),
}


@dataclass(frozen=True)
class Detected:
    """A language of each text ("" for none) and its ``probabilities`` [count] from 0 to 1."""

    languages: list[str]
    probabilities: NDArray[numpy.float64]


def detect(texts: Texts, detector: Detector) -> Detected:
    """What a detector says of each text, in which line breaks are spaces; worked out once for a batch."""
    return texts.shared(("language by", detector), _DETECTORS[detector])


def code_of(language: str) -> float:
    """A number for a language of up to three letters, which gates can compare; nan for none.

    Letters are digits from 1 to 26 to the base of 27: "en" is 5 * 27 + 14 = 149.
    """
    if not language or not language.isascii() or not language.isalpha() or len(language) > 3:
        return math.nan
    number = 0
    for letter in language.lower():
        number = 27 * number + ord(letter) - 96
    return float(number)


@dataclass(frozen=True)
class Vote:
    """The languages that won ("" without a voice), their voices [count] and the mean probability of these."""

    languages: list[str]
    voices: NDArray[numpy.float64]
    probabilities: NDArray[numpy.float64]


def vote(said: Sequence[Detected], minimum: float, always: Sequence[bool] | None = None) -> Vote:
    """Let detectors vote on each text, as the head of this module tells."""
    unconditional = always or [False] * len(said)
    count = len(said[0].languages)
    languages: list[str] = []
    voices, probabilities = numpy.zeros(count), numpy.full(count, numpy.nan)
    for place in range(count):
        heard: dict[str, list[float]] = {}
        for one, free in zip(said, unconditional, strict=True):
            probability = float(one.probabilities[place])
            if one.languages[place] and (free or probability >= minimum):
                heard.setdefault(one.languages[place], []).append(probability)
        # Python's max keeps the first of equals, and dictionaries keep the order of the detectors.
        winner = max(heard, key=lambda name: (len(heard[name]), sum(heard[name])), default="")
        languages.append(winner)
        if winner:
            voices[place] = len(heard[winner])
            probabilities[place] = sum(heard[winner]) / len(heard[winner])
    return Vote(languages, voices, probabilities)


def _known(name: str) -> str:
    name = name.split("-")[0].lower()
    return _OTHER_NAMES.get(name, name)


def _one_line(texts: Texts) -> list[str]:
    return [text.replace("\n", " ") for text in texts.texts]


def _by_fasttext(texts: Texts) -> Detected:
    return fasttext_languages(_one_line(texts))


def fasttext_languages(lines: Sequence[str]) -> Detected:
    """What lid.176 says of texts without line breaks; an empty one has no language."""
    languages, probabilities = [""] * len(lines), numpy.zeros(len(lines))
    for place, line in enumerate(lines):
        if line.strip():
            labels, values = _lid_176().predict(line)
            languages[place] = _known(labels[0].removeprefix("__label__"))
            probabilities[place] = min(float(values[0]), 1.0)
    return Detected(languages, probabilities)


def _by_langid(texts: Texts) -> Detected:
    classify = _langid().classify
    found = [classify(line) if line.strip() else ("", 0.0) for line in _one_line(texts)]
    return _detected(found)


def _by_cld3(texts: Texts) -> Detected:
    identifier = _cld3()
    found = []
    for line in _one_line(texts):
        # It looks at the first bytes alone; long texts need not be handed over whole.
        result = identifier.FindLanguage(text=line[: 4 * _CLD3_BYTES])
        found.append((result.language, result.probability) if line.strip() else ("", 0.0))
    return _detected(found)


def _by_script(texts: Texts) -> Detected:
    letters = texts.count_of("alphabetic")
    marks = texts.codes
    shares = numpy.zeros((len(_SCRIPTS), texts.count))
    for row, (first, last) in enumerate(_SCRIPTS.values()):
        inside = texts.is_class("alphabetic") & (marks >= first) & (marks <= last)
        shares[row] = texts.total(inside) / numpy.maximum(letters, 1)
    best = shares.argmax(axis=0)
    names = list(_SCRIPTS)
    probabilities = shares[best, numpy.arange(texts.count)]
    languages = [names[row] if share > 0.5 else "" for row, share in zip(best, probabilities, strict=True)]
    return Detected(languages, numpy.where(probabilities > 0.5, probabilities, 0.0))


def _detected(found: Sequence[tuple[str, float]]) -> Detected:
    values = numpy.array([value for _, value in found], dtype=numpy.float64)
    return Detected([_known(name) for name, _ in found], values)


_DETECTORS: dict[str, Callable[[Texts], Detected]] = {
    "fasttext": _by_fasttext,
    "langid": _by_langid,
    "cld3": _by_cld3,
    "script": _by_script,
}


@cache
def _lid_176() -> Any:
    try:
        import fasttext
    except ImportError:
        raise PunaError("this detector needs fastText", where="fasttext", fix=_INSTALL) from None
    return fasttext.load_model(str(assets.fetch(LID)))


@cache
def _langid() -> Any:
    try:
        from py3langid import langid
    except ImportError:
        raise PunaError("this detector needs py3langid", where="langid", fix=_INSTALL) from None
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


@cache
def _cld3() -> Any:
    try:
        import gcld3
    except ImportError:
        raise PunaError("this detector needs cld3-py", where="cld3", fix=_INSTALL) from None
    return gcld3.NNetLanguageIdentifier(0, _CLD3_BYTES)
