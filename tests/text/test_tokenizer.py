import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from text_samples import CONFIG, CORPUS, SPECIALS, plain_text, train_core, tricky_text
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from puna.core.errors import PunaError
from puna.text.template import CHATML
from puna.text.tokenizer import Tokenizer


@given(text=tricky_text)
def test_text_survives_encoding_and_decoding(chat_tokenizer: Tokenizer, text: str) -> None:
    ids = chat_tokenizer.encode(text)
    assert chat_tokenizer.decode(ids) == text
    assert chat_tokenizer.decode(ids, skip_special=False) == text


@given(text=tricky_text)
def test_no_text_becomes_a_special_token(chat_tokenizer: Tokenizer, text: str) -> None:
    assert chat_tokenizer.special_ids.isdisjoint(chat_tokenizer.encode(text))


@given(texts=st.lists(tricky_text, max_size=5))
def test_a_batch_is_encoded_like_each_text_alone(chat_tokenizer: Tokenizer, texts: list[str]) -> None:
    assert chat_tokenizer.encode_batch(texts) == [chat_tokenizer.encode(text) for text in texts]


@settings(max_examples=60)
@given(text=tricky_text)
def test_special_tokens_are_parsed_when_allowed_as_transformers_does(
    chat_tokenizer: Tokenizer, fast: Any, text: str
) -> None:
    assert chat_tokenizer.encode(text, allow_special=True) == fast.encode(text, add_special_tokens=False)


def test_only_marked_ranges_can_hold_special_tokens(chat_tokenizer: Tokenizer) -> None:
    text = "<|im_end|>a<|im_end|>"
    pieces = chat_tokenizer.encode_markup(text, [(11, len(text))])
    assert [(p.start, p.end) for p in pieces if p.special] == [(11, 21)]
    assert chat_tokenizer.decode([p.id for p in pieces], skip_special=False) == text


def test_pieces_cover_the_text_without_gaps(chat_tokenizer: Tokenizer) -> None:
    text = "Hallo  wereld\n\n€ 12 <|im_end|> x"
    pieces = chat_tokenizer.encode_markup(text, [(0, len(text))])
    covered = {place for piece in pieces for place in range(piece.start, piece.end)}
    assert covered == set(range(len(text)))


def test_a_special_token_takes_the_white_space_it_asks_for() -> None:
    core = train_core()
    core.add_special_tokens([tokenizers.AddedToken("<|user|>", special=True, lstrip=True, rstrip=True)])
    tokenizer = Tokenizer(core, CONFIG)
    pieces = tokenizer.encode_markup("kat <|user|> \n mat", [(0, 18)])
    assert tokenizer.decode([p.id for p in pieces], skip_special=False) == "kat<|user|>mat"


