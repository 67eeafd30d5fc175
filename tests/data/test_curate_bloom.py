"""Bloom filters and the duplicates they find: against one pass paragraph by paragraph with exact sets."""

from __future__ import annotations

import itertools
import random

import numpy
import pytest
import regex
from curate_shards import signal
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.core.seeds import numpy_generator
from puna.data.curate import boundaries  # noqa: F401  (registers kinds of words)
from puna.data.curate.duplicates.bloom import BloomFilter, bits_and_hashes, false_positive_rate
from puna.data.curate.duplicates.in_memory import over_batches
from puna.data.curate.texts import Texts

WORD_BOUND = regex.compile(r"(?V1)(?w)\b")


def words_by_hand(text: str) -> list[str]:
    cuts = sorted({match.start() for match in WORD_BOUND.finditer(text)} | {0, len(text)})
    pieces = [text[a:b] for a, b in itertools.pairwise(cuts)]
    return [piece for piece in pieces if piece.strip()]


# The filter


@pytest.mark.parametrize("rate", [0.1, 0.01, 0.001])
def test_a_filter_takes_the_fewest_bits_that_keep_to_the_rate(rate):
    bits, hashes = bits_and_hashes(10_000, rate)
    assert false_positive_rate(bits, hashes, 10_000) <= rate
    assert false_positive_rate(bits - 1, hashes, 10_000) > rate


def test_one_in_a_hundred_takes_seven_hashes_and_nine_and_a_half_bits():
    bits, hashes = bits_and_hashes(1_000_000, 0.01)
    assert hashes == 7
    assert bits / 1_000_000 == pytest.approx(9.585, abs=0.01)


@pytest.mark.parametrize("consecutive", [False, True])
def test_false_positives_at_capacity_keep_to_the_rate(consecutive):
    capacity, rate = 200_000, 0.01
    if consecutive:  # Members that are no random numbers are spread as well.
        every = numpy.arange(3 * capacity, dtype=numpy.uint64)
    else:
        every = numpy.unique(
            numpy_generator(1, "bloom").integers(0, 1 << 64, 3 * capacity, dtype=numpy.uint64)
        )
        every = numpy_generator(2, "bloom").permutation(every)
    inside, outside = every[:capacity], every[capacity : 3 * capacity]
    held = BloomFilter.for_capacity(capacity, rate)
    held.add(inside)
    assert held.contains(inside).all()
    # 400,000 draws of .01 scatter by .00016.
    assert held.contains(outside).mean() <= rate + 5 * 0.00016
    assert held.share_set == pytest.approx(0.518, abs=0.005)


def test_an_empty_filter_holds_nothing_and_bad_sizes_are_told():
    assert 5 not in BloomFilter.for_capacity(1, 0.5)
    with pytest.raises(PunaError, match="at least one member"):
        bits_and_hashes(0, 0.01)
    with pytest.raises(PunaError, match="between 0 and 1"):
        bits_and_hashes(5, 1.0)


# Words between Unicode's boundaries

_CHARACTERS = st.sampled_from(
    [*list("ab1 .,'\":_\n\r-’"), "́", "\u200d", "א", "カ", "🇦", "😀", "❤", "中", "\xad", "\u3000"]
)


@given(st.lists(st.text(_CHARACTERS, max_size=10), min_size=1, max_size=3))
@settings(max_examples=300)
def test_words_lie_between_unicodes_boundaries(documents):
    segments = Texts(documents).words("unicode_solid")
    strings = segments.strings()
    found = [strings[a:b] for a, b in zip(segments.bounds, segments.bounds[1:], strict=False)]
    assert found == [words_by_hand(document) for document in documents]


# Paragraphs and documents


def one_pass(shards: list[list[str]], ngram: int, threshold: float):
    """DataComp-LM's pass with an exact set: what is kept of each text, and its share of members seen."""
    seen: set[tuple[str, ...]] = set()
    kept, shares = [], []
    for document in (document for shard in shards for document in shard):
        total = contained = 0
        left = ""
        for number, paragraph in enumerate(document.split("\n")):
            words = words_by_hand(paragraph)
            members = [tuple(words[i : i + ngram]) for i in range(len(words) - ngram + 1)]
            inside = sum(member in seen for member in members)
            total += len(members)
            contained += inside
            if members and inside / len(members) > threshold:
                continue
            seen.update(members)
            left += ("\n" if number else "") + paragraph
        kept.append(left)
        shares.append(contained / total if total else None)
    return kept, shares


