"""Which questions share a prompt: drawn at random, or alike ones together by k-means.

Batch prompting of system S71 (arXiv:2308.16361), which draws its batches at random or from clusters.
A question's vector counts the hashed three-letter runs of its cells, of length 1; k-means (Lloyd, 1982)
starts from centres drawn far apart (k-means++, Arthur and Vassilvitskii 2007). The paper clusters
embeddings of a sentence model, which is not needed here: rows that look alike share letters.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Literal

import numpy
from numpy.typing import NDArray

from puna.core.seeds import numpy_generator
from puna.data.tables.questions import Question

Grouping = Literal["random", "clusters"]
_WIDTH = 512  # places of a vector
_ROUNDS = 25
Vectors = NDArray[numpy.float64]


def group(questions: Sequence[Question], size: int, how: Grouping, seed: int) -> list[list[int]]:
    """Places of ``questions`` in groups of ``size``, the last perhaps smaller; every place is in one.

    Of clusters what does not fill a group goes on with the next cluster. Time grows with questions
    times groups.
    """
    generator = numpy_generator(seed, "grouping")
    order = [int(place) for place in generator.permutation(len(questions))]
    if how == "clusters" and len(questions) > size:
        clusters = -(-len(questions) // size)
        labels = k_means(vectors([questions[place] for place in order]), clusters, generator)
        order = [order[int(place)] for place in numpy.argsort(labels, kind="stable")]
    return [order[start : start + size] for start in range(0, len(order), size)]


def vectors(questions: Sequence[Question]) -> Vectors:
    """A vector of length 1 for each question ``[questions, 512]``."""
    found = numpy.zeros((len(questions), _WIDTH))
    for number, question in enumerate(questions):
        for row in question.records:
            for cell in row.values():
                text = f" {cell} ".casefold()
                for start in range(len(text) - 2):
                    found[number, zlib.crc32(text[start : start + 3].encode()) % _WIDTH] += 1
    lengths: Vectors = numpy.linalg.norm(found, axis=1, keepdims=True)
    return numpy.asarray(found / numpy.maximum(lengths, 1e-12))


def k_means(points: Vectors, clusters: int, generator: numpy.random.Generator) -> NDArray[numpy.int64]:
    """The cluster of each of ``points`` [points, width], numbered from 0; some may stay empty."""
    centres = _far_apart(points, clusters, generator)
    labels = numpy.full(len(points), -1)
    for _ in range(_ROUNDS):
        found = _distances(points, centres).argmin(1)
        if (found == labels).all():
            break
        labels = found
        for cluster in range(len(centres)):
            members = points[labels == cluster]
            if len(members):
                centres[cluster] = members.mean(0)
    return labels


def _far_apart(points: Vectors, clusters: int, generator: numpy.random.Generator) -> Vectors:
    chosen = [int(generator.integers(len(points)))]
    nearest = _distances(points, points[chosen])[:, 0]
    while len(chosen) < clusters and nearest.sum() > 0:
        chosen.append(int(generator.choice(len(points), p=nearest / nearest.sum())))
        nearest = numpy.minimum(nearest, _distances(points, points[chosen[-1:]])[:, 0])
    return numpy.asarray(points[chosen])


def _distances(points: Vectors, centres: Vectors) -> Vectors:
    """Squared distances [points, centres], never below 0."""
    squares = (points**2).sum(1)[:, None] + (centres**2).sum(1)[None]
    return numpy.asarray(numpy.maximum(squares - 2 * points @ centres.T, 0.0))
