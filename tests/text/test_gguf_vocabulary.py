from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from text_samples import CONFIG, CORPUS, sentencepiece_vocabulary, train_core, tricky_text
from tokenizers import models, normalizers, pre_tokenizers, trainers

from puna.core.errors import PunaError
from puna.model.checkpoint import read_gguf_metadata, write_gguf
from puna.text.gguf_vocabulary import RULES, gguf_metadata, tokenizer_from_metadata
from puna.text.template import CHATML, Template
from puna.text.tokenizer import Tokenizer

# llama.cpp reads C strings of UTF-8: no NUL. Its tables know the characters of an older Unicode.
old_text = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cn", "Co", "Cs"], exclude_characters="\0")
)
MIXED = [
    " ",
    "  ",
    "\n",
    "\t",
    "2024",
    "12.5",
    "it's",
    "WE'LL",
    "Hallo",
    "één",
    "€",
    "👩‍👩‍👧",
    "日本",
    "    ",
]
MORE = ["def f(x):", "<|im_start|>", "<s>", "\r\n", "…", "²", "ﬁ", "a\u0301"]
mixed_text = st.lists(st.sampled_from([*MIXED, *MORE]), max_size=12).map("".join)
SMOLLM_CANNOT_SPELL = "\x04\x06\x13\x14\x16\x1d"  # its vocabulary lacks these bytes


def llama_cpp_of(path: Path) -> Any:
    llama_cpp = pytest.importorskip("llama_cpp")
    return llama_cpp.Llama(str(path), vocab_only=True, verbose=False)


def llama_cpp_ids(llama: Any, text: str, *, special: bool = False) -> list[int]:
    if not text:
        return []
    ids: list[int] = llama.tokenize(text.encode(), add_bos=False, special=special)
    return ids


@pytest.fixture(scope="module")
def smollm_tokenizer(smollm_path: Path) -> Tokenizer:
    return Tokenizer.from_gguf(smollm_path)


@pytest.fixture(scope="module")
def smollm_in_llama_cpp(smollm_path: Path) -> Any:
    return llama_cpp_of(smollm_path)


@pytest.fixture(scope="module")
def smollm_in_transformers(smollm_path: Path) -> Any:
    """transformers' conversion, with the digits split as the model's own tokenizer splits them.

    transformers does not know the pre-tokenizer that the file names and takes GPT-2's instead.
    """
    transformers = pytest.importorskip("transformers")
    fast = transformers.AutoTokenizer.from_pretrained(str(smollm_path.parent), gguf_file=smollm_path.name)
    fast.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), fast.backend_tokenizer.pre_tokenizer]
    )
    return fast