def after_cuts(shards: list[list[str]], **chosen):
    kept, shares, duplicate = [], [], []
    for shard, told in zip(
        shards, over_batches("dclm.bloom", [Texts(s) for s in shards], **chosen), strict=True
    ):
        texts = list(shard)
        if told.cut is not None:
            cuts = zip(told.cut.document[::-1], told.cut.starts[::-1], told.cut.ends[::-1], strict=True)
            for document, start, end in cuts:
                texts[document] = texts[document][:start] + texts[document][end:]
        kept += texts
        shares += [None if numpy.isnan(v) else float(v) for v in told.signals["share"]]
        duplicate += told.signals["duplicate"].tolist()
    return kept, shares, duplicate


_PARAGRAPH = st.lists(st.sampled_from(["a", "b", "c", "d,", "e"]), max_size=9).map(" ".join)
_DOCUMENT = st.lists(_PARAGRAPH, max_size=4).map("\n".join)


@given(st.lists(st.lists(_DOCUMENT, max_size=4), min_size=1, max_size=3), st.sampled_from([0.0, 0.5, 0.8]))
@settings(max_examples=200)
def test_cuts_and_shares_are_those_of_one_pass_with_an_exact_set(shards, threshold):
    # At one false positive in 10**9 the filter answers like a set here.
    kept, shares, _ = after_cuts(shards, ngram=3, threshold=threshold, rate=1e-9, capacity=1000)
    assert (kept, shares) == one_pass(shards, 3, threshold)


def test_the_second_copy_of_every_page_goes_and_the_first_stays():
    draw = random.Random(5)
    words = [f"word{number}" for number in range(3000)]
    pages = [
        "\n".join(" ".join(draw.choices(words, k=draw.randint(13, 40))) for _ in range(draw.randint(1, 4)))
        for _ in range(300)
    ]
    shards = [pages[:100], pages[100:] + pages[:50], pages[50:]]
    kept, _, duplicate = after_cuts(shards)
    assert kept[:300] == pages
    assert duplicate == [0.0] * 300 + [1.0] * 300
    assert all(len(regex.findall(r"\w+", text)) == 0 for text in kept[300:])


def test_paragraphs_below_thirteen_words_are_never_cut():
    twelve = " ".join(f"w{number}" for number in range(12))
    kept, shares, duplicate = after_cuts([[twelve, twelve], [twelve + " w12", twelve + " w12"]])
    assert kept[:3] == [twelve, twelve, twelve + " w12"]
    assert shares == [None, None, 0.0, 1.0]
    assert numpy.isnan(duplicate[:2]).all()
    assert duplicate[2:] == [0.0, 1.0]


def test_the_share_has_to_be_above_the_threshold():
    """10 members: of 8 seen a paragraph stays, of 9 it goes."""
    first = [f"w{number}" for number in range(22)]  # 10 members of 13 words
    eight = [*first[:20], "new", "newer"]
    nine = [*first[:21], "last"]
    assert after_cuts([[" ".join(first), " ".join(eight)]])[1:] == ([0.0, 0.8], [0.0, 0.0])
    assert after_cuts([[" ".join(first), " ".join(nine)]])[1:] == ([0.0, 0.9], [0.0, 1.0])


def test_shares_of_paragraphs_are_told_as_spans_that_tile_the_document():
    text = "\n".join(["a b c", "", "a b c", "d"])
    (told,) = over_batches("dclm.bloom", [Texts([text])], ngram=3)
    spans = told.signals["paragraphs"]
    assert spans.starts.tolist() == [0, 5, 6, 12]
    assert spans.ends.tolist() == [5, 6, 12, 14]
    assert [None if numpy.isnan(v) else v for v in spans.values] == [0.0, None, 1.0, None]
    assert told.cut is not None
    assert (told.cut.starts.tolist(), told.cut.ends.tolist()) == ([6], [12])


# Whole documents


def test_whole_documents_are_kept_once_from_either_end():
    shards = [["old", "both"], ["both", "new", "new"], []]
    assert signal("redpajama.bloom", shards, "duplicate").tolist() == [0, 0, 1, 0, 1]
    assert signal("redpajama.bloom", shards, "duplicate", backwards=True).tolist() == [0, 1, 0, 1, 0]
    assert signal("redpajama.bloom", [["A ", "a"]], "duplicate", normalise="lower").tolist() == [0, 1]


def test_no_copy_of_a_document_is_ever_missed():
    pages = [f"page {number}" for number in range(5000)]
    duplicate = signal("redpajama.bloom", [pages, pages], "duplicate", rate=0.1)
    assert duplicate[5000:].all()
    assert duplicate[:5000].mean() <= 0.1
