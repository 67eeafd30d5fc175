"""Exact duplicates, and fragments (messages of a catalogue, paragraphs of a page) joined into documents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from puna.data.kinds import Kind, texts_of
from puna.data.ledger import Tally
from puna.data.sources.common import Item


@dataclass
class Seen:
    """Remembers texts by a 64-bit hash, so that each is kept once. Grows by about 60 bytes a text."""

    held_out: set[int] = field(default_factory=set)
    train: set[int] = field(default_factory=set)

    def filter(self, items: Iterable[Item], kind: Kind, tally: Tally, *, held_out: bool) -> Iterator[Item]:
        """The items whose text did not come before; of training items also those not held out."""
        own = self.held_out if held_out else self.train
        for item in items:
            identity = _identity(kind, item)
            if identity in own:
                tally.drop("duplicate")
            elif not held_out and identity in self.held_out:
                tally.drop("also held out")
            else:
                own.add(identity)
                tally.keep()
                yield item


def _identity(kind: Kind, item: Item) -> int:
    joined = "\0".join(" ".join(text.split()) for text in texts_of(kind, item.row))
    return int.from_bytes(hashlib.blake2b(joined.encode(), digest_size=8).digest(), "big")


def join_fragments(items: Iterable[Item], characters: int) -> Iterator[Item]:
    """Join consecutive fragments of one source document, one a line, into texts of about ``characters``.

    A text is closed before the fragment that would take it past ``characters``; a longer fragment
    stays whole. Items that are no fragments pass as they are. The order stays.
    """
    group: list[Item] = []
    size = 0
    for item in items:
        length = len(item.row.get("text", "")) + 1
        starts_anew = bool(group) and (
            item.document != group[0].document or not item.fragment or size + length > characters
        )
        if starts_anew:
            yield _joined(group)
            group, size = [], 0
        if item.fragment:
            group.append(item)
            size += length
        else:
            yield item
    if group:
        yield _joined(group)


def _joined(group: list[Item]) -> Item:
    first = group[0]
    text = "\n".join(item.row["text"].strip("\n") for item in group)
    return Item(first.document, {**first.row, "text": text}, first.index)
