"""What global operators have in common: places of shards, the settings of members, and what clusters say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Literal

import numpy
from numpy.typing import NDArray
from pydantic import Field

from puna.core.stage import Parameters
from puna.data.curate import boundaries, redpajama_texts  # noqa: F401  (register kinds of words)
from puna.data.curate.duplicates.clusters import Clusters
from puna.data.curate.operator import Resolved, Sketch
from puna.data.curate.segments import Segments
from puna.data.curate.texts import Texts

CLUSTER_SIGNALS = {
    "cluster": "place, in the order of all documents, of the first one in its cluster",
    "size": "documents in its cluster",
    "duplicate": "1 for all but the survivor of a cluster; 0 for it and for a document that is alone",
}
"""Of a document that could not be compared all three are null: it is no duplicate of anything."""


class MemberSettings(Parameters):
    """What sets of members documents are compared by."""

    words: str = "white_space"
    """The kind of words: ``white_space``, ``word_punct``, ``normalised`` (RedPajama's), ``unicode_solid`` and
    others; ``characters`` for single characters."""
    ngram: int = Field(default=5, ge=1)
    """Words of a member."""
    lower: bool = True
    """Whether texts are compared in lower case."""
    last_ngram: bool = True
    """Whether the last n-gram of a document is a member: Data-Juicer's loops stop one before it."""


class ClusterSettings(Parameters):
    """Which documents are compared at a time, and which one of a cluster survives."""

    survivor: Literal["first", "longest"] = "first"
    """Which document of a cluster is kept: the first in the order of the shards, or the longest one (of
    equally long ones the first)."""
    keys_at_once: int = Field(default=50_000_000, ge=1)
    """Keys in memory at a time, at 32 bytes each; more are compared in parts by what they begin with."""


def members(texts: Texts, settings: MemberSettings) -> Segments:
    """The members of each document's set, as often as they occur."""
    lowered = settings.words != "normalised"  # These are in lower case already, of the text as it is.
    compared = texts.lower if settings.lower and lowered else texts
    if settings.words == "characters":
        places = numpy.arange(len(compared.codes))
        units = Segments(compared, places, places + 1)
    else:
        units = compared.words(settings.words)
    found = units.ngrams(settings.ngram)
    if settings.last_ngram:
        return found
    last = numpy.zeros(found.count, dtype=bool)
    last[found.bounds[1:][found.counts > 0] - 1] = True
    return found.where(~last)


def first_places(sketches: Sequence[Sketch]) -> list[int]:
    """The place of each shard's first document among all, and at the end how many there are."""
    return list(accumulate((sketch.count for sketch in sketches), initial=0))


def join_by_column(
    clusters: Clusters, sketches: Sequence[Sketch], column: str, nothing: int, keys_at_once: int
) -> None:
    """Put documents with the same number in ``column`` into one cluster; ``nothing`` is no number.

    Memory: 32 bytes for each key, at most ``keys_at_once`` of them, besides the clusters themselves. Where
    there are more, the shards are read several times, each time for the keys of another residue.
    """
    firsts = first_places(sketches)
    parts = -(-firsts[-1] // keys_at_once)
    for part in range(parts):
        keys: list[NDArray[numpy.uint64]] = []
        places: list[NDArray[numpy.int64]] = []
        for sketch, first in zip(sketches, firsts, strict=False):
            values = sketch.read(column)
            wanted = values != nothing
            if parts > 1:
                wanted &= (values >> numpy.uint64(20)) % numpy.uint64(parts) == part
            chosen = numpy.flatnonzero(wanted)
            keys.append(values[chosen])
            places.append(chosen + first)
        if keys:
            clusters.join_equal(numpy.concatenate(keys), numpy.concatenate(places))


def told(
    clusters: Clusters, sketches: Sequence[Sketch], survivor: Literal["first", "longest"]
) -> Iterator[Resolved]:
    """What clusters say of the documents of each shard; the sketches hold ``compared``, and ``length``."""
    firsts = first_places(sketches)
    sizes = clusters.sizes()
    kept = clusters.smallest
    if survivor == "longest":
        lengths = numpy.concatenate([sketch.read("length") for sketch in sketches] or [numpy.zeros(0)])
        kept = _longest(clusters.smallest, lengths)
    for sketch, first in zip(sketches, firsts, strict=False):
        places = numpy.arange(first, first + sketch.count)
        compared = sketch.read("compared").astype(bool)
        values = {
            "cluster": clusters.smallest[places],
            "size": sizes[places],
            "duplicate": kept[places] != places,
        }
        yield Resolved({name: numpy.where(compared, of, numpy.nan) for name, of in values.items()})


def _longest(cluster: NDArray[numpy.int64], lengths: NDArray[numpy.int64]) -> NDArray[numpy.int64]:
    """[documents] the place of the longest document of each one's cluster, the first of equally long ones."""
    order = numpy.lexsort((numpy.arange(len(cluster)), -lengths, cluster))
    leads = (
        order[numpy.concatenate([[True], cluster[order][1:] != cluster[order][:-1]])] if len(order) else order
    )
    best = numpy.zeros(len(cluster), dtype=numpy.int64)
    best[cluster[leads]] = leads
    return best[cluster]
