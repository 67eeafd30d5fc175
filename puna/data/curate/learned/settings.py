"""Parameters of the stages that learn models for operators."""

from __future__ import annotations

import pydantic

from puna.core.stage import Parameters


class QualityClassifierParameters(Parameters):
    """How the classifier is trained."""

    rows: pydantic.PositiveInt = 200_000
    """Texts of each side, at most: drawn if there are more."""
    held_out: float = pydantic.Field(default=0.1, gt=0, lt=1)
    """Share of the texts of each side that it is measured on and does not learn from."""
    learning_rate: pydantic.PositiveFloat = 0.1
    """Step size, falling to 0."""
    dimensions: pydantic.PositiveInt = 100
    """Length of the vectors of words."""
    epochs: pydantic.PositiveInt = 5
    """How often every text is seen."""
    least_count: pydantic.PositiveInt = 1
    """A rarer word has no vector."""
    ngrams: pydantic.PositiveInt = 2
    """Words in a row that have a vector together, at most."""
    buckets: pydantic.PositiveInt = 2_000_000
    """Buckets that n-grams are hashed into; training takes 4 bytes for each and dimension."""


class ImportanceParameters(Parameters):
    """How the distributions are estimated."""

    rows: pydantic.PositiveInt = 500_000
    """Texts of each side, at most: drawn if there are more."""
    held_out: float = pydantic.Field(default=0.1, gt=0, lt=1)
    """Share of the texts of each side that the scores are measured on and that are not counted."""
    buckets: pydantic.PositiveInt = 10_000
    """Buckets that words and n-grams are hashed into."""
    ngrams: pydantic.PositiveInt = 2
    """Words in a row that are counted, at most."""
    words: str = "word_punct"
    """The kind of words."""


class NgramParameters(Parameters):
    """How the n-gram model is estimated."""

    rows: pydantic.PositiveInt = 500_000
    """Texts of each side, at most: drawn if there are more."""
    held_out: float = pydantic.Field(default=0.1, gt=0, lt=1)
    """Share of the reference's texts that the model does not learn from and is measured on."""
    order: int = pydantic.Field(default=3, ge=2, le=6)
    """Words of the longest n-gram."""
