"""S52, S50: near-duplicates by MinHash and bands.

RedPajama-V2 (arXiv:2411.12372): members of 13 normalised words, 128 permutations, thresholds 1.0, .9, .8 or
.7. Data-Juicer (arXiv:2309.02033): members of 5 words in lower case, 256 permutations, threshold .7. A
document with fewer words than a member has no signature and is a duplicate of nothing; Data-Juicer's code
gives all of them the same one, so that they become duplicates of each other, which is not done here.

What finds two documents is that they share a band, not that their similarity is above the threshold: at 9
bands of 13 rows, which the solver takes for .8, a pair of similarity .8 is found with probability .40.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import Field, model_validator

from puna.data.curate.duplicates.clusters import Clusters
from puna.data.curate.duplicates.lsh import bands_and_rows
from puna.data.curate.duplicates.minhash import NO_KEY, band_keys, signatures
from puna.data.curate.duplicates.shares import (
    CLUSTER_SIGNALS,
    ClusterSettings,
    MemberSettings,
    join_by_column,
    members,
    told,
)
from puna.data.curate.operator import Resolved, Sketch, SketchColumns, global_operator
from puna.data.curate.texts import Texts


class MinHashSettings(MemberSettings, ClusterSettings):
    """Settings of near-duplicates by MinHash."""

    threshold: float = Field(default=0.8, gt=0, le=1)
    """Jaccard similarity around which bands and rows are chosen."""
    permutations: int = Field(default=128, ge=1, le=4096)
    """Numbers in a signature, at most; bands x rows of them are used."""
    bands: int | None = Field(default=None, ge=1)
    """Bands, in place of those that the solver chooses; with ``rows``."""
    rows: int | None = Field(default=None, ge=1)
    """Rows of a band, in place of those that the solver chooses; with ``bands``."""
    seed: int = 1
    """Which permutations are drawn."""

    @model_validator(mode="after")
    def _both(self) -> MinHashSettings:
        if (self.bands is None) != (self.rows is None):
            raise ValueError("bands and rows are given together, or neither is")
        if self.bands and self.rows and self.bands * self.rows > self.permutations:
            raise ValueError(
                f"{self.bands} bands of {self.rows} rows need {self.bands * self.rows} permutations, "
                f"there are {self.permutations}"
            )
        return self

    def shape(self) -> tuple[int, int]:
        """Bands and rows."""
        if self.bands is not None and self.rows is not None:
            return self.bands, self.rows
        return bands_and_rows(self.threshold, self.permutations)


@global_operator(
    "dedup.minhash", settings=MinHashSettings, signals=CLUSTER_SIGNALS, source="arXiv:2411.12372"
)
class MinHash:
    """Clusters of documents that share a band of their MinHash signatures.

    On disk 8 bytes per band and document. Memory: 32 bytes per document, and 32 more for each of the
    ``keys_at_once`` of one band.
    """

    def sketch(self, texts: Texts, settings: MinHashSettings) -> SketchColumns:
        """The keys of each band, and whether the document has a signature."""
        bands, rows = settings.shape()
        found = members(texts, settings)
        signature = signatures(found.hashes, found.bounds, bands * rows, settings.seed)
        compared = found.counts > 0
        keys = band_keys(signature, compared, bands, rows)
        columns = {_column(band): keys[band] for band in range(bands)}
        return {**columns, "compared": compared, "length": texts.lengths}

    def resolve(
        self, sketches: Sequence[Sketch], settings: MinHashSettings, work: Path
    ) -> Iterator[Resolved]:
        """The clusters, joined band by band."""
        clusters = Clusters(sum(sketch.count for sketch in sketches))
        for band in range(settings.shape()[0]):
            join_by_column(clusters, sketches, _column(band), int(NO_KEY), settings.keys_at_once)
        yield from told(clusters, sketches, settings.survivor)


def _column(band: int) -> str:
    return f"band_{band:03d}"
