"""Parameters of the stages that measure what DCLM, RedPajama, Data-Juicer and Setu claim."""

from __future__ import annotations

import pydantic

from puna.core.stage import Parameters
from puna.data.curate.detectors import Detector


class CurationChecksParameters(Parameters):
    """How much is looked at, and which rules are run in two orders."""

    preset: str = "dclm-pages"
    """Pipeline whose scores and gates are timed in two orders."""
    documents: pydantic.PositiveInt = 3_000
    """Documents of the corpus, the first ones, at most."""
    batch: pydantic.PositiveInt = 1_000
    """Documents that are worked on at once."""
    repeats: pydantic.PositiveInt = 3
    """Runs of each order; its time is their median."""


class JuicerChecksParameters(Parameters):
    """How much is looked at."""

    preset: str = "data-juicer-refine-c4"
    """Pipeline whose scores and gates are run in many orders."""
    documents: pydantic.PositiveInt = 20_000
    """Documents of the corpus that are timed."""
    batch: pydantic.PositiveInt = 5_000
    """Documents that are worked on at once."""
    orders: pydantic.PositiveInt = 5
    """Orders of gates that are tried."""
    draws: pydantic.PositiveInt = 100_000
    """Draws of Pareto's rule, and of a normal distribution."""
    planted: pydantic.PositiveInt = 500
    """Near-duplicates that are planted among four times as many other documents."""


class SetuChecksParameters(Parameters):
    """Which voters, and on what."""

    detectors: list[Detector] = pydantic.Field(["fasttext", "cld3", "langid"], min_length=2)
    """Voters, in the order that decides between equals."""
    minimum: float = pydantic.Field(0.9, ge=0, le=1)
    """Probability from which on a voice counts."""
    always: list[Detector] = pydantic.Field(["fasttext"])
    """Voters whose voice counts whatever their probability."""
    lines: pydantic.PositiveInt = 200
    """Lines of each language, at most."""
    words: tuple[pydantic.PositiveInt, pydantic.PositiveInt] = (2, 8)
    """Least and most words of a line."""
    mixed: float = pydantic.Field(0.5, ge=0, le=1)
    """Share of the lines to which two words of another language are added."""
