"""RedPajama-V2's signals against their plain definitions."""

from __future__ import annotations

import json
import math
import re
import string
import unicodedata
from collections import Counter

import pytest
from curate_texts import DOCUMENTS, close, columns, scored
from hypothesis import given

from puna.core.errors import PunaError
from puna.data.curate.operator import apply_score, get_operator
from puna.data.curate.stop_words import STOP_WORDS
from puna.data.curate.texts import Texts


def normalise(text):
    text = text.translate(str.maketrans("", "", string.punctuation)).lower().strip()
    return unicodedata.normalize("NFD", re.sub(r"\s+", " ", text))


def lines_of(text):
    return re.findall(r"[^\n]*\n|[^\n]+$", text)


def rounded_share(part, whole, otherwise=None):
    return round(part / whole, 8) if whole else otherwise


def language_by_hand(text):
    raw, words = re.findall(r"\w+|[^\w\s]+", text), normalise(text).split()
    counts = Counter(words)
    entropy = -sum(c / len(words) * math.log(c / len(words)) for c in counts.values())
    ellipses = [line.rstrip().endswith(("...", "…")) for line in lines_of(text)]
    symbols = sum(text.count(symbol) for symbol in ("#", "...", "…"))
    no_letter = [not re.search("[a-zA-Z]", word) for word in raw]
    return {
        "rps_doc_num_sentences": len(re.findall(r"\b[^.!?]+[.!?]*", text)),
        "rps_doc_word_count": len(words),
        "rps_doc_mean_word_length": rounded_share(sum(map(len, words)), len(words)),
        "rps_doc_symbol_to_word_ratio": rounded_share(symbols, len(raw)),
        "rps_doc_frac_lines_end_with_ellipsis": rounded_share(sum(ellipses), len(ellipses)),
        "rps_doc_frac_no_alph_words": rounded_share(sum(no_letter), len(raw)),
        "rps_doc_frac_unique_words": rounded_share(len(counts), len(words)),
        "rps_doc_unigram_entropy": round(entropy, 8) if words else None,
        "rps_doc_frac_all_caps_words": rounded_share(sum(map(str.isupper, raw)), len(raw)),
    }


@given(DOCUMENTS.filter(len))
def test_natural_language(documents):
    found = scored("redpajama.natural_language", documents)
    by_hand = columns(documents, language_by_hand)
    # A sum of logarithms in another order may be rounded to the neighbouring eighth decimal.
    entropy, expected = found.pop("rps_doc_unigram_entropy"), by_hand.pop("rps_doc_unigram_entropy")
    assert entropy == [None if value is None else pytest.approx(value, abs=2e-8) for value in expected]
    close(found, by_hand)
    sizes = scored("redpajama.ccnet", documents)
    assert sizes["ccnet_length"] == [len(d) for d in documents]
    assert sizes["ccnet_nlines"] == [len(d.split("\n")) for d in documents]


def repetition_by_hand(text):
    words = normalise(text).split()
    letters = sum(map(len, words))
    signals = {}
    for n in range(2, 11):
        runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        counts = Counter(runs)
        if n < 5:
            run, count = counts.most_common(1)[0] if runs else ((), 0)
            top = len("".join(run)) * count if count > 1 else 0
            signals[f"rps_doc_frac_chars_top_{n}gram"] = rounded_share(top, letters, 0.0)
        else:
            inside = {i + j for i, run in enumerate(runs) if counts[run] > 1 for j in range(n)}
            copied = sum(len(words[i]) for i in inside)
            signals[f"rps_doc_frac_chars_dupe_{n}grams"] = rounded_share(copied, letters, 0.0)
    return signals


@given(DOCUMENTS.filter(len))
def test_repetition(documents):
    close(scored("redpajama.repetition", documents), columns(documents, repetition_by_hand))


def line_values(line):
    plain = normalise(line)
    return {
        "rps_lines_ending_with_terminal_punctution_mark": line.rstrip().endswith((".", "!", "?", "”")),
        "rps_lines_javascript_counts": plain.split().count("javascript"),
        "rps_lines_num_words": len(plain.split()),
        "rps_lines_numerical_chars_fraction": rounded_share(sum(map(str.isnumeric, plain)), len(plain), 0),
        "rps_lines_start_with_bulletpoint": line.lstrip().startswith(tuple("•‣▶◀◦■□▪▫–")),
        "rps_lines_uppercase_letter_fraction": rounded_share(sum(map(str.isupper, line)), len(line)),
    }


@given(DOCUMENTS)
def test_lines_as_spans(documents):
    found = scored("redpajama.lines", documents)
    by_hand = {name: [] for name in found}
    for place, text in enumerate(documents):
        start = 0
        for line in lines_of(text):
            for name, value in line_values(line).items():
                by_hand[name].append((place, start, start + len(line), float(value)))
            start += len(line)
        assert start == len(text)  # the spans tile the document
    close(found, by_hand)


@pytest.fixture
def lists(tmp_path):
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "en.txt").write_text("word\nword word\nthe\nitems in cart\n", encoding="utf-8")
    (tmp_path / "domains.json").write_text(json.dumps({"bad.example": 7}), encoding="utf-8")
    return tmp_path


def content_by_hand(text):
    plain, raw = normalise(text), re.findall(r"\w+|[^\w\s]+", text)
    words = plain.split()
    listed = sum(
        " ".join(words[i : i + n]) in {"word", "word word", "the", "items in cart"}
        for n in (1, 2, 3)
        for i in range(len(words) - n + 1)
    )
    stop_words = sum(word in STOP_WORDS["en"] for word in raw) if words else 0
    return {
        "rps_doc_curly_bracket": rounded_share(text.count("{") + text.count("}"), len(text), 0.0),
        "rps_doc_ldnoobw_words": listed,
        "rps_doc_lorem_ipsum": rounded_share(plain.count("lorem ipsum"), len(plain), 0.0),
        "rps_doc_stop_word_fraction": rounded_share(stop_words, len(raw), 0.0),
        "rps_doc_ut1_blacklist": None,
    }


def test_content(lists):
    @given(DOCUMENTS.filter(len))
    def check(documents):
        found = scored("redpajama.content", documents, bad_words=lists / "words")
        close(found, columns(documents, content_by_hand))

    check()


def test_lists_that_are_not_given_leave_null_which_is_not_zero(lists):
    found = scored("redpajama.content", ["A word on the page."])
    assert found["rps_doc_ldnoobw_words"] == [None]
    assert found["rps_doc_stop_word_fraction"] == [pytest.approx(2 / 6)]  # "A" is not "a"
    operator = get_operator("score", "redpajama.content")
    texts = Texts(["one", "two", "drei"], ["", "", "xx"], ["https://bad.example/a", "http://ok.example", ""])
    signals = apply_score(
        operator, texts, operator.settings(domains=lists / "domains.json", bad_words=lists / "words")
    )
    assert [None if math.isnan(v) else v for v in signals["rps_doc_ut1_blacklist"]] == [7, None, None]
    assert [None if math.isnan(v) else v for v in signals["rps_doc_ldnoobw_words"]] == [0, 0, None]


def test_a_list_that_is_not_there_is_told(tmp_path):
    with pytest.raises(PunaError, match="no folder of word lists"):
        scored("redpajama.content", ["x"], bad_words=tmp_path / "none")
    (tmp_path / "broken.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(PunaError, match="no table of domains"):
        scored("redpajama.content", ["x"], domains=tmp_path / "broken.json")
