"""S33, S52: duplicates by a Bloom filter, arXiv:2406.11794 (DataComp-LM), arXiv:2411.12372 (RedPajama-V2).

DataComp-LM ("old-both" of its code): paragraphs are what lies between line breaks, members are runs of 13
words between Unicode's word boundaries, within a paragraph. Paragraphs come in order. One of whose members
more than .8 were seen before is cut, else its members are added; a document of whose members, all together,
more than .8 were seen is a duplicate. A paragraph shorter than 13 words has no member and always stays.

RedPajama-V2: one filter over whole documents, from the newest crawl to the oldest.

Both depend on the order of documents, which is that of the shards, on any number of workers: sketches are
made in parallel, the filter is asked and filled by one process. Within a shard members are compared
exactly; only what earlier shards added can be taken for seen by mistake. In DataComp-LM's code threads
share the filter, and the order is whatever it turns out to be.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy
from numpy.typing import NDArray
from pydantic import Field

from puna.core.stage import Parameters
from puna.data.curate import boundaries  # noqa: F401  (registers kinds of words)
from puna.data.curate.duplicates.bloom import BloomFilter
from puna.data.curate.globals.dedup_exact import NORMALISATIONS, Normalisation, digests
from puna.data.curate.operator import Resolved, Sketch, SketchColumns, Spans, global_operator
from puna.data.curate.segments import Segments, by_document, ratio
from puna.data.curate.texts import Texts


class FilterSettings(Parameters):
    """Settings of a Bloom filter."""

    capacity: int | None = Field(default=None, ge=1)
    """Members that the filter is made for; none: as many as there are. Above it the rate is exceeded."""
    rate: float = Field(default=0.01, gt=0, lt=1)
    """False positives for each member, at most, while the capacity is not exceeded."""

    def filter(self, members: int) -> BloomFilter:
        """The filter for so many members."""
        return BloomFilter.for_capacity(self.capacity or max(members, 1), self.rate)


class ParagraphSettings(FilterSettings):
    """Settings of duplicate paragraphs and documents by a Bloom filter."""

    words: str = "unicode_solid"
    """The kind of words."""
    ngram: int = Field(default=13, ge=1)
    """Words of a member; a paragraph with fewer is never cut."""
    threshold: float = Field(default=0.8, ge=0, le=1)
    """Share of members seen before above which a paragraph is cut, and a document is a duplicate."""


@global_operator(
    "dclm.bloom",
    settings=ParagraphSettings,
    signals={
        "share": "share of the document's members that were seen before; null if it has none",
        "duplicate": "1 if the share is above the threshold, else 0; null if the document has no member",
    },
    spans={"paragraphs": "share of a paragraph's members that were seen before; null if it has none"},
    source="arXiv:2406.11794",
)
class ParagraphBloom:
    """Paragraphs seen before are cut, and documents of them are duplicates, in one pass over the shards.

    On disk 8 bytes per word. Memory: the filter, 1.2 bytes per member at a rate of .01, and about 100 bytes
    per member of one shard.
    """

    def sketch(self, texts: Texts, settings: ParagraphSettings) -> SketchColumns:
        """The members of every paragraph, and where paragraphs lie."""
        lines = texts.lines("newline")
        found = texts.words(settings.words)
        paragraph = numpy.searchsorted(lines.ends, found.starts, side="right")
        # Neighbours are those within a paragraph: its number stands in for that of the document.
        inside = Segments(found.texts, found.starts, found.ends, paragraph, found.hashes)
        members = inside.ngrams(settings.ngram)
        counts = numpy.bincount(members.document, minlength=lines.count)
        starts = lines.starts - texts.bounds[lines.document]
        # The line break belongs to the paragraph behind it, and goes with that.
        starts = starts - (starts > 0)
        ends = lines.ends - texts.bounds[lines.document]
        member_bounds = numpy.concatenate([[0], numpy.cumsum(counts)])[lines.bounds]
        return {
            "members": (members.hashes, member_bounds),
            "counts": (counts, lines.bounds),
            "starts": (starts, lines.bounds),
            "ends": (ends, lines.bounds),
        }

    def resolve(
        self, sketches: Sequence[Sketch], settings: ParagraphSettings, work: Path
    ) -> Iterator[Resolved]:
        """Shares, duplicates and cuts, shard by shard."""
        if settings.capacity is None:
            total = sum(len(sketch.ragged("members")[0]) for sketch in sketches)
        else:
            total = settings.capacity
        seen = settings.filter(total)
        for sketch in sketches:
            members, member_bounds = sketch.ragged("members")
            counts, bounds = sketch.ragged("counts")
            contained, share = _pass(seen, members, counts, settings.threshold)
            whole = ratio(by_document(contained, member_bounds), numpy.diff(member_bounds))
            document = numpy.repeat(numpy.arange(sketch.count), numpy.diff(bounds))
            spans = Spans(document, sketch.ragged("starts")[0], sketch.ragged("ends")[0], share)
            cut = share > settings.threshold
            duplicate = numpy.where(numpy.isnan(whole), numpy.nan, whole > settings.threshold)
            yield Resolved(
                {"share": whole, "duplicate": duplicate, "paragraphs": spans},
                Spans(document[cut], spans.starts[cut], spans.ends[cut], share[cut]) if cut.any() else None,
            )


def _pass(
    seen: BloomFilter, members: NDArray[numpy.uint64], counts: NDArray[numpy.int64], threshold: float
) -> tuple[NDArray[numpy.bool_], NDArray[numpy.float64]]:
    """Which members were seen before their paragraph came, and their share of each paragraph; fills ``seen``.

    ``counts`` [paragraphs] are the members of each paragraph, in order. Whether a paragraph is kept depends
    on those before it that are kept. Starting from what earlier shards tell, the shares are worked out
    again until nothing changes: after k rounds those are right that depend on chains of at most k
    paragraphs, so that the end is what one pass, paragraph by paragraph, finds.
    """
    bounds = numpy.concatenate([[0], numpy.cumsum(counts)])
    paragraph = numpy.repeat(numpy.arange(len(counts)), counts)
    before = seen.contains(members)
    order = numpy.argsort(members, kind="stable")
    ordered = members[order]
    differs = numpy.concatenate([ordered[:1] == ordered[:1], ordered[1:] != ordered[:-1]])
    starts = numpy.flatnonzero(differs)
    group = numpy.empty(len(members), dtype=numpy.int64)
    group[order] = numpy.cumsum(differs) - 1
    never = len(counts)
    contained = before
    removed: NDArray[numpy.bool_] | None = None
    while True:
        share = ratio(by_document(contained, bounds), counts)
        now = share > threshold
        if removed is not None and numpy.array_equal(now, removed):
            break
        removed = now
        if len(members):
            adds = numpy.where(removed, never, numpy.arange(never))[paragraph[order]]
            contained = before | (paragraph > numpy.minimum.reduceat(adds, starts)[group])
    seen.add(ordered[starts][_any(~removed[paragraph[order]], starts) & ~before[order][starts]])
    return contained, share


def _any(mask: NDArray[numpy.bool_], starts: NDArray[numpy.int64]) -> NDArray[numpy.bool_]:
    return numpy.logical_or.reduceat(mask, starts) if len(starts) else mask


class DocumentSettings(FilterSettings):
    """Settings of duplicate documents by a Bloom filter."""

    normalise: Normalisation = "none"
    """What is done to texts before they are compared."""
    backwards: bool = False
    """Whether documents come from the last to the first: for sources that are listed from old to new, where
    the newest copy is to be kept."""


@global_operator(
    "redpajama.bloom",
    settings=DocumentSettings,
    signals={"duplicate": "1 if the same text came before, or seems to have come before; else 0"},
    source="arXiv:2411.12372",
)
class DocumentBloom:
    """Exact duplicates by a Bloom filter over whole texts, to which new ones are now and then lost.

    On disk 8 bytes per document. Memory: the filter, 1.2 bytes per document at a rate of .01, the answers,
    one byte each, and 40 bytes per document of one shard.
    """

    def sketch(self, texts: Texts, settings: DocumentSettings) -> SketchColumns:
        """64 bits of each normalised text."""
        normalise = NORMALISATIONS[settings.normalise]
        return {"hash": digests([normalise(text) for text in texts.texts])[:, 0]}

    def resolve(
        self, sketches: Sequence[Sketch], settings: DocumentSettings, work: Path
    ) -> Iterator[Resolved]:
        """Duplicates, shard by shard."""
        seen = settings.filter(sum(sketch.count for sketch in sketches))
        step = -1 if settings.backwards else 1
        answers: list[NDArray[numpy.bool_]] = []
        for sketch in sketches[::step]:
            hashes = sketch.read("hash")[::step]
            duplicate = seen.contains(hashes)
            different, first = numpy.unique(hashes, return_index=True)
            again = numpy.ones(len(hashes), dtype=bool)
            again[first] = False
            seen.add(different)
            answers.append((duplicate | again)[::step])
        for answer in answers[::step]:
            yield Resolved({"duplicate": answer})
