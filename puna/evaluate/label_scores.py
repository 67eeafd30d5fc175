"""Scores of labels: accuracy, macro F1, and F1 of entities under strict IOB2, as seqeval counts them.

An entity begins with ``B-`` of its type and goes on with ``I-`` of the same type; an ``I-`` that follows
neither is no entity at all (seqeval's ``mode="strict", scheme=IOB2``; Ramshaw and Marcus 1995 for the
tags). It is found if both its ends and its type are right. Entities of what was cut off count as missed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Entity = tuple[int, int, str]
"""First word, word behind the last, type."""
UNSAID = ""
"""What stands where a model said no label."""


def entities(labels: Sequence[str]) -> list[Entity]:
    """The entities of one sentence, in order."""
    found: list[Entity] = []
    start, kind = 0, None
    for place, label in enumerate([*labels, "O"]):
        prefix, _, name = label.partition("-")
        if kind is not None and not (prefix == "I" and name == kind):
            found.append((start, place, kind))
            kind = None
        if prefix == "B":
            start, kind = place, name
    return found


def has_entities(names: Iterable[str]) -> bool:
    """Whether labels are those of IOB2: all are O, B- or I- with a type, and there is a B-."""
    parts = [name.partition("-") for name in names]
    good = all(
        name == "O" or (prefix in ("B", "I") and rest)
        for name, (prefix, _, rest) in zip(names, parts, strict=True)
    )
    return good and any(prefix == "B" for prefix, _, _ in parts)


@dataclass(frozen=True)
class Scores:
    """Shares between 0 and 1; ``entity_f1`` is None where labels are not those of entities."""

    accuracy: float
    macro_f1: float
    entity_f1: float | None

    def metrics(self, suffix: str = "") -> dict[str, float]:
        """By flat dotted names."""
        found = {f"accuracy{suffix}": self.accuracy, f"macro_f1{suffix}": self.macro_f1}
        return found if self.entity_f1 is None else {**found, f"entity_f1{suffix}": self.entity_f1}


def score(said: Sequence[Sequence[str]], true: Sequence[Sequence[str]]) -> Scores:
    """Compare the labels of each row; a text is a row of one. Macro F1 is over the labels that are true."""
    pairs = Counter(
        (one, other)
        for row, wanted in zip(said, true, strict=True)
        for one, other in zip(row, wanted, strict=True)
    )
    right = sum(count for (one, other), count in pairs.items() if one == other)
    names = sorted({name for _, name in pairs})
    each = [_f1_of(name, pairs) for name in names]
    f1 = None
    if has_entities(names):
        f1 = entity_f1(said, true)
    return Scores(right / sum(pairs.values()), sum(each) / len(each), f1)


def _f1_of(name: str, pairs: Counter[tuple[str, str]]) -> float:
    hits = pairs[name, name]
    said = sum(count for (one, _), count in pairs.items() if one == name)
    true = sum(count for (_, other), count in pairs.items() if other == name)
    return 2 * hits / (said + true)


def entity_f1(said: Sequence[Sequence[str]], true: Sequence[Sequence[str]]) -> float:
    """F1 of entities over all rows together; 0 where nothing is found, or nothing is there."""
    hits = found = wanted = 0
    for row, labels in zip(said, true, strict=True):
        ours, theirs = set(entities(row)), set(entities(labels))
        hits += len(ours & theirs)
        found += len(ours)
        wanted += len(theirs)
    return 2 * hits / (found + wanted) if hits else 0.0


def majority(true: Sequence[Sequence[str]], seen: Mapping[str, int]) -> list[list[str]]:
    """Always the label most often ``seen`` in training, by its count, of equals the first by name."""
    best = min(seen, key=lambda name: (-seen[name], name))
    return [[best] * len(row) for row in true]
