"""Parameters of the stage that measures what is promised of duplicates."""

from __future__ import annotations

import pydantic

from puna.core.stage import Parameters


class DuplicateChecksParameters(Parameters):
    """How much is drawn for each check."""

    pairs: pydantic.PositiveInt = 1000
    """Pairs of documents of each similarity."""
    capacity: pydantic.PositiveInt = 500_000
    """Members of the Bloom filter; twice as many others are asked for."""
    documents: int = pydantic.Field(default=1000, ge=8)
    """Documents of the checks of clusters and of copies."""
