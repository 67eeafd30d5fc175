"""Which parts of a long text answer a question: chunks of tokens, ranked by BM25.

A chunk ends where the coarsest of these stands that gives chunks of the wanted size: an empty line, a
line's end, a sentence's end, a comma, a space (the recursive split of text splitters, here over tokens,
so that nothing is encoded again). BM25 is Okapi's with k1 1.5 and b 0.75 over lower-case words
(Robertson and Zaragoza 2009), as in rank-bm25, with idf log(1 + (N - n + 0.5) / (n + 0.5)), never negative.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence

SEPARATORS = ("\n\n", "\n", ". ", "! ", "? ", "; ", ", ", " ")
_WORD = re.compile(r"\w+")
_K1, _B = 1.5, 0.75


def split_tokens(pieces: Sequence[str], most: int, separators: Sequence[str] = SEPARATORS) -> list[range]:
    """Ranges of consecutive tokens of at most ``most``; ``pieces`` are the texts of the tokens in order.

    Joined, the ranges are all tokens.
    """
    return [range(start, stop) for start, stop in _split(pieces, 0, len(pieces), most, separators)]


def _split(
    pieces: Sequence[str], start: int, stop: int, most: int, separators: Sequence[str]
) -> list[tuple[int, int]]:
    """The same for the tokens from ``start`` to ``stop``."""
    if stop - start <= most:
        return [(start, stop)] if stop > start else []
    if not separators:
        return [(place, min(place + most, stop)) for place in range(start, stop, most)]
    cuts = _cuts(pieces, start, stop, separators[0])
    found: list[tuple[int, int]] = []
    begin = start
    for cut, following in itertools.pairwise([*cuts, stop]):
        if following - begin > most and cut > begin:  # what has come together is as large as it may be
            found += _split(pieces, begin, cut, most, separators[1:])
            begin = cut
    return found + _split(pieces, begin, stop, most, separators[1:])


def _cuts(pieces: Sequence[str], start: int, stop: int, separator: str) -> list[int]:
    """Tokens before which a text may be cut: those behind a separator, or that begin with its white space."""
    mark, text, cuts = separator.rstrip(" "), "", list[int]()
    for place in range(start, stop):
        piece = pieces[place]
        if place > start:
            spaced = piece[:1] == " " and separator[-1:] == " "
            if text.endswith(separator) or (spaced and (not mark or text.endswith(mark))):
                cuts.append(place)
        text = (text + piece)[-8:]
    return cuts


def rank(chunks: Sequence[str], question: str) -> list[tuple[float, int]]:
    """Score and number of every chunk, the best first; of equal ones the earlier first."""
    words = [Counter(_words(chunk)) for chunk in chunks]
    lengths = [sum(counts.values()) for counts in words]
    mean = sum(lengths) / len(lengths) if any(lengths) else 1.0
    scores = [0.0] * len(chunks)
    for word in set(_words(question)):
        holding = sum(word in counts for counts in words)
        rarity = math.log(1 + (len(chunks) - holding + 0.5) / (holding + 0.5))
        for number, counts in enumerate(words):
            often = counts[word]
            if often:
                damped = often + _K1 * (1 - _B + _B * lengths[number] / mean)
                scores[number] += rarity * often * (_K1 + 1) / damped
    found = [(score, number) for number, score in enumerate(scores)]
    return sorted(found, key=lambda pair: (-pair[0], pair[1]))


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]
