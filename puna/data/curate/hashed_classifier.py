"""A classifier of texts: hashed counts of words and logistic regression (S50's quality classifier).

Words are what white space parts, in lower case (Spark's ``Tokenizer``); a word's place among 2**18 features
is its hash, and a document's features are the counts of its words (``HashingTF``). Simplified: the hash is
this project's and not MurmurHash 3, so that a model of Data-Juicer's cannot be read.

The weights are found by L-BFGS on the mean logistic loss, without a penalty as Spark's default has none,
in float64.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
from numpy.typing import NDArray

from puna.core.errors import PunaError
from puna.core.files import write_aside
from puna.data.curate.segments import by_document
from puna.data.curate.texts import Texts

FEATURES = 1 << 18
Vector = NDArray[numpy.float64]


@dataclass(frozen=True)
class HashedClassifier:
    """``weights`` [features] and ``bias``: the probability of a document is the sigmoid of their sum."""

    weights: Vector
    bias: float

    def probabilities(self, texts: Texts) -> Vector:
        """[count] how probable it is that each document is of the good kind."""
        places, bounds = features(texts, len(self.weights))
        return _sigmoid(by_document(self.weights[places], bounds) + self.bias)

    def save(self, path: Path) -> None:
        """Write it as safetensors."""
        from safetensors.numpy import save_file

        with write_aside(path) as aside:
            tensors = {"weights": self.weights, "bias": numpy.array([self.bias])}
            save_file(tensors, aside, metadata={"kind": "hashed counts, logistic regression"})

    @classmethod
    def load(cls, path: Path) -> HashedClassifier:
        """Read one that was saved."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            tensors = load_file(path)
            weights, bias = tensors["weights"], tensors["bias"]
        except FileNotFoundError:
            raise PunaError("no such classifier", where=path) from None
        except (SafetensorError, KeyError, OSError) as error:
            raise PunaError("not a classifier of hashed counts", where=path, found=error) from None
        if weights.ndim != 1 or bias.shape != (1,):
            raise PunaError("not a classifier of hashed counts", where=path, found=weights.shape)
        return cls(weights.astype(numpy.float64), float(bias[0]))


def features(texts: Texts, size: int = FEATURES) -> tuple[NDArray[numpy.int64], NDArray[numpy.int64]]:
    """The place of each word's feature [words], and the bounds [count + 1] of each document's words."""
    words = texts.lower.words("white_space")
    return (words.hashes % numpy.uint64(size)).astype(numpy.int64), words.bounds


def train(
    good: Sequence[str], bad: Sequence[str], *, size: int = FEATURES, iterations: int = 100
) -> HashedClassifier:
    """Learn to tell ``good`` texts from ``bad`` ones.

    Time grows with words times iterations, memory with words and 20 vectors of ``size``.
    """
    if not good or not bad:
        raise PunaError("a classifier learns from texts of both kinds", found=f"{len(good)} and {len(bad)}")
    places, bounds = features(Texts([*good, *bad]), size)
    document = numpy.repeat(numpy.arange(len(bounds) - 1), numpy.diff(bounds))
    labels = numpy.concatenate([numpy.ones(len(good)), numpy.zeros(len(bad))])

    def loss(point: Vector) -> tuple[float, Vector]:
        scores = by_document(point[places], bounds) + point[-1]
        # log(1 + exp(-score)) of good ones, log(1 + exp(score)) of bad ones.
        value = float(numpy.mean(numpy.logaddexp(0, numpy.where(labels == 1, -scores, scores))))
        residual = (_sigmoid(scores) - labels) / len(labels)
        gradient = numpy.zeros_like(point)
        gradient[:size] = numpy.bincount(places, weights=residual[document], minlength=size)
        gradient[-1] = residual.sum()
        return value, gradient

    point = minimise(loss, numpy.zeros(size + 1), iterations)
    return HashedClassifier(point[:size], float(point[-1]))


def minimise(
    loss: Callable[[Vector], tuple[float, Vector]], point: Vector, iterations: int, memory: int = 10
) -> Vector:
    """Minimise a smooth function by L-BFGS with backtracking; stops when nothing gets better."""
    value, gradient = loss(point)
    pairs: deque[tuple[Vector, Vector]] = deque(maxlen=memory)
    for _ in range(iterations):
        direction = -_two_loops(gradient, pairs)
        slope = float(gradient @ direction)
        if slope > -1e-12:
            break
        step = 1.0 if pairs else min(1.0, 1.0 / max(float(numpy.abs(gradient).sum()), 1e-12))
        for _ in range(30):
            tried = point + step * direction
            new_value, new_gradient = loss(tried)
            if new_value <= value + 1e-4 * step * slope:
                break
            step /= 2
        else:
            break
        moved, turned = tried - point, new_gradient - gradient
        if float(moved @ turned) > 1e-12:
            pairs.append((moved, turned))
        better = value - new_value
        point, value, gradient = tried, new_value, new_gradient
        if better < 1e-9:
            break
    return point


def _two_loops(gradient: Vector, pairs: Sequence[tuple[Vector, Vector]]) -> Vector:
    """The gradient times the inverse curvature that the last moves tell of."""
    result = gradient.copy()
    factors: list[float] = []
    for moved, turned in reversed(pairs):
        factors.append(float(moved @ result) / float(moved @ turned))
        result -= factors[-1] * turned
    if pairs:
        moved, turned = pairs[-1]
        result *= float(moved @ turned) / float(turned @ turned)
    for (moved, turned), factor in zip(pairs, reversed(factors), strict=True):
        result += (factor - float(turned @ result) / float(moved @ turned)) * moved
    return result


def _sigmoid(scores: Vector) -> Vector:
    result: Vector = 0.5 * (1 + numpy.tanh(0.5 * scores))
    return result
