from collections.abc import Callable
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_samples import sentencepiece_vocabulary
from vocabulary_samples import DICTIONARY, new_tokenizer, old_tokenizer, sentence_pairs

from puna.core.errors import PunaError
from puna.text.gguf_vocabulary import tokenizer_from_metadata
from puna.text.tokenizer import Tokenizer
from puna.text.vocabulary import builders
from puna.text.vocabulary.cooccurrence import count_aligned
from puna.text.vocabulary.operator import VocabularyMap
from puna.text.vocabulary.spelling import Spelling
from puna.text.vocabulary.train import train_tokenizer


@pytest.fixture(scope="module")
def old() -> Tokenizer:
    return old_tokenizer()


@pytest.fixture(scope="module")
def new(old: Tokenizer) -> Tokenizer:
    return new_tokenizer(old)


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    tokens, types, scores = sentencepiece_vocabulary()
    return tokenizer_from_metadata(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
        }
    )


def _token(tokenizer: Tokenizer, text: str) -> int:
    ids = tokenizer.encode(text)
    assert len(ids) == 1, f"{text!r} should be one token here"
    return ids[0]


@pytest.mark.parametrize(
    "build",
    [
        builders.mean_of_pieces,
        builders.weighted_pieces,
        lambda old, new: builders.alignment(old, new, sentence_pairs()),
        lambda old, new: builders.alignment(old, new, sentence_pairs(), fallback="unk", evidence=0.0),
        lambda old, new: builders.random(old, new, copy_shared=True),
        lambda old, new: builders.global_mean(old, new),
    ],
)
@pytest.mark.parametrize("pair", ["byte-level", "from sentencepiece", "to sentencepiece"])
def test_every_builder_makes_one_row_for_each_token_that_sums_to_one(
    build: Callable[..., VocabularyMap], pair: str, old: Tokenizer, new: Tokenizer, sentencepiece: Tokenizer
) -> None:
    first, second = {
        "byte-level": (old, new),
        "from sentencepiece": (sentencepiece, new),
        "to sentencepiece": (old, sentencepiece),
    }[pair]
    if "unk_token" not in first.strings:
        first.strings["unk_token"] = "<unk>"
    mapping = build(first, second)
    assert (mapping.new_size, mapping.old_size) == (second.vocab_size, first.vocab_size)
    assert numpy.abs(mapping.row_sums() - 1).max() <= 1e-6


def test_identity_copies_every_row() -> None:
    mapping = builders.identity(7)
    assert [mapping.row(index) for index in range(7)] == [{index: 1.0} for index in range(7)]


def test_a_token_of_both_vocabularies_is_copied(old: Tokenizer, new: Tokenizer) -> None:
    mapping = builders.mean_of_pieces(old, new)
    shared = set(old.vocabulary()) & set(new.vocabulary())
    assert len(shared) > 256
    for token in shared:
        assert mapping.row(new.id_of(token)) == {old.id_of(token): 1.0}


def test_a_special_token_in_the_same_role_is_copied_though_it_is_spelt_otherwise(
    old: Tokenizer, sentencepiece: Tokenizer
) -> None:
    mapping = builders.mean_of_pieces(old, sentencepiece)
    assert mapping.row(sentencepiece.id_of("<s>")) == {old.bos_id: 1.0}
    assert mapping.row(sentencepiece.id_of("</s>")) == {old.eos_id: 1.0}


def test_pieces_are_the_old_spelling_of_the_new_token(old: Tokenizer, new: Tokenizer) -> None:
    token = _token(new, " groen")
    ids = old.encode(" groen")
    assert len(set(ids)) == len(ids) > 1
    mean = builders.mean_of_pieces(old, new)
    assert mean.origin(token) == "pieces"
    assert mean.row(token) == pytest.approx({index: 1 / len(ids) for index in ids})
    weighted = builders.weighted_pieces(old, new)
    assert weighted.row(token) == pytest.approx({index: len(old.decode([index])) / 6 for index in ids})
    given = builders.weighted_pieces(old, new, weigh=lambda pieces: [1.0] + [0.0] * (len(pieces) - 1))
    assert given.row(token) == {ids[0]: 1.0}


