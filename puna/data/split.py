"""Train and held-out, split by source document before anything else is done to the rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pydantic

from puna.core.errors import unknown_name
from puna.core.seeds import derive
from puna.core.stage import Parameters

_RANGE = 1 << 63


class HeldOut(Parameters):
    """What is held out: whole sources by name, and a share of the source documents of the others."""

    sources: list[str] = pydantic.Field(default_factory=list)
    """Names of sources that are held out as a whole."""
    share: float = pydantic.Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the source documents of each other source, drawn by a hash of their names."""
    seed: int | None = None
    """Seed of the draw; without it the run's."""

    @property
    def asked_for(self) -> bool:
        """Whether anything is to be held out."""
        return bool(self.sources) or self.share > 0


@dataclass(frozen=True)
class Split:
    """Which source documents are held out. A document's side depends on its name and the seed alone."""

    held_out: HeldOut
    seed: int

    def is_held_out(self, source: str, document: str) -> bool:
        """Whether ``document`` of ``source`` is on the held-out side."""
        if source in self.held_out.sources:
            return True
        return derive(self.seed, "held out", source, document) < self.held_out.share * _RANGE

    def side(self, source: str, *, held_out: bool) -> Callable[[str], bool]:
        """The predicate that selects the documents of ``source`` on one side."""
        return lambda document: self.is_held_out(source, document) == held_out


def make_split(held_out: HeldOut, sources: list[str], seed: int) -> Split:
    """The split of ``sources``; a held-out source that is not among them is an error."""
    for name in held_out.sources:
        if name not in sources:
            raise unknown_name("source", name, sources, where="held_out.sources")
    return Split(held_out, seed if held_out.seed is None else held_out.seed)
