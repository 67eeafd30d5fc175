"""S33, S52: evaluation sets cut out of documents as GPT-3 does, arXiv:2005.14165, appendix C.

Runs of 13 words that a document shares with an evaluation set go, with 200 characters on either side of
each; of what is left, pieces below 200 characters go. A document that falls into more than ten pieces is
contaminated: the signal tells their number, and a gate decides. Simplified: GPT-3 makes a document of each
piece; here they stay one, a line for each.
"""

from __future__ import annotations

import numpy
from pydantic import Field

from puna.data.curate.operator import Mapped, mapper
from puna.data.curate.scores.decontamination import SetsSettings, covered, overlaps
from puna.data.curate.segments import Segments
from puna.data.curate.texts import Texts


class CutSettings(SetsSettings):
    """Settings of cutting evaluation sets out."""

    window: int = Field(default=200, ge=0)
    """Characters that go with a shared run, on either side."""
    shortest_piece: int = Field(default=200, ge=0)
    """Characters of a piece, at least."""


@mapper(
    "decontaminate.cut",
    settings=CutSettings,
    signals={"pieces": "pieces that the document falls into; 1 where nothing is cut"},
    source="arXiv:2005.14165",
)
def cut(texts: Texts, settings: CutSettings) -> Mapped:
    """Cut out what a document shares with evaluation sets, and what stands around it."""
    found = overlaps(
        texts, SetsSettings(**{name: getattr(settings, name) for name in SetsSettings.model_fields})
    )
    bounds = found.texts.bounds
    wide = Segments(
        found.texts,
        numpy.maximum(found.starts - settings.window, bounds[found.document]),
        numpy.minimum(found.ends + settings.window, bounds[found.document + 1]),
        found.document,
    )
    gone = covered(wide)
    pieces = numpy.ones(texts.count)
    made: list[str | None] = [None] * texts.count
    for document in numpy.unique(gone.document).tolist():
        inside = numpy.flatnonzero(gone.document == document)
        text = texts.texts[document]
        edges = [0]
        for place in inside.tolist():
            edges += [int(gone.starts[place] - bounds[document]), int(gone.ends[place] - bounds[document])]
        edges.append(len(text))
        left = [text[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True)]
        kept = [piece for piece in left if len(piece) >= settings.shortest_piece and piece]
        pieces[document] = len(kept)
        made[document] = "\n".join(kept)
    return Mapped(made, {"pieces": pieces})
