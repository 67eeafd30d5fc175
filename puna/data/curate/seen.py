"""Texts of documents as they came to a step of a pipeline, for showing what it decided about.

A pool stores texts as they were read and as phases left them, of dropped documents only the former: what
extraction and mappers had made of them is made again here, for the few that are shown.
"""

from __future__ import annotations

from collections.abc import Sequence

from puna.core.errors import PunaError
from puna.data.curate.documents import Documents
from puna.data.curate.execute import Pages, execute
from puna.data.curate.pool import Pool


def as_seen(
    pool: Pool, shard: str, phase: int, rows: Sequence[int], label: str
) -> tuple[Documents, list[str]]:
    """The documents at ``rows`` as they come to a phase, and their texts as they come to its step ``label``.

    Where a mapper cannot be run any more (its model is gone), texts are those that came to the phase.
    """
    documents = pool.documents(shard, phase, rows=rows)
    before = []
    for step in pool.phases[phase].steps:
        if step.label == label:
            break
        if step.kind in ("extract", "map"):
            before.append(step)
    entry = pool.phases[phase].entry
    if not before or (entry is not None and entry.label == label):
        return documents, documents.texts.texts
    pages = None
    if any(content is not None for content in documents.contents):
        pages = Pages(documents.contents, documents.media)
    try:
        done = execute(before, documents.texts, pages=pages, everything=True)
    except PunaError:
        return documents, documents.texts.texts
    old = documents.texts.texts
    return documents, [text if new is None else new for new, text in zip(done.texts, old, strict=True)]