@pytest.mark.parametrize("weights", [[], [-1.0, 2.0], [0.0, 0.0]])
def test_weights_that_cannot_be_normalised_are_refused(
    old: Tokenizer, new: Tokenizer, weights: list[float]
) -> None:
    with pytest.raises(PunaError, match="pieces need one weight each"):
        builders.weighted_pieces(old, new, weigh=lambda pieces: (weights * 9)[: len(pieces)] or weights)


def test_an_aligned_word_takes_the_row_of_its_translation(old: Tokenizer, new: Tokenizer) -> None:
    mapping = builders.alignment(old, new, sentence_pairs(), evidence=0.0)
    whole = [
        (a, b) for a, b in DICTIONARY.items() if len(old.encode(f" {a}")) == len(new.encode(f" {b}")) == 1
    ]
    assert len(whole) > 8
    for source, target in whole:
        row = mapping.row(_token(new, f" {target}"))
        assert mapping.origin(_token(new, f" {target}")) == "aligned"
        assert row[_token(old, f" {source}")] > 0.9


def test_a_word_of_both_languages_follows_its_meaning_not_its_letters(old: Tokenizer, new: Tokenizer) -> None:
    # "of" is a word of both, and means "or" in the new language.
    row = builders.alignment(old, new, sentence_pairs()).row(_token(new, " of"))
    assert row[_token(old, " or")] > 0.8 > 0.2 > row[_token(old, " of")] > 0


def test_signs_and_digits_are_copied_whatever_was_aligned(old: Tokenizer, new: Tokenizer) -> None:
    pairs = [(f"{source} 7.", f"{target} 8!") for source, target in sentence_pairs()]
    mapping = builders.alignment(old, new, pairs)
    for text in ("8", "!", "."):
        assert mapping.row(_token(new, text)) == {_token(old, text): 1.0}


def test_more_evidence_asked_for_gives_more_weight_to_the_pieces(old: Tokenizer, new: Tokenizer) -> None:
    token, pairs = _token(new, " groen"), sentence_pairs()
    pieces = set(old.encode(" groen"))
    shares = []
    for evidence in (0.0, 10.0, 1000.0):
        row = builders.alignment(old, new, pairs, evidence=evidence).row(token)
        shares.append(sum(weight for column, weight in row.items() if column in pieces))
    assert 0 <= shares[0] < shares[1] < shares[2] < 1


def test_a_token_counted_n_times_is_blended_as_n_to_the_evidence(old: Tokenizer, new: Tokenizer) -> None:
    token, pairs = _token(new, " groen"), sentence_pairs()
    settings: dict[str, Any] = {"position": 0.5, "symmetrisation": "intersection", "iterations": 5}
    counts = count_aligned(old, new, pairs, **settings)[token]
    assert len(counts) == 1
    ((column, count),) = counts.items()
    assert column not in old.encode(" groen")
    row = builders.alignment(old, new, pairs, evidence=3.0).row(token)
    assert row[column] == pytest.approx(count / (count + 3))


def test_a_token_that_no_pair_shows_falls_back(old: Tokenizer, new: Tokenizer) -> None:
    pairs = [(a, b) for a, b in sentence_pairs() if "groen" not in b]
    token = _token(new, " groen")
    pieces = builders.weighted_pieces(old, new).row(token)
    mean = builders.mean_of_pieces(old, new).row(token)
    assert builders.alignment(old, new, pairs).row(token) == pieces
    assert builders.alignment(old, new, pairs, fallback="mean_of_pieces").row(token) == mean
    unknown = builders.alignment(old, new, pairs, fallback="unk", evidence=0.0)
    assert unknown.origin(token) == "unknown"
    assert unknown.row(token) == {old.id_of(old.strings["unk_token"]): 1.0}


def test_without_an_unknown_token_the_fallback_unk_is_refused(old: Tokenizer, new: Tokenizer) -> None:
    bare = old_tokenizer()
    del bare.strings["unk_token"]
    with pytest.raises(PunaError, match="names no unknown token"):
        builders.alignment(bare, new, sentence_pairs(20), fallback="unk", evidence=0.0)
    with pytest.raises(PunaError, match="no pieces are blended in"):
        builders.alignment(old, new, sentence_pairs(20), fallback="unk")