@pytest.mark.smollm
class TestSmolLM:
    @settings(max_examples=150)
    @given(text=mixed_text | tricky_text)
    def test_ids_equal_transformers(
        self, smollm_tokenizer: Tokenizer, smollm_in_transformers: Any, text: str
    ) -> None:
        assert smollm_tokenizer.encode(text, allow_special=True) == smollm_in_transformers.encode(
            text, add_special_tokens=False
        )

    @settings(max_examples=150, derandomize=True)
    @given(text=mixed_text | old_text)
    def test_ids_equal_llama_cpp(
        self, smollm_tokenizer: Tokenizer, smollm_in_llama_cpp: Any, text: str
    ) -> None:
        assert smollm_tokenizer.encode(text) == llama_cpp_ids(smollm_in_llama_cpp, text)
        assert smollm_tokenizer.encode(text, allow_special=True) == llama_cpp_ids(
            smollm_in_llama_cpp, text, special=True
        )

    @settings(max_examples=100)
    @given(
        text=st.text(
            st.characters(codec="utf-8", max_codepoint=0x3FFFF, exclude_characters=SMOLLM_CANNOT_SPELL)
        )
    )
    def test_text_survives(self, smollm_tokenizer: Tokenizer, text: str) -> None:
        assert smollm_tokenizer.decode(smollm_tokenizer.encode(text)) == text

    def test_facts(self, smollm_tokenizer: Tokenizer) -> None:
        assert smollm_tokenizer.vocab_size == 49152
        assert smollm_tokenizer.strings == {
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
        }
        assert not smollm_tokenizer.adds_bos
        assert smollm_tokenizer.stop_ids == (2,)
        assert smollm_tokenizer.chat_template is not None

    def test_written_and_read_it_is_the_same(self, smollm_tokenizer: Tokenizer) -> None:
        again = tokenizer_from_metadata(gguf_metadata(smollm_tokenizer))
        assert again.fingerprint == smollm_tokenizer.fingerprint


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.names[0])
class TestEveryPreTokenizer:
    @pytest.fixture
    def tokenizer(self, rule: Any) -> Tokenizer:
        core = train_core(rule.build(), size=320, ignore_merges=rule.ignore_merges)
        return Tokenizer(core, {**CONFIG, "add_bos_token": True}, stop_tokens=["<|im_start|>"])

    def test_it_gets_its_name_and_comes_back(self, tokenizer: Tokenizer, rule: Any) -> None:
        metadata = gguf_metadata(tokenizer, Template(CHATML, tokenizer.template_strings))
        assert metadata["tokenizer.ggml.pre"] == rule.names[0]
        again = tokenizer_from_metadata(metadata)
        text = "".join(CORPUS[:4])
        assert again.encode(text) == tokenizer.encode(text)
        assert again.strings == tokenizer.strings
        assert (again.stop_ids, again.adds_bos, again.chat_template) == ((2, 1), True, CHATML)

    def test_llama_cpp_gives_the_same_ids(
        self, tokenizer: Tokenizer, rule: Any, tiny_llama: Callable[..., Any], tmp_path: Path
    ) -> None:
        model = tiny_llama(vocab_size=330)
        file = tmp_path / "tiny.gguf"
        write_gguf(model, file, metadata=gguf_metadata(tokenizer, rows=330))
        llama = llama_cpp_of(file)
        assert Tokenizer.from_gguf(file).encode("De kat") == tokenizer.encode("De kat")
        for text in ["".join(CORPUS[:4]), "It's 2024!\n\n  'T KOFSCHIP 1234567  x\r\n\t€²", "<|im_end|> kat"]:
            assert tokenizer.encode(text) == llama_cpp_ids(llama, text)
            assert tokenizer.encode(text, allow_special=True) == llama_cpp_ids(llama, text, special=True)
        assert llama.tokenize(b"kat", add_bos=True)[0] == tokenizer.bos_id
        assert (llama.token_bos(), llama.token_eos()) == (0, 2)


@pytest.fixture(scope="module")
def metadata() -> dict[str, Any]:
    tokens, types, scores = sentencepiece_vocabulary()
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


class TestSentencepiece:
    @settings(max_examples=100)
    @given(text=tricky_text | mixed_text)
    def test_text_survives(self, metadata: dict[str, Any], text: str) -> None:
        tokenizer = tokenizer_from_metadata(metadata)
        assert tokenizer.decode(tokenizer.encode(text)) == text

    @pytest.mark.parametrize("prefix", [True, False])
    def test_llama_cpp_gives_the_same_ids(
        self, metadata: dict[str, Any], prefix: bool, tiny_llama: Callable[..., Any], tmp_path: Path
    ) -> None:
        model = tiny_llama(vocab_size=len(metadata["tokenizer.ggml.tokens"]))
        file = tmp_path / "tiny.gguf"
        write_gguf(model, file, metadata={**metadata, "tokenizer.ggml.add_space_prefix": prefix})
        llama, tokenizer = llama_cpp_of(file), Tokenizer.from_gguf(file)
        assert tokenizer.adds_bos
        for text in [*CORPUS[:4], " de kat", "  a\n b", "日本 <s> </s>x", "<0x41>"]:
            assert tokenizer.encode(text) == llama_cpp_ids(llama, text)
        assert tokenizer.encode("kat</s>mat", allow_special=True) == llama_cpp_ids(
            llama, "kat</s>mat", special=True
        )

    @pytest.mark.parametrize("prefix", [True, False])
    def test_written_and_read_it_is_the_same(self, metadata: dict[str, Any], prefix: bool) -> None:
        tokenizer = tokenizer_from_metadata({**metadata, "tokenizer.ggml.add_space_prefix": prefix})
        written = gguf_metadata(tokenizer)
        assert written["tokenizer.ggml.token_type"] == metadata["tokenizer.ggml.token_type"]
        again = tokenizer_from_metadata(written)
        assert again.fingerprint == tokenizer.fingerprint

    def test_merges_that_scores_cannot_express_are_refused(self, metadata: dict[str, Any]) -> None:
        tokenizer = tokenizer_from_metadata(metadata)
        tokenizer.core.model = models.BPE(
            vocab=tokenizer.vocabulary(), merges=[], unk_token="<unk>", byte_fallback=True
        )
        with pytest.raises(PunaError, match=r"llama\.cpp would tokenise otherwise"):
            gguf_metadata(tokenizer)


