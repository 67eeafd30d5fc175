"""Word alignment of sentence pairs with the model of fast_align, both directions and symmetrised.

The model is the log-linear reparameterisation of IBM Model 2 by Dyer, Chahuneau and Smith (2013, "A
Simple, Fast, and Effective Reparameterization of IBM Model 2"): a word is made by no word of the other
side with a fixed probability, else by one whose place in its sentence is near the diagonal; word
translations have a symmetric Dirichlet prior, used by variational Bayes. The two directions are joined
as in Koehn et al. (2005).

Libraries looked at first: ``fast-align``, ``pyfastalign`` and ``fast_align_python`` have no
distribution in the package index; ``eflomal`` 2.0.0 (2024) is GPL-3 source that needs a C compiler and
Cython; ``simalign`` 0.4 needs a multilingual encoder from a hub. Hence this small one on numpy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy
import numpy.typing

from puna.core.errors import PunaError, unknown_name
from puna.core.progress import Track

Symmetrisation = Literal["intersection", "union", "grow-diag-final-and"]
SYMMETRISATIONS: tuple[Symmetrisation, ...] = ("intersection", "union", "grow-diag-final-and")
Words = Sequence[str]
Ints = numpy.typing.NDArray[numpy.int64]
Floats = numpy.typing.NDArray[numpy.floating[Any]]

NULL_PROBABILITY = 0.08  # that a word has no partner; Dyer et al. use this value
DIRICHLET = 0.01  # prior of each word translation; sparse, as Dyer et al. choose it
FIRST_TENSION = 4.0
TENSION_BOUNDS = (0.1, 14.0)
_NEIGHBOURS = ((-1, 0), (0, -1), (1, 0), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1))


def align(
    pairs: Sequence[tuple[Words, Words]],
    *,
    iterations: int = 5,
    symmetrisation: Symmetrisation = "grow-diag-final-and",
) -> list[Ints]:
    """Align the words of (source words, target words) pairs; compare words as they are given.

    Returns for every pair an int64 array [links, 2] of (source position, target position), sorted; a
    pair with an empty side has none. Nothing is drawn at random. Memory and time grow with the
    number of (source position, target position) cells: about 50 bytes and a microsecond for each.
    """
    if symmetrisation not in SYMMETRISATIONS:
        raise unknown_name("symmetrisation", symmetrisation, SYMMETRISATIONS)
    if iterations < 1:
        raise PunaError("an aligner needs at least one iteration", where="iterations", found=iterations)
    links = [numpy.zeros((0, 2), dtype=numpy.int64)] * len(pairs)
    cells = _Cells(pairs)
    if not cells.groups:
        return links
    best: list[list[Ints]] = []
    with Track("align words", 2 * iterations, "iterations") as track:
        for given in ("source", "target"):
            direction = _Direction(cells, given)
            for _ in range(iterations):
                direction.iterate()
                track.advance()
            best.append(list(direction.best()))
    for group, sources, targets in zip(cells.groups, *best, strict=True):
        for member, source_of, target_of in zip(group.members, sources, targets, strict=True):
            links[member] = _join(source_of.tolist(), target_of.tolist(), symmetrisation)
    return links


@dataclass(frozen=True)
class _Group:
    """All sentence pairs of one shape: their indices, word ids and place among the cells."""

    members: list[int]
    source: Ints  # [pairs, source length]
    target: Ints  # [pairs, target length]
    place: slice

    @property
    def shape(self) -> tuple[int, int, int]:
        """Pairs, source length, target length."""
        return len(self.members), self.source.shape[1], self.target.shape[1]


class _Cells:
    """Every (source position, target position) of a corpus, with the id of its pair of word types.

    Cells of a group lie together as [pairs, source length, target length], so that both directions
    use the same arrays and sum over the one axis or the other.
    """

    def __init__(self, pairs: Sequence[tuple[Words, Words]]) -> None:
        source_ids: dict[str, int] = {}
        target_ids: dict[str, int] = {}
        by_shape: dict[tuple[int, int], list[int]] = {}
        for index, (source, target) in enumerate(pairs):
            if source and target:
                by_shape.setdefault((len(source), len(target)), []).append(index)
        self.groups: list[_Group] = []
        start = 0
        for (rows, columns), members in sorted(by_shape.items()):
            stop = start + len(members) * rows * columns
            left = _numbered([pairs[index][0] for index in members], source_ids)
            right = _numbered([pairs[index][1] for index in members], target_ids)
            self.groups.append(_Group(members, left, right, slice(start, stop)))
            start = stop
        self.types = {"source": len(source_ids), "target": len(target_ids)}
        keys = numpy.empty(start, dtype=numpy.int64)
        for group in self.groups:
            pair = group.source[:, :, None] * len(target_ids) + group.target[:, None, :]
            keys[group.place] = pair.ravel()
        unique, inverse = numpy.unique(keys, return_inverse=True)
        self.pair = inverse.astype(numpy.int32)  # [cells]
        source_type, target_type = numpy.divmod(unique, max(1, len(target_ids)))
        self.type_of_pair = {"source": source_type, "target": target_type}


def _numbered(sentences: list[Words], ids: dict[str, int]) -> Ints:
    return numpy.array([[ids.setdefault(word, len(ids)) for word in words] for words in sentences])


class _Direction:
    """The words of one side, each made by a word of the ``given`` side or by none; learnt by EM."""

    def __init__(self, cells: _Cells, given: str) -> None:
        self._cells = cells
        self._axis = 1 if given == "source" else 2  # of [pairs, source, target]: the given side
        made = "target" if given == "source" else "source"
        self._given_of_pair = cells.type_of_pair[given]
        self._given_types = cells.types[given]
        self._partners = numpy.bincount(self._given_of_pair, minlength=self._given_types)
        self._made_types = cells.types[made]
        self._made = [getattr(group, made) for group in cells.groups]  # each [pairs, made length]
        self._distances = [_distances(group.shape, self._axis) for group in cells.groups]
        self.tension = FIRST_TENSION
        uniform = 1 / self._made_types
        self._translation = numpy.full(len(self._given_of_pair), uniform, dtype=numpy.float32)
        self._unprompted = numpy.full(self._made_types, uniform)  # p(word | no given word)

    def iterate(self) -> None:
        """One expectation over all cells, then new translations and a new tension."""
        posterior = numpy.empty(len(self._cells.pair), dtype=numpy.float32)
        unprompted = numpy.zeros(self._made_types)
        linked: list[Floats] = []  # for each group [made length]: words with a partner, in expectation
        distance = 0.0
        for group, made, distances, joint, null in self._joint():
            total = joint.sum(axis=self._axis) + null  # [pairs, made length]
            joint /= numpy.expand_dims(total, self._axis)
            posterior[group.place] = joint.ravel()
            null /= total
            numpy.add.at(unprompted, made.ravel(), null.ravel())
            mass = joint.sum(axis=0, dtype=numpy.float64)  # [source length, target length]
            distance += float((mass * distances).sum())
            linked.append(mass.sum(axis=self._axis - 1))
        counts = numpy.bincount(self._cells.pair, posterior, minlength=len(self._given_of_pair))
        totals = numpy.bincount(self._given_of_pair, counts, minlength=self._given_types)
        scale = numpy.exp(-_digamma(totals + DIRICHLET * self._partners))
        new = numpy.exp(_digamma(counts + DIRICHLET)) * scale[self._given_of_pair]
        self._translation = new.astype(numpy.float32)
        self._unprompted = unprompted / max(unprompted.sum(), 1e-12)
        self._set_tension(distance, linked)

    def best(self) -> Iterator[Ints]:
        """For each group [pairs, made length]: the likeliest given position, or -1 for none."""
        for _, _, _, joint, null in self._joint():
            best = joint.argmax(axis=self._axis)
            best[joint.max(axis=self._axis) <= null] = -1
            yield best

    def _joint(self) -> Iterator[tuple[_Group, Ints, Floats, Floats, Floats]]:
        """For each group: itself, made words, distances, p(link and word) and p(no link and word)."""
        for group, made, distances in zip(self._cells.groups, self._made, self._distances, strict=True):
            joint = self._translation[self._cells.pair[group.place]].reshape(group.shape)
            joint *= (1 - NULL_PROBABILITY) * self._near(distances)
            yield group, made, distances, joint, NULL_PROBABILITY * self._unprompted[made]

    def _near(self, distances: Floats) -> Floats:
        """p(given position | made position), from the distance to the diagonal."""
        weight = numpy.exp(-self.tension * distances)
        normal: Floats = weight / weight.sum(axis=self._axis - 1, keepdims=True)
        return normal.astype(numpy.float32)

    def _set_tension(self, distance: float, linked: list[Floats], steps: int = 4) -> None:
        """The tension whose expected distance to the diagonal is the one seen (Newton's method)."""
        axis = self._axis - 1
        for _ in range(steps):
            excess, slope = -distance, 0.0
            for distances, words in zip(self._distances, linked, strict=True):
                near = self._near(distances)
                mean = (near * distances).sum(axis=axis)
                excess += float((words * mean).sum())
                slope += float((words * ((near * distances**2).sum(axis=axis) - mean**2)).sum())
            if slope <= 1e-9:  # all sentences have one word: no distances to learn from
                return
            self.tension = float(numpy.clip(self.tension + excess / slope, *TENSION_BOUNDS))


def _distances(shape: tuple[int, int, int], axis: int) -> Floats:
    """How far each (source, target) place is from the diagonal, 0 to 1; [source, target]."""
    _, rows, columns = shape
    # Places count from 1, as in the paper, so that the last words of both sides meet.
    source = numpy.arange(1, rows + 1)[:, None] / rows
    target = numpy.arange(1, columns + 1)[None, :] / columns
    distances: Floats = numpy.abs(source - target)
    return distances


def _digamma(values: Floats) -> Floats:
    """The digamma function for positive ``values``: recurrence up to 6, then its asymptotic series."""
    shifted = values.copy()
    below = numpy.zeros_like(values)
    for _ in range(6):
        below += 1 / shifted
        shifted += 1
    inverse = 1 / (shifted * shifted)
    series = inverse * (1 / 12 - inverse * (1 / 120 - inverse / 252))
    result: Floats = numpy.log(shifted) - 0.5 / shifted - series - below
    return result


def _join(source_of: list[int], target_of: list[int], symmetrisation: Symmetrisation) -> Ints:
    """Join two directions: ``source_of[target]`` and ``target_of[source]``, -1 where there is none."""
    forward = {(source, target) for target, source in enumerate(source_of) if source >= 0}
    backward = {(source, target) for source, target in enumerate(target_of) if target >= 0}
    if symmetrisation == "union":
        links = forward | backward
    else:
        links = forward & backward
        if symmetrisation == "grow-diag-final-and":
            links = _grow(links, forward, backward)
    return numpy.array(sorted(links), dtype=numpy.int64).reshape(-1, 2)


def _grow(
    links: set[tuple[int, int]], forward: set[tuple[int, int]], backward: set[tuple[int, int]]
) -> set[tuple[int, int]]:
    """Grow-diag-final-and: neighbours of links where a word is still free, then pairs of free words."""
    sources = {source for source, _ in links}
    targets = {target for _, target in links}
    union = forward | backward
    fresh = sorted(links)
    while fresh:
        added = []
        for source, target in fresh:
            for down, right in _NEIGHBOURS:
                point = (source + down, target + right)
                if (
                    point in union
                    and point not in links
                    and not (point[0] in sources and point[1] in targets)
                ):
                    links.add(point)
                    sources.add(point[0])
                    targets.add(point[1])
                    added.append(point)
        fresh = added
    for point in [*sorted(forward), *sorted(backward)]:
        if point[0] not in sources and point[1] not in targets:
            links.add(point)
            sources.add(point[0])
            targets.add(point[1])
    return links