def test_the_floor_drops_what_was_rarely_aligned(old: Tokenizer, new: Tokenizer) -> None:
    pairs = [*sentence_pairs(), *([("the tree.", "de groen.")] * 8)]
    rows = {
        floor: builders.alignment(old, new, pairs, floor=floor, evidence=0.0).row(_token(new, " groen"))
        for floor in (0.0, 0.3)
    }
    assert min(rows[0.0].values()) < 0.3
    assert len(rows[0.3]) < len(rows[0.0])
    assert min(rows[0.3].values()) >= 0.3


def test_place_in_the_word_pairs_first_with_first_and_last_with_last(old: Tokenizer) -> None:
    # The letters of these words are tokens of their own on both sides.
    pairs = [("qx vz", "QJ WK")] * 30 + [("qx", "QJ"), ("vz", "WK")] * 30
    plain = train_tokenizer(["a"], vocab_size=257)
    settings: dict[str, Any] = {"symmetrisation": "intersection", "iterations": 5}
    placed = count_aligned(plain, plain, pairs, position=1.0, **settings)
    q, x = plain.encode("qx")
    big_q, big_j = plain.encode("QJ")
    assert placed[big_q].keys() <= {q, *plain.encode(" ")}
    assert x in placed[big_j]
    assert q not in placed[big_j]
    even = count_aligned(plain, plain, pairs, position=0.0, **settings)
    assert even[big_j][q] == pytest.approx(even[big_j][x], rel=0.6)


@settings(deadline=None, max_examples=25)
@given(position=st.floats(0, 1), seed=st.integers(0, 50))
def test_every_aligned_occurrence_gives_its_tokens_a_mass_of_one(position: float, seed: int) -> None:
    first = train_tokenizer(["de kat en de hond"] * 5, vocab_size=262)
    second = train_tokenizer(["the cat and the dog"] * 5, vocab_size=265)
    pairs = sentence_pairs(12, seed)
    options: dict[str, Any] = {"symmetrisation": "union", "iterations": 2}
    counts = count_aligned(first, second, pairs, position=position, **options)
    for row in counts.values():
        total = sum(row.values())
        assert total == pytest.approx(round(total), abs=1e-6)
        assert min(row.values()) > 0


def test_shares_outside_zero_to_one_are_refused(old: Tokenizer, new: Tokenizer) -> None:
    for setting in ({"floor": 1.5}, {"position": -0.1}, {"evidence": -1.0}):
        with pytest.raises(PunaError, match=next(iter(setting))):
            builders.alignment(old, new, [], **setting)  # type: ignore[arg-type]


def test_the_baselines_make_every_row_alike_unless_asked_to_copy(old: Tokenizer, new: Tokenizer) -> None:
    assert builders.global_mean(old, new).count("mean") == new.vocab_size
    assert builders.random(old, new).count("random") == new.vocab_size
    copied = builders.mean_of_pieces(old, new).count("copied")
    assert builders.global_mean(old, new, copy_shared=True).count("copied") == copied
    assert builders.random(old, new, copy_shared=True).count("copied") == copied


def test_bytes_are_what_two_spellings_share(old: Tokenizer, sentencepiece: Tokenizer) -> None:
    ours, theirs = Spelling(old), Spelling(sentencepiece)
    space = sentencepiece.vocabulary()["▁de"]
    assert theirs.bytes_of[space] == b" de"
    assert theirs.bytes_of[sentencepiece.id_of("<0xE2>")] == b"\xe2"
    assert theirs.bytes_of[sentencepiece.id_of("<s>")] is None
    assert ours.bytes_of[_token(old, " the")] == b" the"


@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12))
def test_pieces_spell_exactly_the_bytes_asked_for(
    old: Tokenizer, sentencepiece: Tokenizer, text: str
) -> None:
    for tokenizer in (old, sentencepiece):
        spelling = Spelling(tokenizer)
        found = b"".join(spelling.bytes_of[index] or b"" for index in spelling.pieces(text.encode()))
        assert found == text.encode()


@given(data=st.binary(min_size=1, max_size=4))
def test_loose_bytes_are_spelt_too(old: Tokenizer, sentencepiece: Tokenizer, data: bytes) -> None:
    for tokenizer in (old, sentencepiece):
        spelling = Spelling(tokenizer)
        assert b"".join(spelling.bytes_of[index] or b"" for index in spelling.pieces(data)) == data
