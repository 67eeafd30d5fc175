"""Training a tokenizer on texts, in the manner of a model's own one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Literal

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from puna.core.errors import PunaError, unknown_name
from puna.text.tokenizer import Tokenizer
from puna.text.vocabulary.spelling import BYTE_OF, is_byte_level

TokenizerKind = Literal["bpe", "unigram"]
KINDS: tuple[TokenizerKind, ...] = ("bpe", "unigram")
MIN_FREQUENCY = 2
END_OF_TEXT = "<|endoftext|>"

# The library gives bytes that no text has scores in the order of a hash table, 0.0001 apart from the
# lowest score on, and sums the others in a changing order, which moves them by some 1e-11.
_UNSEEN_STEP, _SCORE_DIGITS = 1e-4, 4


def train_tokenizer(
    texts: Iterable[str],
    *,
    kind: TokenizerKind = "bpe",
    vocab_size: int,
    base: Tokenizer | None = None,
    min_frequency: int | None = None,
    single_digits: bool | None = None,
) -> Tokenizer:
    """Train a byte-level BPE or Unigram vocabulary that spells every text without loss.

    From ``base`` come the special tokens (the same strings, now with the first ids, in the old
    order), their roles, the stop tokens, the chat template, the normalizer and the way text is split
    before merging. Without one, or if it is not byte-level, text is split as by GPT-2 with single
    digits (llama.cpp's "smollm"); without one ``<|endoftext|>`` is the only special token.
    ``single_digits`` overrides the split; ``min_frequency`` (BPE, 2 if None) is how often a pair
    must occur to be merged. The vocabulary is smaller than ``vocab_size`` if the texts give no more.
    The same texts give the same vocabulary. A BPE can be written into a GGUF file, a Unigram cannot;
    and the library's Unigram takes as pieces only strings found in two different words, so that it
    needs much text to come near a BPE.
    """
    if kind not in KINDS:
        raise unknown_name("kind of tokenizer", kind, KINDS)
    if kind == "unigram" and min_frequency is not None:
        raise PunaError(
            "min_frequency means nothing to a Unigram trainer", where="min_frequency", found=min_frequency
        )
    added = _added_tokens(base)
    smallest = len(BYTE_OF) + len(added)
    if vocab_size < smallest:
        raise PunaError(
            "the vocabulary has no room for all bytes and special tokens",
            where="vocab_size",
            found=vocab_size,
            expected=f"at least {smallest}",
        )
    core, trainer = _untrained(kind, base, single_digits, min_frequency, vocab_size, added)
    core.train_from_iterator(texts, trainer)
    described = json.loads(core.to_str())
    described["added_tokens"] = [{**token, "id": index} for index, token in enumerate(added)]
    if kind == "unigram":
        described["model"]["vocab"] = _in_fixed_order(described["model"]["vocab"], len(added))
    return in_the_manner_of(base, tokenizers.Tokenizer.from_str(json.dumps(described)))


def in_the_manner_of(base: Tokenizer | None, core: tokenizers.Tokenizer) -> Tokenizer:
    """A tokenizer around ``core`` with the roles, settings, template and stop tokens of ``base``."""
    if base is None:
        return Tokenizer(core, {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT})
    if base.adds_bos:
        bos = base.strings["bos_token"]
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0",
            pair=f"{bos}:0 $A:0 {bos}:1 $B:1",
            special_tokens=[(bos, core.token_to_id(bos))],
        )
    config = {**base.settings, **base.strings, "chat_template": base.chat_template}
    return Tokenizer(core, config, base.stop_tokens)


def _untrained(
    kind: TokenizerKind,
    base: Tokenizer | None,
    single_digits: bool | None,
    min_frequency: int | None,
    vocab_size: int,
    added: list[dict[str, Any]],
) -> tuple[tokenizers.Tokenizer, trainers.Trainer]:
    """An empty tokenizer that splits text as asked, and its trainer."""
    model = base if base is not None and is_byte_level(base) else None
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "special_tokens": [str(token["content"]) for token in added],
        "initial_alphabet": sorted(BYTE_OF),
        "show_progress": False,
    }
    ignores = False
    if model is not None and single_digits is None:
        split = model.core.pre_tokenizer
        # Only together with the base's own split does llama.cpp know a name for this.
        ignores = bool(json.loads(model.core.to_str())["model"].get("ignore_merges"))
    else:
        split = pre_tokenizers.ByteLevel(add_prefix_space=False)
        if single_digits is not False:
            split = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), split])
    trainer: trainers.Trainer
    if kind == "unigram":
        core, trainer = tokenizers.Tokenizer(models.Unigram()), trainers.UnigramTrainer(**settings)
    else:
        least = MIN_FREQUENCY if min_frequency is None else min_frequency
        core = tokenizers.Tokenizer(models.BPE(ignore_merges=ignores))
        trainer = trainers.BpeTrainer(**settings, min_frequency=least)
    core.pre_tokenizer, core.decoder = split, decoders.ByteLevel()
    if model is not None and model.core.normalizer is not None:
        core.normalizer = model.core.normalizer
    return core, trainer


def _added_tokens(base: Tokenizer | None) -> list[dict[str, Any]]:
    """The base's special and other added tokens as tokenizer.json lists them, in order of their ids."""
    if base is not None:
        tokens: list[dict[str, Any]] = json.loads(base.core.to_str())["added_tokens"]
        return sorted(tokens, key=lambda token: int(token["id"]))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [{"content": END_OF_TEXT, **flags, "special": True}]


def _in_fixed_order(vocabulary: list[tuple[str, float]], special: int) -> list[tuple[str, float]]:
    """A Unigram vocabulary without the traces of the library's hash tables: ids by score, then spelling."""
    pieces = vocabulary[special:]
    lowest = min(score for _, score in pieces)
    bound = lowest + len(BYTE_OF) * _UNSEEN_STEP
    fixed = []
    for piece, score in pieces:
        unseen = len(piece) == 1 and score <= bound
        fixed.append((piece, round(lowest if unseen else score, _SCORE_DIGITS)))
    return [*vocabulary[:special], *sorted(fixed, key=lambda entry: (-entry[1], entry[0]))]
