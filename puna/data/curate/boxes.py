"""Boxes of a scanned page, as OCR services write them, and what they say about the page.

The JSON is that of Google's Vision and Document AI: blocks hold paragraphs, these words, these symbols;
every box has corners ``normalizedVertices`` between 0 and 1, of which a coordinate of 0 may be left out.
Boxes are taken as upright rectangles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from puna.data.curate.operator import BadDocument

Rectangles = NDArray[numpy.float64]  # [n, 4] left, top, right, bottom
_SPACES = {"SPACE": " ", "SURE_SPACE": " ", "EOL_SURE_SPACE": " ", "LINE_BREAK": "\n"}


@dataclass(frozen=True)
class Page:
    """A page's ``blocks`` and ``paragraphs`` as rectangles, and of each paragraph its block and words."""

    blocks: Rectangles
    paragraphs: Rectangles
    block_of: NDArray[numpy.int64]
    words: list[list[Mapping[str, Any]]]


def read_page(value: Any) -> Page:
    """A page of JSON; one that is none is a ``BadDocument``. ``blocks`` may stand inside ``pages``."""
    blocks, paragraphs, block_of, words = [], [], [], []
    for block in _blocks(value):
        blocks.append(_rectangle(block))
        for paragraph in _list(block, "paragraphs"):
            paragraphs.append(_rectangle(paragraph))
            block_of.append(len(blocks) - 1)
            words.append(_list(paragraph, "words"))
    return Page(
        numpy.array(blocks).reshape(-1, 4),
        numpy.array(paragraphs).reshape(-1, 4),
        numpy.array(block_of, dtype=numpy.int64),
        words,
    )


def _blocks(value: Any) -> list[Mapping[str, Any]]:
    if isinstance(value, Mapping) and "blocks" not in value:
        for key in ("fullTextAnnotation", "responses", "pages"):
            if key in value:
                inner = value[key] if isinstance(value[key], list) else [value[key]]
                return [block for part in inner for block in _blocks(part)]
    return _list(value, "blocks")


def _list(value: Any, key: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, Mapping):
        raise BadDocument(f"boxes: not a mapping where {key} are expected")
    found = value.get(key, [])
    if not isinstance(found, list) or not all(isinstance(one, Mapping) for one in found):
        raise BadDocument(f"boxes: {key} are no list of mappings")
    return found


def _rectangle(value: Mapping[str, Any]) -> list[float]:
    box = value.get("boundingBox") or value.get("boundingPoly")
    corners = box.get("normalizedVertices") if isinstance(box, Mapping) else None
    if not isinstance(corners, list) or len(corners) < 2:
        raise BadDocument("boxes: a box without normalizedVertices")
    try:
        across = [float(corner.get("x") or 0.0) for corner in corners]
        down = [float(corner.get("y") or 0.0) for corner in corners]
    except (AttributeError, TypeError, ValueError):
        raise BadDocument("boxes: a corner is no pair of numbers") from None
    return [min(across), min(down), max(across), max(down)]


def areas(boxes: Rectangles) -> NDArray[numpy.float64]:
    """[n] area of each."""
    result: NDArray[numpy.float64] = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return result


def intersections(boxes: Rectangles) -> NDArray[numpy.float64]:
    """[n, n] area that each pair shares."""
    left, top, right, bottom = (boxes[:, side] for side in range(4))
    width = numpy.minimum(right[:, None], right) - numpy.maximum(left[:, None], left)
    height = numpy.minimum(bottom[:, None], bottom) - numpy.maximum(top[:, None], top)
    result: NDArray[numpy.float64] = numpy.maximum(width, 0) * numpy.maximum(height, 0)
    return result


def outer(boxes: Rectangles, share: float = 0.95) -> NDArray[numpy.bool_]:
    """[n] which boxes lie in no larger one that stays: with more than ``share`` of their area, or wholly.

    From the largest on; of boxes of one size the first counts as larger. A box without area goes if any
    larger box stays that holds it.
    """
    size = areas(boxes)
    shared = intersections(boxes)
    keep = numpy.ones(len(boxes), dtype=bool)
    order = numpy.argsort(-size, kind="stable").tolist()
    for rank, place in enumerate(order):
        for larger in order[:rank]:
            if not keep[larger]:
                continue
            inside = (boxes[larger, :2] <= boxes[place, :2]).all()
            inside = inside and (boxes[larger, 2:] >= boxes[place, 2:]).all()
            if inside or (size[place] > 0 and shared[larger, place] / size[place] > share):
                keep[place] = False
                break
    return keep


def coverage(boxes: Rectangles, axis: int) -> float:
    """Length of the page's width (``axis`` 0) or height (1) that some box covers, as a share of the page."""
    spans = boxes[:, [axis, axis + 2]]
    total, end = 0.0, -numpy.inf
    for start, stop in spans[numpy.argsort(spans[:, 0], kind="stable")].tolist():
        total += max(stop - max(start, end), 0.0)
        end = max(end, stop)
    return total


def largest_overlap(boxes: Rectangles) -> float:
    """The largest intersection over union of two boxes; nan with fewer than two that have an area."""
    size = areas(boxes)
    shared = intersections(boxes)
    union = size[:, None] + size - shared
    pairs = numpy.triu(numpy.ones_like(shared, dtype=bool), k=1) & (union > 0)
    return float((shared[pairs] / union[pairs]).max()) if pairs.any() else float("nan")


def least_density(page: Page, keep: NDArray[numpy.bool_]) -> float:
    """The least share of a block that its kept paragraphs fill; nan without a block that has some."""
    filled = numpy.bincount(
        page.block_of[keep], weights=areas(page.paragraphs)[keep], minlength=len(page.blocks)
    )
    size = areas(page.blocks)
    known = (size > 0) & (filled > 0)
    return float((filled[known] / size[known]).min()) if known.any() else float("nan")


def unsure_paragraphs(page: Page, least: float = 0.5) -> float:
    """Share of paragraphs of whose words fewer than ``least`` are in the most frequent language.

    A word's language is the most probable of those that OCR says; words without one do not count, and a
    paragraph without such words is not unsure. nan without paragraphs.
    """
    if not page.words:
        return float("nan")
    unsure = 0
    for words in page.words:
        languages = Counter(filter(None, map(_language, words)))
        total = sum(languages.values())
        unsure += bool(total) and max(languages.values()) / total < least
    return unsure / len(page.words)


def _language(word: Mapping[str, Any]) -> str:
    told = word.get("property")
    found = told.get("detectedLanguages") if isinstance(told, Mapping) else None
    if not isinstance(found, list) or not found:
        return ""
    best = max(found, key=lambda one: float(one.get("confidence") or 0.0))
    return str(best.get("languageCode") or "")


def text_of(page: Page, keep: NDArray[numpy.bool_]) -> str:
    """The symbols of the kept paragraphs in order, with the spaces and breaks that OCR says of them."""
    chosen = (words for words, kept in zip(page.words, keep.tolist(), strict=True) if kept)
    return "".join(_symbols(word) for words in chosen for word in words)


def _symbols(word: Mapping[str, Any]) -> str:
    parts: list[str] = []
    for symbol in _list(word, "symbols"):
        parts.append(str(symbol.get("text") or ""))
        told = symbol.get("property")
        found = told.get("detectedBreak") if isinstance(told, Mapping) else None
        kind = found.get("type") if isinstance(found, Mapping) else None
        parts.append(_SPACES.get(str(kind), ""))
    return "".join(parts)
