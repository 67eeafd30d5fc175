"""Special tokens put into a tokenizer: text is spelt as before, each token is one id, roles keep ids."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, trainers

import puna
from puna.core.errors import PunaError
from puna.core.stage import Context, get_stage, validate
from puna.data.corpus import write_corpus
from puna.text.tokenizer import Tokenizer
from puna.text.vocabulary.surgery import compare, operate
from puna.text.vocabulary.train import train_tokenizer

MARKERS = ("<|im_start|>", "[INST]", "[/INST]")
TEXTS = [
    "the cat sat on the mat.",
    "  two  spaces\n\nand a line",
    "naïve café 日本語 🙂",
    "",
    "12,345 + 6 = 7",
]


def byte_level() -> Tokenizer:
    return train_tokenizer(["the cat sat on the mat in the end " * 5, "naïve café"], vocab_size=300)


def sentencepiece_like() -> Tokenizer:
    """In the manner of Llama 2: spaces as U+2581 in front of words, bytes to fall back to."""
    core = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, show_progress=False)
    core.train_from_iterator(["the cat </s> sat on the mat in the end"] * 5, trainer)
    described = json.loads(core.to_str())
    described["added_tokens"] = [token for token in described["added_tokens"] if token["id"] < 3]
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(described)), config)


@pytest.mark.parametrize("make", [byte_level, sentencepiece_like])
def test_old_text_is_spelt_as_before_and_every_special_is_one_id(
    make: Callable[[], Tokenizer], tmp_path: Path
) -> None:
    base = make()
    operate(base, end="<|im_end|>", pad="<|pad|>", tokens=MARKERS, reserved=5, multiple=64).save(tmp_path)
    made = Tokenizer.from_folder(tmp_path)
    figures = compare(base, made, TEXTS)
    assert figures["texts"] == len(TEXTS)
    assert figures["texts_changed"] == figures["specials_split"] == figures["pad_is_end"] == 0
    assert made.eos_id == base.eos_id and made.pad_id != made.eos_id and figures["end_moved"] == 0
    assert made.vocab_size % 64 == 0 and made.strings["eos_token"] == "<|im_end|>"
    old = base.strings["eos_token"]
    assert made.id_of(old) >= base.vocab_size and made.encode(f"a{old}b", allow_special=True).count(
        made.id_of(old)
    )
    kept = {token: index for token, index in base.vocabulary().items() if token != old}
    assert kept.items() <= made.vocabulary().items()
    assert sum("reserved" in token for token in made.special_tokens) >= 5


def test_a_text_that_names_a_special_token_is_left_out_of_the_comparison() -> None:
    base = byte_level()
    made = operate(base, end="<|im_end|>", pad="<|pad|>")
    assert compare(base, made, ["the <|im_end|> of it", "the cat"])["texts"] == 1


def test_a_changed_vocabulary_is_counted() -> None:
    base = byte_level()
    made = operate(base, end="<|im_end|>", pad="<|pad|>")
    described = json.loads(made.to_json())
    described["model"]["merges"] = described["model"]["merges"][1:]
    other = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(described)), made.strings)
    assert compare(base, other, TEXTS)["texts_changed"] > 0


def test_the_role_that_began_texts_stays_with_its_id() -> None:
    base = byte_level()  # one token for all roles, as GPT-2's
    made = operate(base, end="<|im_end|>", pad="<|pad|>")
    assert made.bos_id == made.eos_id == base.eos_id


def test_the_end_that_it_has_is_kept() -> None:
    base = byte_level()
    made = operate(base, end=base.strings["eos_token"], pad="<|pad|>", multiple=64)
    assert made.strings["eos_token"] == base.strings["eos_token"] and made.eos_id == base.eos_id


def test_a_token_named_twice_and_an_end_that_is_there_are_refused() -> None:
    with pytest.raises(PunaError, match="named twice"):
        operate(byte_level(), end="<|pad|>", pad="<|pad|>")
    with pytest.raises(PunaError, match="two ids"):
        operate(byte_level(), end="the", pad="<|pad|>")


def test_the_end_reaches_the_generation_config_of_a_model_made_with_it(tmp_path: Path) -> None:
    base = byte_level()
    base.save(tmp_path / "base")
    texts = [{"id": str(n), "text": t, "source": "t", "language": "en"} for n, t in enumerate(TEXTS) if t]
    corpus = write_corpus(tmp_path / "corpus", "documents", texts, provenance=[], ledger={})
    inputs: dict[str, Any] = {"tokenizer": str(tmp_path / "base"), "corpus": {"old": str(corpus.path)}}
    surgery, new = get_stage("special_tokens"), get_stage("initialise")
    outcome = surgery.function(
        Context("marked", tmp_path / "marked", inputs), validate(surgery.parameters, {}, where="test")
    )
    assert outcome.metrics["texts_changed"] == outcome.metrics["remainder"] == 0
    assert outcome.metrics["texts"] == len(texts)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    context = Context("new", tmp_path / "new", {"tokenizer": str(outcome.outputs["tokenizer"])})
    made = new.function(context, validate(new.parameters, sizes, where="test")).outputs["model"]
    said = json.loads((made / "generation_config.json").read_text())
    assert said["eos_token_id"] == base.eos_id and said["pad_token_id"] != said["eos_token_id"]
    assert puna.load(made).template is not None  # both markers of ChatML are there
