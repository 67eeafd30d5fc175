"""Duplicates: exact, MinHash and SimHash against their definitions, on planted pairs and by hypothesis."""

from __future__ import annotations

import itertools

import numpy
import pytest
from curate_shards import signal
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.core.seeds import numpy_generator
from puna.core.stage import validate
from puna.data.curate.duplicates.clusters import Clusters, edges_of_equal
from puna.data.curate.duplicates.in_memory import over_batches
from puna.data.curate.duplicates.lsh import bands_and_rows, found
from puna.data.curate.duplicates.minhash import band_keys, permutations, signatures, similarity
from puna.data.curate.duplicates.simhash import near_pairs, simhashes
from puna.data.curate.globals.dedup_minhash import MinHashSettings
from puna.data.curate.globals.dedup_simhash import SimHashSettings
from puna.data.curate.texts import Texts

RANDOM = numpy_generator(7, "near duplicates")


@pytest.fixture(autouse=True)
def _the_same_draws_for_each_test():
    """No test depends on those that ran before it."""
    RANDOM.bit_generator.state = numpy_generator(7, "near duplicates").bit_generator.state


def random_hashes(count: int) -> numpy.ndarray:
    return RANDOM.integers(0, 1 << 64, count, dtype=numpy.uint64)


def prose(words: int, vocabulary: int = 5000) -> list[str]:
    return [f"w{number}" for number in RANDOM.integers(0, vocabulary, words)]


# Clusters


@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=30))
def test_clusters_are_the_connected_components(edges):
    clusters = Clusters(20)
    for part in (edges[::2], edges[1::2]):
        pairs = numpy.array(part, dtype=numpy.int64).reshape(-1, 2)
        clusters.join(pairs[:, 0], pairs[:, 1])
    reachable = [{place} for place in range(20)]
    for _ in range(20):
        for a, b in edges:
            both = reachable[a] | reachable[b]
            for place in both:
                reachable[place] = both
    assert clusters.smallest.tolist() == [min(group) for group in reachable]
    assert clusters.sizes().tolist() == [len(group) for group in reachable]


@given(st.lists(st.integers(0, 5), max_size=12), st.integers(1, 2))
def test_equal_keys_lead_to_the_smallest_place(values, words):
    keys = numpy.array(values, dtype=numpy.uint64)
    places = numpy.arange(len(values), dtype=numpy.int64) * 10
    wide = keys if words == 1 else numpy.stack([keys // 2, keys % 2], axis=1)
    left, right = edges_of_equal(wide, places)
    by_hand = {
        (10 * place, 10 * values.index(value))
        for place, value in enumerate(values)
        if values.index(value) < place
    }
    assert set(zip(left.tolist(), right.tolist(), strict=True)) == by_hand


# Bands and rows


@pytest.mark.parametrize(
    ("threshold", "permutations", "shape"),
    [
        (1.0, 128, (1, 128)),
        (0.9, 128, (5, 25)),
        (0.8, 128, (9, 13)),
        (0.7, 128, (14, 9)),
        (0.7, 256, (25, 10)),
        (0.7, 250, (25, 10)),
    ],
)
def test_bands_and_rows_are_those_of_redpajama_and_data_juicer(threshold, permutations, shape):
    assert bands_and_rows(threshold, permutations) == shape
    assert MinHashSettings(threshold=threshold, permutations=permutations).shape() == shape


def test_the_curve_of_nine_bands_of_thirteen_rows():
    assert [round(found(j, 9, 13), 3) for j in (0.7, 0.8, 0.9)] == [0.084, 0.399, 0.929]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"bands": 3}, "together"),
        ({"bands": 20, "rows": 10}, "need 200"),
        ({"threshold": 0.0}, "greater than 0"),
    ],
)
def test_bands_that_do_not_fit_are_told(bad, says):
    with pytest.raises(PunaError, match=says):
        validate(MinHashSettings, bad, where="here")


# MinHash


def test_signatures_are_the_smallest_values_of_each_permutation():
    sizes = [0, 3, 0, 1, 40_000, 5, 0]
    bounds = numpy.concatenate([[0], numpy.cumsum(sizes)])
    hashes = random_hashes(int(bounds[-1]))
    made = signatures(hashes, bounds, 4, seed=3)
    factors, summands = permutations(4, seed=3)
    for document, row in itertools.product(range(len(sizes)), range(4)):
        values = [
            (int(h >> numpy.uint64(32)) * int(factors[row]) + int(summands[row])) % 2**32
            for h in hashes[bounds[document] : bounds[document + 1]]
        ]
        assert made[row, document] == min(values, default=2**32 - 1)


