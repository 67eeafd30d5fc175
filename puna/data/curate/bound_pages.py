"""Pages made to lie around a bound: families that grow with a number, for DCLM's rules about pages.

A filter is right about its bound if of two neighbours of a family, one on either side, just the one beyond
is dropped, by the gate that is meant and no other. The bounds stand here once more, out of the paper
(S33, arXiv:2406.11794), apart from the preset that is checked.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

Make = Callable[[int], str]


@dataclass(frozen=True)
class Family:
    """Pages by a number, and the gate of a preset whose bound (inclusive) they cross."""

    gate: str
    minimum: float | None
    maximum: float | None
    make: Make
    numbers: Sequence[int]


def fresh(length: int = 5) -> Iterator[str]:
    """Words that never come twice."""
    return ("".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=length))


def words(count: int, length: int = 5) -> list[str]:
    """``count`` different words, beginning with four stop words."""
    return [*["the", "of", "and", "to"], *itertools.islice(fresh(length), count - 4)]


def page(items: Sequence[str], per_line: int = 10) -> str:
    """Words in lines."""
    rows = [items[at : at + per_line] for at in range(0, len(items), per_line)]
    return "\n".join(" ".join(row) for row in rows)


def many_words(k: int) -> str:
    """k words."""
    return page(words(k))


def short_words(k: int) -> str:
    """k words of 2 letters among words of 3."""
    return page(["the", "and", *itertools.islice(fresh(2), k), *itertools.islice(fresh(3), 60 - k)])


def long_words(k: int) -> str:
    """Words of 10 letters, up to the k-th longer."""
    many = ["the", "and", *itertools.islice(fresh(10), 60)]
    return page([word + "x" * (1 < at < k) for at, word in enumerate(many)])


def marked(mark: str, total: int = 60) -> Make:
    """``total`` words, k of them with a mark before them."""

    def make(k: int) -> str:
        return page([f"{mark}{word}" if 4 <= at < k + 4 else word for at, word in enumerate(words(total))])

    return make


def numbers(k: int) -> str:
    """60 words, k of them without a letter."""
    return page([*words(60 - k), *map(str, range(10001, 10001 + k))])


def stop_words(*given: str) -> Make:
    """60 words behind the first k of those given."""

    def make(k: int) -> str:
        return page([*given[:k], *itertools.islice(fresh(), 60)])

    return make


def with_lines(begin: str = "", end: str = "") -> Make:
    """Ten lines, of which k begin or end with something."""

    def make(k: int) -> str:
        rows = page(words(100)).split("\n")
        return "\n".join(f"{begin}{row}{end}" if at < k else row for at, row in enumerate(rows))

    return make


def repeated(separator: str) -> Make:
    """Ten long lines, or paragraphs of three lines, and k times one short line between them."""

    def make(k: int) -> str:
        rows = page(words(300), 30).split("\n")
        if separator == "\n\n":
            rows = [page(row.split()) for row in rows]
        pairs = [[row, "short line"] if at < k else [row] for at, row in enumerate(rows)]
        return separator.join(itertools.chain(*pairs))

    return make


def long_lines(k: int) -> str:
    """Thirty lines, and twice a word of k letters alone in one."""
    rows = page(words(300)).split("\n")
    return "\n".join([*rows[:10], "x" * k, *rows[10:20], "x" * k, *rows[20:]])


def long_paragraphs(k: int) -> str:
    """Thirty paragraphs, and twice one of two short lines with k spaces behind the first."""
    rows, copy = page(words(300)).split("\n"), "aa" + " " * k + "\nbb"
    return "\n\n".join([*rows[:10], copy, *rows[10:20], copy, *rows[20:]])


def phrases(n: int, total: int = 1200) -> Make:
    """k copies of n words, always with another word between them, in a page of ``total`` words."""

    def make(k: int) -> str:
        source = words(total)
        phrase, others = [word + "q" for word in source[-n:]], iter(source)
        copies = itertools.chain(*([*phrase, next(others)] for _ in range(k)))
        head = list(copies)
        return page(head + list(itertools.islice(others, total - len(head))))

    return make


def one_word_lines(k: int) -> str:
    """100 words in lines of ten, then k lines of one word."""
    return page(words(100)) + "\n" + "\n".join(itertools.islice(fresh(6), k))


def n_grams(prefix: str) -> list[Family]:
    """Pages around the bounds of repeated n-grams, which Gopher, DCLM and RedPajama share."""
    tops, copies = {2: 0.2, 3: 0.18, 4: 0.16}, {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.1}
    top = (
        Family(f"{prefix}top {n}-gram", None, most, phrases(n), range(20, 140)) for n, most in tops.items()
    )
    copied = (
        Family(f"{prefix}{n}-grams", None, most, phrases(n), range(5, 45)) for n, most in copies.items()
    )
    return [*top, *copied]


def repetition(prefix: str) -> list[Family]:
    """Pages around the bounds of repeated lines and paragraphs, and of n-grams."""
    return [
        Family(f"{prefix}paragraphs", None, 0.3, repeated("\n\n"), range(10)),
        Family(f"{prefix}repeated lines", None, 0.3, repeated("\n"), range(10)),
        Family(f"{prefix}line characters", None, 0.2, long_lines, range(50, 1000, 25)),
        Family(f"{prefix}paragraph characters", None, 0.2, long_paragraphs, range(50, 1000, 25)),
        *n_grams(prefix),
    ]


def dclm_families() -> list[Family]:
    """Pages around every bound of DCLM's rules but the bans by URL."""
    return [
        Family("dclm words", 50, 100_000, many_words, (49, 50, 100_000, 100_001)),
        Family("dclm word length", 3, None, short_words, (0, 1, 2)),
        Family("dclm word length", None, 10, long_words, range(12, 20)),
        Family("dclm symbols", None, 0.1, marked("#"), (5, 6, 7)),
        Family("dclm bullets", None, 0.9, with_lines(begin="•"), (8, 9, 10)),
        Family("dclm ellipses", None, 0.3, with_lines(end=" end..."), (2, 3, 4)),
        Family("dclm alphabetic words", None, 0.2, numbers, (11, 12, 13)),
        Family("dclm stop words", 2, None, stop_words("The", "THE"), (0, 1, 2)),
        *repetition("dclm "),
        Family("dclm removed words", None, 0.05, one_word_lines, (5, 6)),
    ]
