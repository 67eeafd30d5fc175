import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from text_samples import CONFIG, CORPUS, sentencepiece_vocabulary, train_core, tricky_text
from tokenizers import models, normalizers, pre_tokenizers
from vocabulary_samples import new_tokenizer, old_tokenizer, sentence_pairs

from puna.core.errors import PunaError
from puna.text.gguf_vocabulary import RULES, gguf_metadata, tokenizer_from_metadata
from puna.text.template import find_template
from puna.text.tokenizer import Tokenizer
from puna.text.vocabulary.extend import extend_tokenizer
from puna.text.vocabulary.spelling import Spelling
from puna.text.vocabulary.train import TokenizerKind, train_tokenizer

DUTCH = [target for _, target in sentence_pairs()]


@pytest.fixture(scope="module")
def old() -> Tokenizer:
    return old_tokenizer()


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def trained(request: pytest.FixtureRequest, old: Tokenizer) -> Tokenizer:
    return train_tokenizer(DUTCH, kind=request.param, vocab_size=340, base=old)


@pytest.fixture(scope="module")
def extended(old: Tokenizer) -> Tokenizer:
    return extend_tokenizer(old, DUTCH, new_tokens=30)


@given(text=tricky_text)
def test_any_text_survives_a_trained_tokenizer(trained: Tokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert trained.decode(ids, skip_special=False) == text
    assert trained.special_ids.isdisjoint(ids)


def test_training_shortens_its_own_kind_of_text(trained: Tokenizer) -> None:
    tokens = sum(map(len, trained.encode_batch(DUTCH)))
    assert tokens < 0.95 * sum(len(text.encode()) for text in DUTCH)


def test_a_trained_bpe_needs_fewer_tokens_than_its_base(old: Tokenizer) -> None:
    made = train_tokenizer(DUTCH, vocab_size=340, base=old)
    assert sum(map(len, made.encode_batch(DUTCH))) < 0.5 * sum(map(len, old.encode_batch(DUTCH)))


def test_special_tokens_roles_stops_and_template_come_from_the_base(
    trained: Tokenizer, old: Tokenizer
) -> None:
    assert trained.special_tokens == old.special_tokens
    assert [trained.id_of(token) for token in old.special_tokens] == [0, 1, 2]
    assert trained.strings == old.strings
    assert trained.tokens(trained.stop_ids) == old.tokens(old.stop_ids)
    assert trained.adds_bos == old.adds_bos
    template, base_template = find_template(trained), find_template(old)
    assert template is not None and base_template is not None
    assert template.source == base_template.source


def test_added_tokens_that_are_not_special_stay_so() -> None:
    core = train_core()
    core.add_tokens([tokenizers.AddedToken("PageBreak", special=False, normalized=False, single_word=True)])
    made = train_tokenizer(DUTCH, vocab_size=300, base=Tokenizer(core, CONFIG))
    assert "PageBreak" in made.vocabulary()
    assert "PageBreak" not in made.special_tokens
    assert made.encode("PageBreak") == [made.id_of("PageBreak")]
    assert len(made.encode("xPageBreak")) > 2


def test_a_base_that_begins_documents_with_bos_passes_that_on(tiny_tokenizer: Tokenizer) -> None:
    made = train_tokenizer(DUTCH, vocab_size=300, base=tiny_tokenizer)
    assert made.adds_bos
    read = Tokenizer(tokenizers.Tokenizer.from_str(made.to_json()), dict(made.strings))
    assert read.adds_bos
    assert read.bos_id == made.id_of("<s>")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule.names[0]))
def test_llama_cpp_knows_the_split_of_a_tokenizer_trained_like_its_base(rule: Any) -> None:
    base = Tokenizer(train_core(rule.build(), ignore_merges=rule.ignore_merges), CONFIG)
    made = train_tokenizer(CORPUS, vocab_size=330, base=base)
    metadata = gguf_metadata(made)
    assert metadata["tokenizer.ggml.pre"] == rule.names[0]
    again = tokenizer_from_metadata(metadata)
    for text in CORPUS[:4]:
        assert again.encode(text) == made.encode(text)


def test_the_normalizer_comes_from_the_base() -> None:
    core = train_core()
    core.normalizer = normalizers.NFC()
    made = train_tokenizer(DUTCH, vocab_size=300, base=Tokenizer(core, CONFIG))
    assert made.encode("e\u0301") == made.encode("é")


def test_digits_are_split_as_asked() -> None:
    texts = ["1984", "1984"] * 5
    grouped = Tokenizer(train_core(), CONFIG)  # splits no digits
    assert len(train_tokenizer(texts, vocab_size=300, base=grouped).encode("1984")) == 1
    assert len(train_tokenizer(texts, vocab_size=300, base=grouped, single_digits=True).encode("1984")) == 4
    assert len(train_tokenizer(texts, vocab_size=300).encode("1984")) == 4
    assert len(train_tokenizer(texts, vocab_size=300, single_digits=False).encode("1984")) == 1


def test_a_base_of_another_spelling_gives_its_special_tokens_only() -> None:
    tokens, types, scores = sentencepiece_vocabulary()
    keys = {"model": "llama", "tokens": tokens, "token_type": types, "scores": scores, "eos_token_id": 2}
    base = tokenizer_from_metadata({f"tokenizer.ggml.{key}": value for key, value in keys.items()})
    made = train_tokenizer(DUTCH, vocab_size=300, base=base)
    assert made.special_tokens == ["<unk>", "<s>", "</s>"]
    assert made.decode(made.encode(" de  kat\n")) == " de  kat\n"


