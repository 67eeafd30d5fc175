"""Edits of pages, bans by URL and rules about lines, against their plain definitions."""

from __future__ import annotations

import re

import pytest
from curate_texts import DOCUMENTS, close, columns, mapped, scored, share
from hypothesis import given, settings

from puna.core.errors import PunaError
from puna.data.curate.maps.dclm_cleaning import top_level_domains
from puna.data.curate.operator import apply_score, get_operator
from puna.data.curate.texts import Texts

NOUNS = "likes|shares|comments|retweets|reposts|quotes|bookmarks|upvotes|downvotes|downloads|views|followers"
COUNTER = re.compile(rf"^\W*\d(?:,|\.|\d)*(?:K|k|M|m|B|b)?\s+(?:{NOUNS})\W*$")


def fasttext_words(text):
    return sum(word[:1].isalnum() for word in re.split("[ \n\r\t\v\f\0]+", text))


def without_phrase(text, pattern):
    lines = []
    for line in text.split("\n"):
        if len(line.split()) <= 10:
            shorter = re.sub(pattern, "", line, flags=re.I)
            if line and (not shorter or shorter.isspace()):
                continue
            line = shorter
        lines.append(line)
    return "\n".join(lines).strip()


def modified_by_hand(text):
    def keep(rule):
        return "\n".join(line for line in text.split("\n") if not line or rule(line))

    text = keep(lambda line: sum(map(str.isupper, line)) / len(line) <= 0.5).strip()
    text = keep(lambda line: sum(map(str.isdigit, line)) / len(line) <= 0.999999).strip()
    text = keep(lambda line: not COUNTER.search(line.lower())).strip()
    text = keep(lambda line: len(line.split()) >= 2)
    text = without_phrase(text, r"\s?items in cart")
    text = without_phrase(text, r"\s?read more\.\.\.$")
    return without_phrase(text, r"^sign-in\s?")


@given(DOCUMENTS.filter(len))
@settings(max_examples=200)
def test_dclms_line_modifiers(documents):
    texts, signals = mapped("dclm.modify_lines", documents)
    by_hand = [modified_by_hand(text) for text in documents]
    assert texts == by_hand
    before, after = list(map(fasttext_words, documents)), list(map(fasttext_words, by_hand))
    removed = [share(b - a, b) for a, b in zip(after, before, strict=True)]
    close(signals, {"words_before": before, "words_after": after, "removed_share": removed})


@pytest.mark.parametrize(
    ("gone", "stays"),
    [
        ("12345678", "12345678 9"),
        ("3 likes", "3 likes more"),
        ("1.2K Views!", "1.2K Viewers!"),
        ("word", "two words"),
        ("Sign-in", "Sign-in here now"),
    ],
)
def test_each_line_rule_from_both_sides(gone, stays):
    page = "This line stays.\n{}\nSo does this one."
    texts, _ = mapped("dclm.modify_lines", [page.format(gone), page.format(stays)])
    assert texts[0] == "This line stays.\nSo does this one."
    assert texts[1] == page.format(stays.replace("Sign-in ", ""))


def test_lines_of_capitals_from_both_sides():
    page = "This line stays.\n{}\nSo does this one."
    half, more = "ABCD efg", "ABCDE fg"  # 4 and 5 capitals of 8 characters
    texts, _ = mapped("dclm.modify_lines", [page.format(half), page.format(more)])
    assert texts == [page.format(half), "This line stays.\nSo does this one."]


def test_phrases_are_cut_out_of_short_lines_only():
    short, long = "one two 3 items in cart six", "one two three four five six seven eight items in cart"
    texts, _ = mapped("dclm.modify_lines", [short, long, "Go on here. Read more...", "SIGN-IN to read on"])
    assert texts == ["one two 3 six", long, "Go on here.", "to read on"]


TLDS = "|".join(sorted(top_level_domains()))
HOST = re.compile(
    r"\s{0,10}(?:((https?|ftp)://))?[-a-zA-Z0-9@:%._\+~#=]{1,256}"
    rf"\.({TLDS})\b([-a-zA-Z0-9()@:%_\+.~#?&//=]*)"
)
ADDRESS = re.compile(
    r"\s{0,10}\b((https?|ftp)://)?(?:[0-2]?[0-9]{1,2}\.){3}[0-2]?[0-9]{1,2}[-a-zA-Z0-9()@:%_\+.~#?&//=]*"
)


@given(DOCUMENTS.filter(len))
def test_urls_are_taken_out(documents):
    texts, signals = mapped("dclm.remove_urls", documents)
    by_hand = [ADDRESS.sub("", HOST.sub("", text)) for text in documents]
    assert texts == by_hand
    counts = [HOST.subn("", text)[1] + ADDRESS.subn("", HOST.sub("", text))[1] for text in documents]
    assert signals["removed_urls"] == counts


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("See http://a.example.com/x?y=1, please.", "See, please."),
        ("one.com two.org", ""),
        ("mail me@foo.net now", "mail now"),
        ("Ends here. Next.", "Ends here. Next."),
        ("not.atld and e.g. this", "not.atld and e.g. this"),
        ("foo.comé", "foo.comé"),
        ("at 10.0.0.1:80/x or 1.2.3", "at or 1.2.3"),
        ("a" + " " * 12 + "b.com", "a  "),
    ],
)
def test_what_is_a_url(text, left):
    texts, _ = mapped("dclm.remove_urls", [text])
    assert texts == [left]


@given(DOCUMENTS.filter(len))
def test_runs_of_line_feeds_are_squeezed(documents):
    texts, signals = mapped("dclm.squeeze_newlines", documents)
    assert texts == [re.sub("\n{3,}", "\n\n", text) for text in documents]
    assert signals["removed_newlines"] == [len(a) - len(b) for a, b in zip(documents, texts, strict=True)]


