"""True bits of storage: levels, steps, zero points, magnitudes and the maps that say which weight is what."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Storage:
    """Bits of one or of many quantised matrices.

    ``levels`` are the bits of the weights' levels, ``steps`` those of steps, zero points and magnitudes,
    ``maps`` those of bitmaps and of numbers that say how a group is held.
    """

    weights: int
    levels: int
    steps: int
    maps: int = 0

    def __add__(self, other: Storage) -> Storage:
        return Storage(
            self.weights + other.weights,
            self.levels + other.levels,
            self.steps + other.steps,
            self.maps + other.maps,
        )

    @property
    def nominal(self) -> float:
        """Bits of levels for a weight: what papers call the bits of a method."""
        return self.levels / self.weights

    @property
    def bits(self) -> float:
        """All bits for a weight."""
        return (self.levels + self.steps + self.maps) / self.weights

    @property
    def bytes(self) -> float:
        """All bits over eight."""
        return (self.levels + self.steps + self.maps) / 8


NOTHING = Storage(0, 0, 0)