def test_a_pair_rarer_than_the_minimum_is_not_merged() -> None:
    texts = ["bromfiets"] * 4
    assert train_tokenizer(texts, vocab_size=400, min_frequency=5).vocab_size == 257
    assert len(train_tokenizer(texts, vocab_size=400, min_frequency=4).encode("bromfiets")) == 1


_TRAIN = """
import sys
sys.path[:0] = {path!r}
from vocabulary_samples import sentence_pairs
from puna.text.vocabulary.train import train_tokenizer
texts = [target for _, target in sentence_pairs()]
print(train_tokenizer(texts, kind={kind!r}, vocab_size=330).fingerprint)
"""


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_same_texts_give_the_same_vocabulary_in_every_process(kind: TokenizerKind) -> None:
    here = {train_tokenizer(DUTCH, kind=kind, vocab_size=330).fingerprint for _ in range(3)}
    code = _TRAIN.format(path=sys.path, kind=kind)
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert here == {there.stdout.strip()}


def test_texts_may_be_a_stream() -> None:
    def stream() -> Iterator[str]:
        yield from DUTCH

    assert (
        train_tokenizer(stream(), vocab_size=300).fingerprint
        == train_tokenizer(DUTCH, vocab_size=300).fingerprint
    )


def test_impossible_settings_are_refused(old: Tokenizer) -> None:
    with pytest.raises(PunaError, match=r"vocab_size: .*no room") as error:
        train_tokenizer(DUTCH, vocab_size=258, base=old)
    assert error.value.expected == "at least 259"
    with pytest.raises(PunaError, match="min_frequency means nothing"):
        train_tokenizer(DUTCH, kind="unigram", vocab_size=300, min_frequency=2)
    with pytest.raises(PunaError, match="kind of tokenizer"):
        train_tokenizer(DUTCH, kind="wordpiece", vocab_size=300)  # type: ignore[arg-type]


# ---- extension ------------------------------------------------------------------------------------


@given(text=tricky_text)
def test_any_text_survives_an_extended_tokenizer(extended: Tokenizer, text: str) -> None:
    assert extended.decode(extended.encode(text), skip_special=False) == text


@settings(max_examples=200)
@given(text=tricky_text.map(lambda text: f"{text} de hond {text[::-1]}ziet kleinnooit huis{text}"))
def test_new_tokens_stand_for_the_ids_of_the_base(old: Tokenizer, extended: Tokenizer, text: str) -> None:
    spelling, bytes_of = Spelling(old), Spelling(extended).bytes_of
    expanded: list[int] = []
    for index in extended.encode(text):
        expanded += [index] if index < old.vocab_size else spelling.pieces(bytes_of[index] or b"")
    assert expanded == old.encode(text)


def test_an_extension_keeps_every_old_id_and_adds_what_was_asked_for(
    old: Tokenizer, extended: Tokenizer
) -> None:
    assert old.vocabulary().items() <= extended.vocabulary().items()
    assert extended.vocab_size == old.vocab_size + 30
    assert (extended.strings, extended.stop_ids) == (old.strings, old.stop_ids)
    assert extended.special_tokens == old.special_tokens
    saved = sum(map(len, old.encode_batch(DUTCH))) - sum(map(len, extended.encode_batch(DUTCH)))
    assert saved > 0.2 * sum(map(len, old.encode_batch(DUTCH)))


def test_an_extended_tokenizer_can_be_written_into_a_gguf_file(extended: Tokenizer) -> None:
    again = tokenizer_from_metadata(gguf_metadata(extended))
    for text in [*DUTCH[:20], *CORPUS[:4]]:
        assert again.encode(text) == extended.encode(text)


def test_fewer_tokens_are_added_where_the_texts_give_no_more(old: Tokenizer) -> None:
    assert extend_tokenizer(old, ["xqj xqj"], new_tokens=50).vocab_size == old.vocab_size + 2
    assert extend_tokenizer(old, ["xqj xqj"], new_tokens=50, min_frequency=3).vocab_size == old.vocab_size


def test_the_first_tokens_of_a_longer_extension_are_those_of_a_shorter_one(
    old: Tokenizer, extended: Tokenizer
) -> None:
    shorter = extend_tokenizer(old, DUTCH, new_tokens=10)
    assert shorter.vocabulary().items() <= extended.vocabulary().items()


def test_only_a_byte_level_bpe_is_extended() -> None:
    for core in (tokenizers.Tokenizer(models.BPE()), tokenizers.Tokenizer(models.WordLevel({"a": 0}, "a"))):
        core.pre_tokenizer = pre_tokenizers.Whitespace()
        with pytest.raises(PunaError, match="only a byte-level BPE can be extended"):
            extend_tokenizer(Tokenizer(core), DUTCH, new_tokens=3)


def test_an_extension_by_nothing_is_refused(old: Tokenizer) -> None:
    with pytest.raises(PunaError, match="at least one token"):
        extend_tokenizer(old, DUTCH, new_tokens=0)


def test_a_new_tokenizer_without_a_base_has_an_end_of_text() -> None:
    made = new_tokenizer(None)
    assert made.special_tokens == ["<|endoftext|>"]
    assert (made.bos_id, made.eos_id, made.pad_id, made.adds_bos) == (0, 0, 0, False)
