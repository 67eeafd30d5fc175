"""An old language, a new one made of it word by word, and small tokenizers of both."""

from __future__ import annotations

import random

from text_samples import CORPUS

from puna.text.tokenizer import Tokenizer
from puna.text.vocabulary.train import train_tokenizer

DICTIONARY = {
    "cat": "kat",
    "dog": "hond",
    "house": "huis",
    "red": "rood",
    "green": "groen",
    "sees": "ziet",
    "walks": "loopt",
    "the": "de",
    "or": "of",
    "of": "van",
    "small": "klein",
    "tree": "boom",
    "water": "plas",
    "under": "onder",
    "never": "nooit",
}


def sentence_pairs(count: int = 300, seed: int = 0) -> list[tuple[str, str]]:
    """Sentences of random words with their translations, word by word."""
    draw = random.Random(seed)
    words = sorted(DICTIONARY)
    pairs = []
    for _ in range(count):
        chosen = [draw.choice(words) for _ in range(draw.randint(3, 8))]
        pairs.append((f"{' '.join(chosen)}.", f"{' '.join(DICTIONARY[word] for word in chosen)}."))
    return pairs


def old_tokenizer(size: int = 420) -> Tokenizer:
    """A byte-level BPE of the old language with its own special tokens and a chat template."""
    core = train_tokenizer([*(source for source, _ in sentence_pairs()), *CORPUS], vocab_size=size).core
    core.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    config = {
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "chat_template": "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}",
    }
    return Tokenizer(core, config, stop_tokens=["<|im_start|>"])


def new_tokenizer(base: Tokenizer | None, size: int = 380) -> Tokenizer:
    """A BPE of the new language in the manner of ``base``."""
    return train_tokenizer([target for _, target in sentence_pairs()], vocab_size=size, base=base)


def noisy_pairs(count: int = 120, seed: int = 1) -> list[tuple[str, str]]:
    """Sentence pairs whose translations are out of order and lack words, which misleads an aligner."""
    draw = random.Random(seed)
    pairs = []
    for source, target in sentence_pairs(count, seed):
        words = target.rstrip(".").split()
        pairs.append((source, " ".join(draw.sample(words, max(2, len(words) - 2)))))
    return pairs
