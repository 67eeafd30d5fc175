"""The setting of an order in which survivors are written."""

from __future__ import annotations

from puna.core.stage import Parameters


class Order(Parameters):
    """The order in which survivors are written."""

    signal: str
    """Full name of a stored signal of numbers."""
    descending: bool = False
    """Whether the largest comes first."""
