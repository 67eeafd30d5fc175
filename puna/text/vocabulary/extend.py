"""Extending a byte-level BPE: its own training goes on, on text of a new language or domain."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from puna.core.errors import PunaError
from puna.text.tokenizer import Tokenizer
from puna.text.vocabulary.spelling import is_byte_level
from puna.text.vocabulary.train import MIN_FREQUENCY, in_the_manner_of

# Characters for private use stand for base tokens while the library trains on them.
_PRIVATE = ((0xF0000, 0xFFFFE), (0x100000, 0x10FFFE))
_BETWEEN_WORDS = " "


def extend_tokenizer(
    base: Tokenizer, texts: Iterable[str], *, new_tokens: int, min_frequency: int = MIN_FREQUENCY
) -> Tokenizer:
    """``base`` with up to ``new_tokens`` more tokens, those that shorten ``texts`` most.

    Every new token joins two tokens as the base writes them in ``texts``, so all old ids stay and each
    new token stands for exactly the old tokens it was made of: expanding the new ones gives the
    base's own ids (but where a base with ``ignore_merges`` finds a whole word). Taking pieces from a
    separately trained vocabulary instead would mostly add tokens that the base's merges never reach.
    """
    described = json.loads(base.core.to_str())
    if described["model"]["type"] != "BPE" or not is_byte_level(base):
        raise PunaError(
            "only a byte-level BPE can be extended",
            found=f"a {described['model']['type']} tokenizer",
            fix="train a new tokenizer instead",
        )
    if new_tokens < 1:
        raise PunaError("an extension adds at least one token", where="new_tokens", found=new_tokens)
    words = _words(base, texts)
    merges = _more_merges(base, words, new_tokens, min_frequency)
    vocabulary = base.vocabulary()
    size = base.vocab_size
    for index, (left, right) in enumerate(merges):
        vocabulary[left + right] = size + index
    described["model"]["vocab"] = vocabulary
    described["model"]["merges"] += [list(merge) for merge in merges]
    return in_the_manner_of(base, tokenizers.Tokenizer.from_str(json.dumps(described)))


def _words(base: Tokenizer, texts: Iterable[str]) -> Counter[str]:
    """How often each word (what the base splits text into before merging) occurs."""
    core = base.core
    counted: Counter[str] = Counter()
    for text in texts:
        normal = core.normalizer.normalize_str(text) if core.normalizer is not None else text
        counted.update(word for word, _ in core.pre_tokenizer.pre_tokenize_str(normal))
    return counted


def _more_merges(
    base: Tokenizer, words: Counter[str], new_tokens: int, min_frequency: int
) -> list[tuple[str, str]]:
    """Merges of base tokens, most frequent first, each of which makes a token that is not there yet."""
    spelled = {word: [part.value for part in base.core.model.tokenize(word)] for word in sorted(words)}
    tokens = sorted({token for parts in spelled.values() for token in parts})
    character = dict(zip(tokens, _characters(), strict=False))
    if len(character) < len(tokens):
        raise PunaError("the texts use more base tokens than can be told apart", found=len(tokens))
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # Some merges are left out below, so more are asked for; the first ones do not depend on how many.
    trainer = trainers.BpeTrainer(
        vocab_size=len(character) + 2 * new_tokens, min_frequency=min_frequency, show_progress=False
    )
    lines = (_BETWEEN_WORDS.join(["".join(character[t] for t in spelled[w])] * words[w]) for w in spelled)
    core.train_from_iterator(lines, trainer)
    token_of = {character: token for token, character in character.items()}
    known = set(base.vocabulary())
    built = set(token_of)  # what may be merged further, in characters
    merges: list[tuple[str, str]] = []
    for left, right in json.loads(core.to_str())["model"]["merges"]:
        sides = tuple("".join(token_of[c] for c in side) for side in (left, right))
        # A union that the base spells otherwise would change what its own merges do.
        if left in built and right in built and sides[0] + sides[1] not in known:
            built.add(left + right)
            known.add(sides[0] + sides[1])
            merges.append((sides[0], sides[1]))
            if len(merges) == new_tokens:
                break
    return merges


def _characters() -> Iterator[str]:
    for start, stop in _PRIVATE:
        yield from map(chr, range(start, stop))
