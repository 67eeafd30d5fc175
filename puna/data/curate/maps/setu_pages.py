"""Scanned pages from OCR's boxes (S60, arXiv:2403.06350): nested boxes go, the rest is text and measured.

Definitions are those of AI4Bharat/setu's ``ocr_filters.py``, in which vertical coverage is the horizontal
one by a slip: here it is vertical. Its greedy union of intervals is an exact one, and its removal of boxes
skips none.
"""

from __future__ import annotations

import json

import numpy
import pydantic

from puna.core.stage import Parameters
from puna.data.curate import boxes
from puna.data.curate.maps.setu_clean import SOURCE
from puna.data.curate.operator import BadDocument, Mapped, mapper
from puna.data.curate.texts import Texts


class PageSettings(Parameters):
    """Shares that decide."""

    nested: float = pydantic.Field(0.95, gt=0, le=1)
    """A paragraph more of whose area than this lies inside a larger one is taken out."""
    unsure: float = pydantic.Field(0.5, gt=0, le=1)
    """A paragraph is unsure if fewer of its words than this share are in its most frequent language."""


@mapper(
    "setu.page_text",
    settings=PageSettings,
    signals={
        "paragraphs": "paragraphs on the page",
        "nested": "paragraphs taken out as they lie in larger ones",
        "horizontal_coverage": "share of the page's width that paragraphs cover; null without paragraphs",
        "vertical_coverage": "share of the page's height that paragraphs cover; null without paragraphs",
        "largest_overlap": "largest intersection over union of two paragraphs; null with fewer than two",
        "least_density": "least share of a block that its paragraphs fill; null without such a block",
        "unsure": "share of paragraphs of no one language; null without paragraphs",
    },
    source=SOURCE,
)
def page_text(texts: Texts, settings: PageSettings) -> Mapped:
    """Makes the text of a page out of its boxes, which a reader kept beside the document.

    Every document has to have them. The page's width and height are 1.
    """
    made: list[str | None] = []
    columns: list[list[float]] = []
    for meta in texts.metas:
        page = boxes.read_page(_value(meta))
        keep = boxes.outer(page.paragraphs, settings.nested)
        kept = page.paragraphs[keep]
        made.append(boxes.text_of(page, keep))
        columns.append(
            [
                len(keep),
                len(keep) - int(keep.sum()),
                boxes.coverage(kept, 0) if len(kept) else numpy.nan,
                boxes.coverage(kept, 1) if len(kept) else numpy.nan,
                boxes.largest_overlap(kept),
                boxes.least_density(page, keep),
                boxes.unsure_paragraphs(page, settings.unsure),
            ]
        )
    names = (
        "paragraphs",
        "nested",
        "horizontal_coverage",
        "vertical_coverage",
        "largest_overlap",
        "least_density",
        "unsure",
    )
    values = numpy.array(columns, dtype=numpy.float64).reshape(-1, len(names)).T
    return Mapped(made, dict(zip(names, values, strict=True)))


def _value(meta: str) -> object:
    try:
        return json.loads(meta)
    except (ValueError, RecursionError):
        raise BadDocument("no boxes stand beside this document") from None
