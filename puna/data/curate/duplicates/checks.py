"""What is promised of duplicates, measured: bands and rows, the curve of what is found, filters, clusters."""

from __future__ import annotations

from itertools import pairwise

import numpy
from numpy.typing import NDArray

from puna.core.seeds import derive, numpy_generator
from puna.data.curate.duplicates.bloom import BloomFilter
from puna.data.curate.duplicates.in_memory import over_batches
from puna.data.curate.duplicates.lsh import bands_and_rows, found
from puna.data.curate.duplicates.minhash import band_keys, signatures
from puna.data.curate.duplicates.settings import DuplicateChecksParameters
from puna.data.curate.texts import Texts

_THRESHOLDS = (1.0, 0.9, 0.8, 0.7)
_SIMILARITIES = (0.7, 0.8, 0.9)
_PERMUTATIONS = 128
_MEMBERS = 300
_VOCABULARY = 20_000
_DRAWS = 10


def checks(parameters: DuplicateChecksParameters, seed: int) -> dict[str, float]:
    """All of them, by name."""
    figures: dict[str, float] = {}
    for threshold in _THRESHOLDS:
        bands, rows = bands_and_rows(threshold, _PERMUTATIONS)
        figures |= {f"bands.{threshold}": float(bands), f"rows.{threshold}": float(rows)}
    figures |= _curve(parameters.pairs, seed)
    figures |= _filter(parameters.capacity, seed)
    figures |= _clusters(parameters.documents, seed)
    figures |= _second_copies(parameters.documents, seed)
    return figures


def _shared_out(whole: int, parts: int) -> list[int]:
    """``whole`` in at most ``parts`` nearly equal parts, none of them empty."""
    edges = [whole * part // parts for part in range(parts + 1)]
    return [high - low for low, high in pairwise(edges) if high > low]


def _hashes(generator: numpy.random.Generator, count: int) -> NDArray[numpy.uint64]:
    return generator.integers(0, 1 << 64, count, dtype=numpy.uint64)


def _curve(pairs: int, seed: int) -> dict[str, float]:
    """How often pairs of a similarity share a band of 9 bands of 13 rows, and how often they should."""
    generator = numpy_generator(seed, "pairs")
    bands, rows = bands_and_rows(0.8, _PERMUTATIONS)
    figures: dict[str, float] = {}
    for similarity in _SIMILARITIES:
        shared = round(2 * _MEMBERS * similarity / (1 + similarity))
        hits = 0
        # One draw of permutations errs for all pairs alike: there are several.
        for draw, count in enumerate(_shared_out(pairs, _DRAWS)):
            hashes = []
            for _ in range(count):
                common = _hashes(generator, shared)
                for _ in range(2):
                    hashes += [common, _hashes(generator, _MEMBERS - shared)]
            bounds = numpy.arange(2 * count + 1) * _MEMBERS
            drawn = derive(seed, "permutations", similarity, draw)
            made = signatures(numpy.concatenate(hashes), bounds, bands * rows, drawn)
            keys = band_keys(made, numpy.ones(2 * count, dtype=bool), bands, rows)
            hits += int((keys[:, ::2] == keys[:, 1::2]).any(axis=0).sum())
        share = hits / pairs
        exact = shared / (2 * _MEMBERS - shared)
        figures[f"found.{similarity}"] = share
        figures[f"found.deviation_{similarity}"] = share - found(exact, bands, rows)
    figures["found.deviation"] = max(abs(figures[f"found.deviation_{j}"]) for j in _SIMILARITIES)
    return figures


def _filter(capacity: int, seed: int) -> dict[str, float]:
    """False positives of a Bloom filter that holds as many members as it is made for."""
    every = numpy.unique(_hashes(numpy_generator(seed, "members"), 3 * capacity))
    every = numpy_generator(seed, "order").permutation(every)
    held = BloomFilter.for_capacity(capacity, 0.01)
    held.add(every[:capacity])
    return {
        "bloom.false_positives": float(held.contains(every[capacity:]).mean()),
        "bloom.missed": float((~held.contains(every[:capacity])).mean()),
        "bloom.bits": held.bits / capacity,
        "bloom.hashes": float(held.hashes),
    }


def _pages(count: int, words: int, generator: numpy.random.Generator) -> list[list[str]]:
    return [[f"w{n}" for n in generator.integers(0, _VOCABULARY, words)] for _ in range(count)]


def _clusters(documents: int, seed: int) -> dict[str, float]:
    """Chains of near-duplicates: whether who shares a band with a member is in, and survivors for each."""
    generator = numpy_generator(seed, "chains")
    chains: list[list[str]] = []
    for words in _pages(documents // 4, 120, generator):
        chain = [list(words)]
        for step in range(3):  # Each differs from the one before in a place of its own.
            changed = list(chain[-1])
            changed[30 * step] = f"other{step}"
            chain.append(changed)
        chains += chain
    texts = [" ".join(words) for words in chains]
    shards = [Texts(texts[start::3]) for start in range(3)]
    told = list(over_batches("dedup.minhash", shards, threshold=0.7, permutations=256))
    cluster, duplicate = (
        numpy.concatenate([numpy.asarray(batch.signals[name]) for batch in told])
        for name in ("cluster", "duplicate")
    )
    names, counts = numpy.unique(cluster, return_counts=True)
    survivors = numpy.array([(duplicate[cluster == name] == 0).sum() for name in names])
    order = numpy.argsort(numpy.concatenate([numpy.arange(start, len(texts), 3) for start in range(3)]))
    in_chain = cluster[order].reshape(-1, 4)
    return {
        "clusters.survivors_least": float(survivors.min()),
        "clusters.survivors_most": float(survivors.max()),
        "clusters.whole_chains": float(numpy.mean([len(set(row)) == 1 for row in in_chain.tolist()])),
        "clusters.strangers": float((counts > 4).sum()),
    }


def _second_copies(documents: int, seed: int) -> dict[str, float]:
    """Pages of 13 words and more that come twice: first copies lost, and second copies kept."""
    generator = numpy_generator(seed, "pages")
    sizes = generator.integers(13, 200, documents)
    bounds = numpy.concatenate([[0], numpy.cumsum(sizes)])
    words = [f"w{n}" for n in generator.integers(0, _VOCABULARY, int(bounds[-1]))]
    pages = [" ".join(words[start:end]) for start, end in pairwise(bounds.tolist())]
    half = documents // 2
    shards = [Texts(pages[:half]), Texts(pages[half:] + pages[:half]), Texts(pages[half:])]
    told = over_batches("dclm.bloom", shards)
    duplicate = numpy.concatenate([numpy.asarray(batch.signals["duplicate"]) for batch in told])
    return {
        "copies.first_lost": float((duplicate[:documents] != 0).sum()),
        "copies.second_kept": float((duplicate[documents:] != 1).sum()),
    }