@pytest.mark.parametrize("rows_and_bands", [(13, 9), (9, 14), (5, 25)])
def test_pairs_are_found_as_often_as_the_curve_says(rows_and_bands):
    rows, bands = rows_and_bands
    pairs, members = 700, 300
    for jaccard in (0.7, 0.8, 0.9):
        shared = round(2 * members * jaccard / (1 + jaccard))
        own = members - shared
        hashes = []
        for _ in range(pairs):
            common = random_hashes(shared)
            hashes += [common, random_hashes(own), common, random_hashes(own)]
        bounds = numpy.arange(2 * pairs + 1) * members
        signature = signatures(numpy.concatenate(hashes), bounds, rows * bands, seed=11)
        keys = band_keys(signature, numpy.ones(2 * pairs, dtype=bool), bands, rows)
        share = float((keys[:, ::2] == keys[:, 1::2]).any(axis=0).mean())
        exact = shared / (shared + 2 * own)
        # 700 draws of probability .4 scatter by .0185: .05 is 2.7 of these and the seed is fixed.
        assert share == pytest.approx(found(exact, bands, rows), abs=0.05)
        estimate = numpy.mean([similarity(signature, 2 * pair, 2 * pair + 1) for pair in range(pairs)])
        assert estimate == pytest.approx(exact, abs=0.01)


def near_duplicates(count: int, changed: int) -> tuple[list[str], list[str]]:
    """Distinct documents of 200 words, and copies of them with ``changed`` words in a row replaced."""
    originals, copies = [], []
    for _ in range(count):
        words = prose(200)
        start = int(RANDOM.integers(0, 200 - changed))
        originals.append(" ".join(words))
        words[start : start + changed] = prose(changed)
        copies.append(" ".join(words))
    return originals, copies


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("dedup.minhash", {"threshold": 0.7, "permutations": 256}),
        ("dedup.minhash", {"threshold": 0.7, "ngram": 3, "words": "word_punct"}),
        ("dedup.simhash", {"ngram": 3, "blocks": 9, "distance": 7}),
    ],
)
def test_planted_near_duplicates_are_found_and_distinct_documents_stay(name, chosen):
    originals, copies = near_duplicates(400, changed=2)
    shards = [originals[:250], originals[250:] + copies[:100], copies[100:]]
    duplicate = signal(name, shards, "duplicate", **chosen)
    assert duplicate[400:].mean() >= 0.95
    assert duplicate[:400].mean() <= 0.005


def test_each_cluster_has_one_survivor_and_is_told_alike_in_every_shard():
    originals, copies = near_duplicates(60, changed=2)
    shards = [originals, copies, ["too short", ""]]
    (a, b, c) = over_batches("dedup.minhash", [Texts(s) for s in shards], threshold=0.5)
    cluster = numpy.concatenate([a.signals["cluster"], b.signals["cluster"]])
    duplicate = numpy.concatenate([a.signals["duplicate"], b.signals["duplicate"]])
    size = numpy.concatenate([a.signals["size"], b.signals["size"]])
    for name in numpy.unique(cluster):
        inside = cluster == name
        assert (duplicate[inside] == 0).sum() == 1
        assert (size[inside] == inside.sum()).all()
        assert numpy.flatnonzero(inside)[duplicate[inside] == 0] == name
    assert all(numpy.isnan(values).all() for values in c.signals.values())


def test_the_longest_document_survives_where_that_is_asked_for():
    text = " ".join(prose(100))
    shards = [[text, "other " + " ".join(prose(100))], [text + " more", text + " less"]]
    assert signal("dedup.minhash", shards, "duplicate", threshold=0.5, survivor="longest").tolist() == [
        1,
        0,
        0,
        1,
    ]
    assert signal("dedup.minhash", shards, "duplicate", threshold=0.5).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("name", ["dedup.minhash", "dedup.exact"])
def test_keys_that_do_not_fit_into_memory_at_once_give_the_same_clusters(name):
    originals, copies = near_duplicates(40, changed=1)
    shards = [originals, copies, originals[:10]]
    whole = signal(name, shards, "cluster")
    assert numpy.array_equal(whole, signal(name, shards, "cluster", keys_at_once=7))


def test_the_last_ngram_can_be_left_out():
    shards = [["a b c d e f", "a b c d e g", "a b c d e"]]
    assert signal("dedup.minhash", shards, "duplicate", threshold=1.0, last_ngram=False).tolist()[:2] == [
        0,
        1,
    ]
    assert signal("dedup.minhash", shards, "duplicate", threshold=1.0).tolist() == [0, 0, 0]
    assert numpy.isnan(signal("dedup.minhash", shards, "duplicate", last_ngram=False)[2])


