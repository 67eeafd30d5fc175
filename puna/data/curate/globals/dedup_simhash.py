"""S50: near-duplicates by SimHash, arXiv:2309.02033 (Data-Juicer), after Charikar 2002 and Manku 2007.

Data-Juicer: members of 6 words in lower case, 6 blocks, at most 4 of 64 bits apart; its recipe for
fine-tuning data: members of 3 words, 9 blocks, 7 bits. Pairs within the distance are found without
exception. Simplified: the bits of members come from this project's hash of words, not from MD5, so that
hashes differ from simhash-py's while their distances are distributed the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy
from pydantic import Field, model_validator

from puna.data.curate.duplicates.clusters import Clusters
from puna.data.curate.duplicates.shares import (
    CLUSTER_SIGNALS,
    ClusterSettings,
    MemberSettings,
    members,
    told,
)
from puna.data.curate.duplicates.simhash import near_pairs, simhashes
from puna.data.curate.operator import Resolved, Sketch, SketchColumns, global_operator
from puna.data.curate.texts import Texts


class SimHashSettings(MemberSettings, ClusterSettings):
    """Settings of near-duplicates by SimHash."""

    ngram: int = Field(default=6, ge=1)
    """Words of a member."""
    blocks: int = Field(default=6, ge=2, le=64)
    """Blocks that the 64 bits are cut into for the search."""
    distance: int = Field(default=4, ge=0)
    """Bits in which near-duplicates differ, at most."""

    @model_validator(mode="after")
    def _fewer(self) -> SimHashSettings:
        if self.distance >= self.blocks:
            raise ValueError(f"distance {self.distance} has to be below the number of blocks, {self.blocks}")
        return self


@global_operator(
    "dedup.simhash", settings=SimHashSettings, signals=CLUSTER_SIGNALS, source="arXiv:2309.02033"
)
class SimHash:
    """Clusters of documents whose SimHashes are near each other.

    On disk 8 bytes per document. Memory: about 60 bytes per document, all of them at once.
    """

    def sketch(self, texts: Texts, settings: SimHashSettings) -> SketchColumns:
        """The hashes, and whether the document has any member."""
        found = members(texts, settings)
        hashes = simhashes(found.hashes, found.bounds)
        return {"hash": hashes, "compared": found.counts > 0, "length": texts.lengths}

    def resolve(
        self, sketches: Sequence[Sketch], settings: SimHashSettings, work: Path
    ) -> Iterator[Resolved]:
        """The clusters of pairs that are near each other."""
        clusters = Clusters(sum(sketch.count for sketch in sketches))
        if sketches:
            compared = numpy.concatenate([sketch.read("compared") for sketch in sketches]).astype(bool)
            hashes = numpy.concatenate([sketch.read("hash") for sketch in sketches])
            places = numpy.flatnonzero(compared)
            different, first, of = numpy.unique(hashes[places], return_index=True, return_inverse=True)
            clusters.join(places, places[first[of]])
            left, right = near_pairs(different, settings.blocks, settings.distance)
            clusters.join(places[first[left]], places[first[right]])
        yield from told(clusters, sketches, settings.survivor)
