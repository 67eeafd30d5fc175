"""Exact duplicates: documents with the same normalised text, or the same address.

Keys are 128 bits of BLAKE2, so that nobody can make two texts that share one. The normalisations are named:

- ``none``: the text as it is.
- ``stripped``: without white space at its ends (Data-Juicer's default, arXiv:2309.02033).
- ``lower``: stripped, in lower case.
- ``letters``: without white space, digits and ASCII punctuation; case counts (Data-Juicer's
  ``ignore_non_character``).
- ``lower_letters``: both.
- ``words``: lower case, without ASCII punctuation, words joined by one space, decomposed (NFD), as
  RedPajama-V2 normalises (arXiv:2411.12372).
"""

from __future__ import annotations

import hashlib
import re
import string
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy
from numpy.typing import NDArray

from puna.data.curate.duplicates.clusters import Clusters
from puna.data.curate.duplicates.shares import CLUSTER_SIGNALS, ClusterSettings, first_places, told
from puna.data.curate.operator import Resolved, Sketch, SketchColumns, global_operator
from puna.data.curate.texts import Texts

_NOT_LETTERS = re.compile(rf"[\s\d{re.escape(string.punctuation)}]+")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _words(text: str) -> str:
    return unicodedata.normalize("NFD", " ".join(text.translate(_NO_PUNCTUATION).lower().split()))


Normalisation = Literal["none", "stripped", "lower", "letters", "lower_letters", "words"]
NORMALISATIONS: dict[Normalisation, Callable[[str], str]] = {
    "none": lambda text: text,
    "stripped": str.strip,
    "lower": lambda text: text.strip().lower(),
    "letters": lambda text: _NOT_LETTERS.sub("", text),
    "lower_letters": lambda text: _NOT_LETTERS.sub("", text.lower()),
    "words": _words,
}


class ExactSettings(ClusterSettings):
    """Settings of exact duplicates."""

    normalise: Normalisation = "stripped"
    """What is done to texts before they are compared."""


def digests(strings: Sequence[str]) -> NDArray[numpy.uint64]:
    """[n, 2] 128 bits of each string."""
    made = b"".join(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in strings
    )
    return numpy.frombuffer(made, dtype="<u8").reshape(-1, 2)


def _columns(texts: Texts, strings: Sequence[str]) -> SketchColumns:
    keys = digests(strings)
    compared = numpy.array([bool(text) for text in strings], dtype=bool)
    return {"low": keys[:, 0], "high": keys[:, 1], "compared": compared, "length": texts.lengths}


def _clusters(sketches: Sequence[Sketch], keys_at_once: int) -> Clusters:
    """Clusters of equal keys of 128 bits; more than ``keys_at_once`` are sorted in parts."""
    firsts = first_places(sketches)
    clusters = Clusters(firsts[-1])
    parts = -(-firsts[-1] // keys_at_once)
    for part in range(parts):
        keys, places = [], []
        for sketch, first in zip(sketches, firsts, strict=False):
            low = sketch.read("low")
            wanted = sketch.read("compared").astype(bool) & (low % numpy.uint64(parts) == part)
            chosen = numpy.flatnonzero(wanted)
            keys.append(numpy.stack([low[chosen], sketch.read("high")[chosen]], axis=1))
            places.append(chosen + first)
        clusters.join_equal(numpy.concatenate(keys), numpy.concatenate(places))
    return clusters


@global_operator("dedup.exact", settings=ExactSettings, signals=CLUSTER_SIGNALS, source="arXiv:2309.02033")
class Exact:
    """Clusters of documents whose normalised texts are the same; one without any is compared with nothing.

    On disk 16 bytes per document. Memory: 32 bytes per document, and 64 for each of ``keys_at_once``.
    """

    def sketch(self, texts: Texts, settings: ExactSettings) -> SketchColumns:
        """128 bits of each normalised text."""
        normalise = NORMALISATIONS[settings.normalise]
        return _columns(texts, [normalise(text) for text in texts.texts])

    def resolve(self, sketches: Sequence[Sketch], settings: ExactSettings, work: Path) -> Iterator[Resolved]:
        """The clusters."""
        yield from told(_clusters(sketches, settings.keys_at_once), sketches, settings.survivor)


class AddressSettings(ClusterSettings):
    """Settings of duplicates by address."""

    survivor: Literal["first", "longest"] = "longest"
    """Which document of a cluster is kept: the first in the order of the shards, or the longest one (of
    equally long ones the first)."""


@global_operator(
    "dedup.url", settings=AddressSettings, signals=CLUSTER_SIGNALS, source="arXiv:2306.01116 (RefinedWeb)"
)
class Address:
    """Clusters of documents with the same address, letter by letter; one without is compared with nothing.

    On disk 16 bytes per document. Memory: 32 bytes per document, and 64 for each of ``keys_at_once``.
    """

    def sketch(self, texts: Texts, settings: AddressSettings) -> SketchColumns:
        """128 bits of each address."""
        return _columns(texts, texts.urls)

    def resolve(
        self, sketches: Sequence[Sketch], settings: AddressSettings, work: Path
    ) -> Iterator[Resolved]:
        """The clusters."""
        yield from told(_clusters(sketches, settings.keys_at_once), sketches, settings.survivor)