def test_a_unigram_vocabulary_cannot_be_talked_into_a_special_token() -> None:
    core = tokenizers.Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200,
        special_tokens=["<unk>", "<s>", "</s>"],
        unk_token="<unk>",
        initial_alphabet=list("</s>"),
        show_progress=False,
    )
    core.train_from_iterator([*CORPUS, "<s> is </s>"], trainer)
    tokenizer = Tokenizer(core, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    ids = tokenizer.encode("de </s> kat")
    assert tokenizer.special_ids.isdisjoint(ids)
    assert tokenizer.encode("</s>", allow_special=True) == [tokenizer.eos_id]


@pytest.mark.parametrize("template", [None, CHATML])
def test_saved_and_opened_it_is_the_same(
    chat_tokenizer: Tokenizer, tmp_path: Path, template: str | None
) -> None:
    chat_tokenizer.save(tmp_path, template=template)
    again = Tokenizer.from_folder(tmp_path)
    assert again.fingerprint == chat_tokenizer.fingerprint
    assert again.vocabulary() == chat_tokenizer.vocabulary()
    assert again.chat_template == template
    assert (again.bos_id, again.eos_id, again.pad_id) == (0, 2, 0)


@settings(max_examples=60)
@given(text=plain_text)
def test_transformers_opens_the_saved_folder_with_the_same_ids(
    chat_tokenizer: Tokenizer, fast: Any, text: str
) -> None:
    assert fast.encode(text, add_special_tokens=False) == chat_tokenizer.encode(text)
    assert (fast.bos_token_id, fast.eos_token_id, fast.pad_token_id) == (0, 2, 0)


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_sentencepiece_prefixes_are_where_transformers_puts_them(scheme: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    core = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    trainer = trainers.BpeTrainer(
        vocab_size=250, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    tokenizer = Tokenizer(core, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    tokenizer.save(tmp_path)
    fast = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    text = "de kat</s>zit op</s> de mat<s>\nbuiten"
    assert tokenizer.encode(text, allow_special=True) == fast.encode(text, add_special_tokens=False)


def test_a_cut_adds_no_prefix_in_the_middle_of_a_text() -> None:
    core = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=250, special_tokens=["<unk>", "</s>"], show_progress=False)
    core.train_from_iterator(CORPUS, trainer)
    tokenizer = Tokenizer(core, {"eos_token": "</s>", "unk_token": "<unk>"})
    pieces = tokenizer.encode_markup("de katten", [], cuts=[6])
    assert "".join(tokenizer.tokens(p.id for p in pieces)) == "▁de▁katten"
    assert 6 in {piece.start for piece in pieces}


def test_settings_that_would_shorten_or_pad_texts_are_switched_off(tmp_path: Path) -> None:
    core = train_core()
    core.enable_truncation(3)
    core.enable_padding(length=50)
    assert Tokenizer(core, CONFIG).decode(Tokenizer(core, CONFIG).encode(CORPUS[0])) == CORPUS[0]


@pytest.mark.parametrize(
    ("in_post_processor", "in_config", "expected"),
    [(True, None, True), (False, None, False), (False, True, True), (True, False, False)],
)
def test_whether_bos_is_added_follows_the_files_and_is_written(
    in_post_processor: bool, in_config: bool | None, expected: bool, tmp_path: Path
) -> None:
    core = train_core()
    if in_post_processor:
        core.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    tokenizer = Tokenizer(core, {**CONFIG, "add_bos_token": in_config})
    assert tokenizer.adds_bos is expected
    plain = train_core().encode("kat").ids
    assert tokenizer.encode("kat") == plain
    tokenizer.save(tmp_path)
    assert Tokenizer.from_folder(tmp_path).adds_bos is expected
    fast = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(str(tmp_path))
    assert fast.encode("kat") == ([0, *plain] if expected else plain)


def test_the_post_processor_is_written_though_it_is_not_used(tmp_path: Path) -> None:
    core = train_core()
    core.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    Tokenizer(core, CONFIG).save(tmp_path)
    written = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert written.encode("kat").ids[0] == 0
    assert Tokenizer.from_folder(tmp_path).adds_bos


def test_stop_tokens_come_from_the_generation_config(chat_tokenizer: Tokenizer, tmp_path: Path) -> None:
    chat_tokenizer.save(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 2, 999999]}')
    assert Tokenizer.from_folder(tmp_path).stop_ids == (2, 0)
    assert chat_tokenizer.with_stop_tokens(["<|im_start|>"]).stop_ids == (2, 1)


def test_an_ordinary_token_can_stop_and_stays_ordinary() -> None:
    tokenizer = Tokenizer(train_core(), CONFIG, stop_tokens=["."])
    assert tokenizer.stop_ids == (2, tokenizer.id_of("."))
    assert tokenizer.special_tokens == SPECIALS
    assert tokenizer.encode("kat.")[-1] == tokenizer.id_of(".")


def test_without_a_pad_token_the_eos_pads() -> None:
    assert Tokenizer(train_core(), {"eos_token": "<|im_end|>"}).pad_id == 2


def test_the_fingerprint_tells_special_tokens_apart(chat_tokenizer: Tokenizer) -> None:
    other = Tokenizer(train_core(), {**CONFIG, "eos_token": "<|endoftext|>"})
    assert other.fingerprint != chat_tokenizer.fingerprint


def test_ids_beyond_the_vocabulary_are_shown_by_number(chat_tokenizer: Tokenizer) -> None:
    assert chat_tokenizer.tokens([2, 5000]) == ["<|im_end|>", "[5000]"]
    assert chat_tokenizer.vocab_size == 360


def test_the_default_of_several_templates_is_taken(chat_tokenizer: Tokenizer, tmp_path: Path) -> None:
    chat_tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    path.write_text(json.dumps({**config, "chat_template": named}))
    assert Tokenizer.from_folder(tmp_path).chat_template == "d"
    (tmp_path / "chat_template.jinja").write_text("own file")
    assert Tokenizer.from_folder(tmp_path).chat_template == "own file"


class TestRefusals:
    def test_a_folder_without_a_tokenizer(self, tmp_path: Path) -> None:
        with pytest.raises(PunaError, match="no tokenizer in this folder"):
            Tokenizer.from_folder(tmp_path)

    @pytest.mark.parametrize("content", ["", "{}", '{"model": 3}', "not json"])
    def test_a_broken_tokenizer_json(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(PunaError, match="not a readable tokenizer"):
            Tokenizer.from_folder(tmp_path)

    def test_a_sentencepiece_model_that_cannot_be_converted(self, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.model").write_bytes(b"no sentencepiece model")
        with pytest.raises(PunaError, match="sentencepiece"):
            Tokenizer.from_folder(tmp_path)

    def test_a_special_token_that_is_not_in_the_vocabulary(self) -> None:
        with pytest.raises(PunaError, match=r"'<nothing>' is not in the vocabulary"):
            Tokenizer(train_core(), {**CONFIG, "eos_token": "<nothing>"})

    def test_a_bos_that_is_added_but_not_named(self) -> None:
        with pytest.raises(PunaError, match="BOS"):
            Tokenizer(train_core(), {"eos_token": "<|im_end|>", "add_bos_token": True})

    def test_an_eos_that_is_not_named(self) -> None:
        tokenizer = Tokenizer(train_core(), {})
        assert tokenizer.bos_id is None
        assert tokenizer.special_tokens == SPECIALS
        with pytest.raises(PunaError, match="names no EOS"):
            _ = tokenizer.eos_id
