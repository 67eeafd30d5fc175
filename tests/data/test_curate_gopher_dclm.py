"""Gopher's and DCLM's signals against their plain definitions, and where the two readings part."""

from __future__ import annotations

import re
from collections import Counter

from curate_texts import DOCUMENTS, close, columns, scored, share
from hypothesis import given

from puna.data.curate.texts import Texts

STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}


def gopher_words_by_hand(text):
    words = text.split()
    textual = [word for word in words if any(c.isalnum() for c in word)]
    return {
        "word_count": len(words),
        "mean_word_length": share(sum(map(len, words)), len(words)),
        "text_word_count": len(textual),
        "mean_text_word_length": share(sum(map(len, textual)), len(textual)),
        "alphabetic_share": share(sum(any(c.isalpha() for c in word) for word in words), len(words)),
        "hash_ratio": share(text.count("#"), len(words)),
        "ellipsis_ratio": share(text.count("...") + text.count("…"), len(words)),
        "stop_words": len(STOP_WORDS & set(words)),
    }


def gopher_lines_by_hand(text):
    lines = text.splitlines()
    return {
        "bullet_share": share(sum(line.lstrip().startswith(("•", "-")) for line in lines), len(lines)),
        "ellipsis_share": share(sum(line.rstrip().endswith(("...", "…")) for line in lines), len(lines)),
    }


@given(DOCUMENTS.filter(len))
def test_gophers_quality_signals(documents):
    close(scored("gopher.words", documents), columns(documents, gopher_words_by_hand))
    close(scored("gopher.lines", documents), columns(documents, gopher_lines_by_hand))


def after_the_first(items):
    seen, copies = set(), []
    for item in items:
        if item in seen:
            copies.append(item)
        seen.add(item)
    return copies


def stepped_over(words, n):
    seen, at, copied = set(), 0, 0
    while at + n <= len(words):
        run = tuple(words[at : at + n])
        if run in seen:
            copied += len("".join(run))
            at += n
        else:
            seen.add(run)
            at += 1
    return copied


def gopher_repetition_by_hand(text):
    signals = {}
    for name, items in (
        ("line", re.split(r"\n+", text)),
        ("paragraph", re.split(r"\n{2,}", text.strip())),
    ):
        copies = after_the_first(items)
        signals[f"extra_{name}_share"] = share(len(copies), len(items))
        signals[f"extra_{name}_characters"] = share(sum(map(len, copies)), len(text))
    words = text.split()
    for n in (2, 3, 4):
        runs = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
        run, count = Counter(runs).most_common(1)[0] if runs else ("", 0)
        signals[f"top_{n}gram_characters"] = share(len(run) * count, len(text))
    for n in range(5, 11):
        signals[f"extra_{n}gram_characters"] = share(stepped_over(words, n), len(text))
    return signals


@given(DOCUMENTS.filter(len))
def test_gophers_repetition_counts_copies_after_the_first(documents):
    close(scored("gopher.repetition", documents), columns(documents, gopher_repetition_by_hand))


def fasttext_words(text):
    return [word for word in re.split("[ \n\r\t\v\f\0]+", text) if word and word[0].isalnum()]


def dclm_words_by_hand(text):
    words = text.split()
    symbols = sum(text.count(symbol) for symbol in ("#", "...", ". . .", "…"))
    return {
        "word_count": len(fasttext_words(text)),
        "mean_word_length": share(sum(map(len, words)), len(words)),
        "symbol_ratio": share(symbols, len(words)),
        "not_alphabetic_share": share(sum(not any(map(str.isalpha, word)) for word in words), len(words)),
        "stop_words": sum(word.lower() in STOP_WORDS for word in words),
    }


def dclm_lines_by_hand(text):
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return {
        "bullet_share": share(sum(line.startswith(("●", "•", "*", "-")) for line in lines), len(lines)),
        "ellipsis_share": share(sum(line.endswith(("...", ". . .", "…")) for line in lines), len(lines)),
    }


@given(DOCUMENTS.filter(len))
def test_dclms_quality_signals(documents):
    close(scored("dclm.words", documents), columns(documents, dclm_words_by_hand))
    close(scored("dclm.lines", documents), columns(documents, dclm_lines_by_hand))


def copied(items):
    counts = Counter(items)
    return [item for item in items if counts[item] > 1]


def dclm_repetition_by_hand(text, words):
    signals = {}
    for name, separator in (("line", "\n"), ("paragraph", "\n\n")):
        items = [item.strip() for item in text.split(separator) if item.strip()]
        signals[f"duplicate_{name}_share"] = share(len(copied(items)), len(items))
        signals[f"duplicate_{name}_characters"] = share(sum(map(len, copied(items))), sum(map(len, items)))
    letters = sum(map(len, words)) or 1
    for n in range(2, 11):
        runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        counts = Counter(runs)
        if n < 5:
            most = max(counts.values(), default=0)
            longest = max((len("".join(run)) for run, count in counts.items() if count == most), default=0)
            signals[f"top_{n}gram_characters"] = longest * most / letters if most > 1 else 0
        else:
            inside = {i + j for i, run in enumerate(runs) if counts[run] > 1 for j in range(n)}
            signals[f"duplicate_{n}gram_characters"] = sum(len(words[i]) for i in inside) / letters
    return signals


@given(DOCUMENTS.filter(len))
def test_dclms_repetition_counts_every_copy(documents):
    # Words by Unicode's boundaries have their own test below.
    found = Texts(documents).words("unicode")
    strings = found.strings()
    words = [strings[a:b] for a, b in zip(found.bounds, found.bounds[1:], strict=False)]
    by_hand = [dclm_repetition_by_hand(text, these) for text, these in zip(documents, words, strict=True)]
    close(
        scored("dclm.repetition", documents),
        {name: [row[name] for row in by_hand] for name in by_hand[0]},
    )
