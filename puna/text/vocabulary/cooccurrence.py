"""Which old tokens stand where new tokens stand: counted over word-aligned sentence pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import tokenizers
from tokenizers import pre_tokenizers

from puna.text.aligner import Symmetrisation, align
from puna.text.tokenizer import Tokenizer

Counts = dict[int, dict[int, float]]
Span = tuple[int, int]
Tokens = tuple[int, ...]

# A word: one Chinese character, a run of other letters, one digit, or a run of signs. Languages that
# write other scripts without spaces get long words, which align badly.
_WORD = r"\p{Han}|(?:(?!\p{Han})[\p{L}\p{M}])+|\p{N}|[^\s\p{L}\p{M}\p{N}]+"
_BATCH = 2_000


def count_aligned(
    old: Tokenizer,
    new: Tokenizer,
    pairs: Sequence[tuple[str, str]],
    *,
    position: float,
    symmetrisation: Symmetrisation,
    iterations: int,
) -> Counts:
    """Mass that each new token shares with each old one: {new id: {old id: mass}}.

    The words of the (old side, new side) ``pairs`` are aligned without regard to case. Each aligned
    occurrence of a new word gives each of its tokens a mass of 1, split evenly over its partners
    and inside one over its tokens: the share ``position`` by place in the word, the rest evenly.
    """
    sides = [_words(old, [source for source, _ in pairs]), _words(new, [target for _, target in pairs])]
    lowered = [[[word for word, _ in sentence] for sentence in side] for side in sides]
    links = align(list(zip(*lowered, strict=True)), iterations=iterations, symmetrisation=symmetrisation)
    together: Counter[tuple[Tokens, Tokens]] = Counter()
    for source, target, found in zip(*sides, links, strict=True):
        points = found.tolist()
        partners = Counter(right for _, right in points)
        for left, right in points:
            together[target[right][1], source[left][1]] += 1 / partners[right]  # type: ignore[assignment]
    counts: Counts = {}
    for (new_tokens, old_tokens), mass in together.items():
        _spread(counts, new_tokens, old_tokens, mass, position)
    return counts


def _words(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[tuple[str, Tokens]]]:
    """Each text's words, folded, with the ids of the tokens that touch them."""
    splitter = pre_tokenizers.Split(tokenizers.Regex(_WORD), "isolated")
    found: list[list[tuple[str, Tokens]]] = []
    for start in range(0, len(texts), _BATCH):
        batch = list(texts[start : start + _BATCH])
        for text, encoding in zip(
            batch, tokenizer.core.encode_batch(batch, add_special_tokens=False), strict=True
        ):
            spans = [(word, span) for word, span in splitter.pre_tokenize_str(text) if not word.isspace()]
            tokens = _touching([span for _, span in spans], encoding.ids, encoding.offsets)
            found.append(
                [(word.casefold(), ids) for (word, _), ids in zip(spans, tokens, strict=True) if ids]
            )
    return found


def _touching(words: Sequence[Span], ids: Sequence[int], spans: Sequence[Span]) -> list[Tokens]:
    """For each word the tokens that overlap it; both lists are in the order of the text."""
    touching: list[Tokens] = []
    first = 0
    for start, end in words:
        while first < len(spans) and spans[first][1] <= start:
            first += 1
        last = first
        while last < len(spans) and spans[last][0] < end:
            last += 1
        touching.append(tuple(ids[first:last]))
    return touching


def _spread(counts: Counts, new: Tokens, old: Tokens, mass: float, position: float) -> None:
    """Give each of the ``new`` tokens of a word ``mass``, spread over the ``old`` tokens of its partner.

    By place, token i of n takes the stretch i/n to (i+1)/n of the word, and shares with the old
    tokens by how much of it their stretches cover.
    """
    for i, token in enumerate(new):
        row = counts.setdefault(token, {})
        for j, partner in enumerate(old):
            overlap = min((i + 1) / len(new), (j + 1) / len(old)) - max(i / len(new), j / len(old))
            share = position * max(0.0, overlap) * len(new) + (1 - position) / len(old)
            if share:
                row[partner] = row.get(partner, 0.0) + mass * share