def test_ids_beyond_the_vocabulary_become_unused_tokens(chat_tokenizer: Tokenizer) -> None:
    metadata = gguf_metadata(chat_tokenizer, rows=384)
    assert len(metadata["tokenizer.ggml.tokens"]) == len(metadata["tokenizer.ggml.token_type"]) == 384
    assert set(metadata["tokenizer.ggml.token_type"][360:]) == {5}


def test_added_tokens_that_are_not_special_are_kept_whole() -> None:
    core = train_core()
    core.add_tokens([tokenizers.AddedToken("kattenmat", normalized=False)])
    tokenizer = Tokenizer(core, CONFIG)
    again = tokenizer_from_metadata(gguf_metadata(tokenizer))
    assert again.encode("de kattenmat!") == tokenizer.encode("de kattenmat!")
    assert 360 in again.encode("de kattenmat!")


def test_only_the_tokenizer_is_read_from_a_file(smollm_path: Path) -> None:
    assert read_gguf_metadata(smollm_path)["tokenizer.ggml.pre"] == "smollm"


def unigram() -> tokenizers.Tokenizer:
    core = tokenizers.Tokenizer(models.Unigram())
    trainer = trainers.UnigramTrainer(
        vocab_size=100,
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        unk_token="<|im_end|>",
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    return core


def with_normalizer() -> tokenizers.Tokenizer:
    core = train_core()
    core.normalizer = normalizers.Lowercase()
    return core


class TestRefusals:
    @pytest.mark.parametrize(
        ("core", "complaint"),
        [
            (unigram, "only BPE tokenizers"),
            (with_normalizer, "normalizer Lowercase"),
            (lambda: train_core(pre_tokenizers.ByteLevel(add_prefix_space=True)), "knows no name"),
            (lambda: train_core(ignore_merges=True), "knows no name"),
            (lambda: train_core(pre_tokenizers.Whitespace()), "only BPE tokenizers"),
        ],
    )
    def test_a_tokenizer_that_llama_cpp_would_not_follow(self, core: Any, complaint: str) -> None:
        with pytest.raises(PunaError, match=complaint):
            gguf_metadata(Tokenizer(core(), CONFIG))

    def test_more_stop_tokens_than_the_format_has_room_for(self) -> None:
        core = train_core(specials=[*CONFIG.values(), "<a>", "<b>", "<c>"])
        with pytest.raises(PunaError, match="three stop tokens"):
            gguf_metadata(Tokenizer(core, CONFIG, stop_tokens=["<a>", "<b>", "<c>"]))

    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            ({"tokenizer.ggml.model": "t5"}, "unknown GGUF tokenizer kind 't5'"),
            ({"tokenizer.ggml.pre": "smolm"}, "did you mean 'smollm'"),
            ({"tokenizer.ggml.tokens": ["a", "a"]}, "inconsistent"),
            ({"tokenizer.ggml.token_type": [1]}, "inconsistent"),
            ({"tokenizer.ggml.merges": ["a b c"]}, "not two tokens"),
        ],
    )
    def test_metadata_that_cannot_be_understood(
        self, chat_tokenizer: Tokenizer, change: dict[str, Any], complaint: str
    ) -> None:
        with pytest.raises(PunaError, match=complaint):
            tokenizer_from_metadata({**gguf_metadata(chat_tokenizer), **change}, where="x.gguf")

    @pytest.mark.parametrize("key", ["model", "tokens", "merges"])
    def test_metadata_that_lacks_a_key(self, chat_tokenizer: Tokenizer, key: str) -> None:
        metadata = gguf_metadata(chat_tokenizer)
        del metadata[f"tokenizer.ggml.{key}"]
        with pytest.raises(PunaError, match=f"lacks the key 'tokenizer.ggml.{key}'"):
            tokenizer_from_metadata(metadata, where="x.gguf")