def test_characters_are_compared_where_words_have_no_spaces():
    shards = [["汉字没有空格的文字", "汉字没有空格的文字", "完全不同的一段话语"]]
    assert signal("dedup.minhash", shards, "duplicate", words="characters").tolist() == [0, 1, 0]


def test_redpajamas_words_are_compared_without_case_and_punctuation():
    text = " ".join(prose(40))
    shards = [[text, text.replace(" ", "\n", 5).upper() + "!", text.replace(" ", ", ") + "?"]]
    chosen = {"words": "normalised", "ngram": 13}
    assert signal("dedup.minhash", shards, "duplicate", **chosen).tolist() == [0, 1, 1]
    assert signal("dedup.minhash", shards, "duplicate", ngram=13).tolist() == [0, 1, 0]


# SimHash


@given(st.lists(st.integers(0, 600), min_size=1, max_size=5))
@settings(max_examples=20)
def test_a_bit_is_set_where_most_members_have_it(sizes):
    bounds = numpy.concatenate([[0], numpy.cumsum(sizes)])
    hashes = random_hashes(int(bounds[-1]))
    made = simhashes(hashes, bounds)
    bits = numpy.unpackbits(hashes.view(numpy.uint8).reshape(-1, 8), axis=1, bitorder="little")
    for document, size in enumerate(sizes):
        ones = bits[bounds[document] : bounds[document + 1]].sum(axis=0, dtype=int)
        assert int(made[document]) == sum(1 << bit for bit in range(64) if 2 * ones[bit] > size)


@pytest.mark.parametrize(("blocks", "distance"), [(6, 4), (9, 7), (4, 0), (5, 3)])
def test_all_pairs_within_the_distance_are_found(blocks, distance):
    hashes = random_hashes(300)
    for place in range(0, 300, 2):  # Every second one is the next one with some bits turned.
        turned = RANDOM.choice(64, size=int(RANDOM.integers(0, 10)), replace=False)
        hashes[place] = hashes[place + 1] ^ numpy.bitwise_or.reduce(
            numpy.uint64(1) << turned.astype(numpy.uint64), initial=numpy.uint64(0)
        )
    different = numpy.unique(hashes)
    left, right = near_pairs(different, blocks, distance)
    pairs = {tuple(sorted(pair)) for pair in zip(left.tolist(), right.tolist(), strict=True)}
    by_hand = {
        (a, b)
        for a, b in itertools.combinations(range(len(different)), 2)
        if int(different[a] ^ different[b]).bit_count() <= distance
    }
    assert pairs == by_hand
    assert len(by_hand) >= 10 or distance == 0


def test_a_distance_that_the_blocks_cannot_find_is_told():
    with pytest.raises(PunaError, match="below the number of blocks"):
        validate(SimHashSettings, {"blocks": 4, "distance": 4}, where="here")


# Exact


@pytest.mark.parametrize(
    ("normalise", "same"),
    [
        ("none", []),
        ("stripped", [" One, two. "]),
        ("lower", [" One, two. ", "ONE, TWO."]),
        ("letters", [" One, two. ", "One two 3"]),
        ("lower_letters", [" One, two. ", "ONE, TWO.", "One two 3", "o ne two"]),
        ("words", [" One, two. ", "ONE, TWO.", "One - two"]),
    ],
)
def test_normalisations_say_which_texts_are_the_same(normalise, same):
    others = [" One, two. ", "ONE, TWO.", "One two 3", "o ne two", "One - two"]
    duplicate = signal("dedup.exact", [["One, two."], others], "duplicate", normalise=normalise)
    if normalise in ("letters", "lower_letters"):
        same = [*same, "One - two"]
    assert [text for text, flag in zip(others, duplicate[1:], strict=True) if flag] == [
        text for text in others if text in same
    ]


def test_texts_with_nothing_left_are_no_duplicates():
    assert numpy.isnan(signal("dedup.exact", [["", "  ", "1,2"]], "duplicate", normalise="letters")).all()


def test_the_longest_page_of_an_address_is_kept():
    first = Texts(["short", "no address", "also none"], urls=["http://a", "", ""])
    second = Texts(["much longer", "other"], urls=["http://a", "http://b"])
    told = [r.signals["duplicate"].tolist() for r in over_batches("dedup.url", [first, second])]
    assert told[0][0] == 1
    assert numpy.isnan(told[0][1:]).all()
    assert told[1] == [0, 0]