def test_urls_are_banned_by_the_lists_that_are_given(tmp_path):
    (tmp_path / "soft.txt").write_text("cam\nLive\n\n", encoding="utf-8")
    operator = get_operator("score", "dclm.urls")
    urls = [
        "https://www.Bad.example/page",
        "https://sub.bad.example/page",
        "https://ok.example/x-x-x/a",
        "https://ok.example/hardword",
        "https://ok.example/a-hard-word",
        "https://ok.example/live/live",
        "https://ok.example/live?cam=1",
        "",
    ]
    settings_ = operator.settings(
        domains=("bad.example",), strict=("xxx", "xx"), hard=("hard",), soft_file=tmp_path / "soft.txt"
    )
    signals = apply_score(operator, Texts([""] * 8, None, urls), settings_)
    listed = {name: [None if v != v else v for v in values.tolist()] for name, values in signals.items()}
    assert listed == {
        "banned_domain": [1, 0, 0, 0, 0, 0, 0, None],
        "strict": [0, 0, 1, 0, 0, 0, 0, None],
        "hard": [0, 0, 0, 0, 1, 0, 0, None],
        "soft": [0, 0, 0, 0, 0, 1, 2, None],
    }
    without = apply_score(operator, Texts([""], None, ["https://a.example"]), operator.settings())
    assert all(values != values for values in without.values())  # null, not 0
    with pytest.raises(PunaError, match="no list of hard entries"):
        apply_score(operator, Texts([""], None, ["u"]), operator.settings(hard_file=tmp_path / "none"))


def refined_by_hand(text):
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    rows = [
        (
            sum(map(str.isupper, line)) / len(line),
            sum(map(str.isdigit, line)) / len(line),
            COUNTER.search(line.lower()) is not None,
            len(line.split()),
        )
        for line in lines
    ]
    flags = [upper > 0.5 or digits > 0.999999 or seen or words < 2 for upper, digits, seen, words in rows]
    rows = [(*row, flag) for row, flag in zip(rows, flags, strict=True)]
    return share(sum(row[3] for row in rows if row[4]), sum(row[3] for row in rows)), rows


@given(DOCUMENTS.filter(len))
def test_refinedwebs_rules_flag_lines(documents):
    found = scored("refinedweb.lines", documents)
    by_hand = [refined_by_hand(text) for text in documents]
    assert found["flagged_word_share"] == pytest.approx([flagged for flagged, _ in by_hand])
    for place, name in enumerate(("upper_share", "digit_share", "counter", "words", "flagged")):
        values = [value for *_, value in found[name]]
        assert values == pytest.approx([float(row[place]) for _, rows in by_hand for row in rows])


POLICIES = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)


def sentences_by_hand(line):
    return max(len(re.findall(r"[.?!…]+[\"'”’»)\]]{0,2}(?=\s|$)", line)), 1)


def c4_by_hand(text, min_words):
    kept, filler, brackets, sentences, lines = [], 0, 0, 0, text.splitlines()
    for line in lines:
        line = re.sub(r"\[\d*\]|\[edit\]|\[citation needed\]", "", line.strip())
        if not line.endswith((".", "?", "!", '"')) or line.endswith("..."):
            continue
        if len(line.split()) < min_words:
            continue
        filler += "lorem ipsum" in line.lower()
        if "javascript" in line.lower():
            continue
        brackets += "{" in line
        if any(phrase in line.lower() for phrase in POLICIES):
            continue
        sentences += sentences_by_hand(line)
        kept.append(line)
    signals = {"lorem_ipsum": filler, "curly_brackets": brackets, "sentences": sentences}
    return "\n".join(kept).strip(), signals | {"kept_share": len(kept) / max(len(lines), 1)}


@given(DOCUMENTS.filter(len))
@settings(max_examples=200)
def test_c4s_lines(documents):
    texts, signals = mapped("c4.lines", documents, min_words=2)
    by_hand = [c4_by_hand(text, 2) for text in documents]
    assert texts == [text for text, _ in by_hand]
    close(signals, {name: [row[name] for _, row in by_hand] for name in signals})


@pytest.mark.parametrize(
    ("gone", "stays"),
    [
        ("one two three four.", "one two three four five."),
        ("one two three four five", "one two three four five!"),
        ("one two three four five...", "one two three four five."),
        ("We use JavaScript a lot here.", "We use Java a lot here."),
        ("Read our Privacy Policy now here.", "Read our private policy now here."),
        ("one two three four " + "x" * 1001 + ".", "one two three four " + "x" * 999 + "."),
        ("one two three four five. [12]", "one two three four five.[12]"),  # the space stays behind
    ],
)
def test_each_c4_rule_from_both_sides(gone, stays):
    texts, _ = mapped("c4.lines", [gone, stays])
    assert texts == ["", stays.removesuffix("[12]")]


def test_words_of_a_list(tmp_path):
    (tmp_path / "en.txt").write_text("bad\nvery bad\n", encoding="utf-8")
    (tmp_path / "ja.txt").write_text("悪\n", encoding="utf-8")
    operator = get_operator("score", "c4.bad_words")
    texts = Texts(["Bad, very BAD. Badly!", "極悪い", "極悪い", "bad"], ["", "ja", "en", "fr"])
    found = apply_score(operator, texts, operator.settings(words=tmp_path))["bad_words"].tolist()
    assert found[:3] == [2, 1, 0]
    assert found[3] != found[3]


@given(DOCUMENTS.filter(len))
def test_the_third_longest_line(documents):
    def by_hand(text):
        lengths = sorted(map(len, text.split("\n")), reverse=True)
        return {"third_longest": lengths[2] if len(lengths) > 2 else None}

    close(scored("c4.long_lines", documents), columns(documents, by_hand))
