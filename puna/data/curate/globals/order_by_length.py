"""Places of documents ordered by length: the plainest global operator, and the example of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy

from puna.data.curate.operator import NoSettings, Resolved, Sketch, SketchColumns, global_operator
from puna.data.curate.texts import Texts


@global_operator(
    "order.length",
    signals={"place": "0 for the shortest document, 1 for the longest, in even steps between"},
    source="a curriculum from short to long",
)
class OrderByLength:
    """The place of each document when all are ordered by length; of equally long ones the first is first.

    Memory: 24 bytes a document.
    """

    def sketch(self, texts: Texts, settings: NoSettings) -> SketchColumns:
        """The lengths."""
        return {"length": texts.lengths}

    def resolve(self, sketches: Sequence[Sketch], settings: NoSettings, work: Path) -> Iterator[Resolved]:
        """The places, shard by shard."""
        lengths = numpy.concatenate([sketch.read("length") for sketch in sketches])
        places = numpy.empty(len(lengths))
        places[numpy.argsort(lengths, kind="stable")] = numpy.arange(len(lengths))
        places /= max(len(lengths) - 1, 1)
        start = 0
        for sketch in sketches:
            yield Resolved({"place": places[start : start + sketch.count]})
            start += sketch.count
