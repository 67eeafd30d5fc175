"""Language of documents by the vote of several detectors (S60, arXiv:2403.06350).

Setu's voters are IndicLID, CLD3 and NLLB's detector; the first and the last are not to be had as
packages, and others stand in their places. Its probability gate adds a voice in both of its branches and
so decides nothing: here it decides.
"""

from __future__ import annotations

import numpy
import pydantic

from puna.core.stage import Parameters
from puna.data.curate.detectors import Detector
from puna.data.curate.languages import code_of, detect, vote
from puna.data.curate.operator import Mapped, mapper
from puna.data.curate.texts import Texts


class VoteSettings(Parameters):
    """Who votes, and from which probability on."""

    detectors: list[Detector] = pydantic.Field(["fasttext", "cld3", "langid"], min_length=1)
    """Voters, in the order that decides between equals."""
    minimum: float = pydantic.Field(0.9, ge=0, le=1)
    """Probability from which on a detector's voice counts."""
    always: list[Detector] = pydantic.Field(default_factory=list)
    """Detectors whose voice counts whatever their probability."""
    languages: list[str] = pydantic.Field(default_factory=list)
    """Languages asked for; none: any language is wanted."""

    @pydantic.model_validator(mode="after")
    def _known(self) -> VoteSettings:
        if len(set(self.detectors)) < len(self.detectors):
            raise ValueError("a detector votes once")
        if not set(self.always) <= set(self.detectors):
            raise ValueError("always: not among the detectors")
        return self


@mapper(
    "language.vote",
    settings=VoteSettings,
    signals={
        "voices": "detectors that voted for the language; 0 if none did",
        "probability": "mean probability of these; null without one",
        "wanted": "1 if the language is one of those asked for, else 0",
        "code": "number of the language; null without one",
    },
    source="arXiv:2403.06350, AI4Bharat/setu",
)
def language_vote(texts: Texts, settings: VoteSettings) -> Mapped:
    """Gives each document the language that most detectors voted for; without a voice it keeps its own."""
    said = [detect(texts, detector) for detector in settings.detectors]
    won = vote(said, settings.minimum, [name in settings.always for name in settings.detectors])
    wanted = [bool(name) and (not settings.languages or name in settings.languages) for name in won.languages]
    signals = {
        "voices": won.voices,
        "probability": won.probabilities,
        "wanted": numpy.array(wanted, dtype=numpy.float64),
        "code": numpy.array([code_of(name) for name in won.languages]),
    }
    return Mapped([None] * texts.count, signals, [name or None for name in won.languages])


class GivenSettings(Parameters):
    """Which language."""

    language: str = pydantic.Field(pattern="^[a-z]{2,3}$")
    """Tag of two or three letters."""


@mapper("language.given", settings=GivenSettings, source="what the user knows")
def language_given(texts: Texts, settings: GivenSettings) -> Mapped:
    """Gives every document the language that the user says it is in."""
    return Mapped([None] * texts.count, {}, [settings.language] * texts.count)
