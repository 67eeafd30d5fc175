"""Setu's cleaning, statistics and boxes: each against its definition worked out by hand."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from puna.core.stage import validate
from puna.data.curate import boxes
from puna.data.curate.operator import BadDocument, apply_map, apply_score, get_operator
from puna.data.curate.texts import Texts

PARTS = [
    "a",
    "bc",
    "क",
    "त ",
    " ",
    "  ",
    "\n",
    "\n\n",
    ".",
    "।",
    "?",
    "1",
    "12",
    ",",
    "...",
    "####",
    "中",
    "\t",
]
PARTS += ["|", "(", ")", "é", '"', "؟", "1,5"]
documents = some.lists(some.lists(some.sampled_from(PARTS), max_size=30).map("".join), max_size=4)


def mapped(name: str, texts: list[str], **values: Any) -> list[str]:
    operator = get_operator("map", f"setu.{name}")
    made = apply_map(operator, Texts(texts), validate(operator.settings, values, where="test"))
    return [old if new is None else new for old, new in zip(texts, made.texts, strict=True)]


def statistics(texts: list[str]) -> dict[str, Any]:
    operator = get_operator("score", "setu.statistics")
    return dict(apply_score(operator, Texts(texts), operator.settings()))


def ends_well_by_hand(line: str) -> bool:
    marks = (".", "!", "?", "।", "।।", ":", ",", ";", ")", '"', "'", "؟", "۔")
    return line.endswith(marks) and not line.endswith(("...", "####"))


def lines_by_hand(text: str) -> list[str]:
    parts = re.split(r"([.?!।|॥؟۔](?:\n+)?)", text)
    lines = [a + b for a, b in zip(parts[::2], [*parts[1::2], ""], strict=True)]
    return [line for line in lines if not line.isdigit()]


def tokens_by_hand(text: str) -> list[str]:
    """Marks of their own, then numbers put together again, as long as no space stood in them before."""
    marks = re.escape("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~।॥")
    kept = re.sub(r"(?<=[0-9])([,.:/])(?=[0-9])", lambda match: chr(0xE000 + ord(match.group())), text)
    spaced = re.sub(f"([{marks}])", r" \1 ", kept.replace("\t", " "))
    words = [word for word in spaced.split(" ") if word]
    return [re.sub("[\ue000-\ue07f]", lambda match: chr(ord(match.group()) - 0xE000), word) for word in words]


@settings(max_examples=80, deadline=None)
@given(documents)
def test_statistics_as_by_hand(texts):
    found = statistics(texts)
    lines = [lines_by_hand(text) for text in texts]
    assert found["lines"].tolist() == [len(one) for one in lines]
    means = [sum(len(line.split(" ")) for line in one) / len(one) if one else math.nan for one in lines]
    assert found["mean_line_words"] == pytest.approx(means, nan_ok=True)
    for place, text in enumerate(texts):
        words = tokens_by_hand(text)
        counts = Counter(tuple(words[i : i + 5]) for i in range(len(words) - 4))
        share = sum(n for n in counts.values() if n >= 2) / counts.total() if counts else math.nan
        assert found["word_repetition"][place] == pytest.approx(share, nan_ok=True)
        counts = Counter(text[i : i + 10] for i in range(len(text) - 9))
        top = sorted(counts.values(), reverse=True)[: int(math.sqrt(len(counts)))]
        share = sum(top) / counts.total() if counts else math.nan
        assert found["character_repetition"][place] == pytest.approx(share, nan_ok=True)


@settings(max_examples=80, deadline=None)
@given(documents, some.booleans(), some.booleans())
def test_lines_are_kept_as_by_hand(texts, once, several):
    by_hand = []
    for text in texts:
        lines = text.split("\n")
        kept = [line for line in lines if ends_well_by_hand(line)]
        kept = [line for line in kept if not once or lines.count(line) == 1]
        by_hand.append("\n".join(line for line in kept if not several or " " in line))
    assert mapped("lines", texts, once=once, several_words=several) == by_hand


def test_a_text_of_different_characters_still_repeats():
    # The pitfall of the definition: 91 different runs, of which the top 9 make 0.099.
    text = "".join(chr(0x915 + i) for i in range(40)) + "".join(chr(0x985 + i) for i in range(60))
    assert statistics([text])["character_repetition"][0] == pytest.approx(9 / 91)


def test_symbols_are_what_is_outside_of_the_blocks():
    operator = get_operator("score", "setu.symbols")
    found = apply_score(operator, Texts(["aक1 \n", "a.é中😀", ""]), operator.settings())["ratio"]
    assert found[:2].tolist() == [0.0, 4 / 5]
    assert numpy.isnan(found[2])


def test_other_scripts_are_what_unicode_says():
    regex = pytest.importorskip("regex")
    scripts = ["Latin", "Devanagari", "Bengali", "Gujarati", "Gurmukhi", "Kannada", "Malayalam", "Oriya"]
    scripts += ["Tamil", "Telugu", "Meetei Mayek", "Arabic", "Dogra", "Ol Chiki"]
    other = regex.compile("[^" + "".join(rf"\p{{Script={name}}}" for name in scripts) + r"\p{P}\s]")
    # Letters that Python's own tables of Unicode know; the library's may be newer.
    every = [chr(c) for c in range(0x20000) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Cc", "Co")]
    found = statistics(every)["other_scripts"]
    differing = [hex(ord(c)) for c, share in zip(every, found, strict=True) if share != bool(other.match(c))]
    assert differing == []


def test_code_is_cut_and_text_between_comes_once():
    page = "One <b>two</b> three\nfunction (a) { return a; } four"
    assert mapped("remove_code", [page], kinds=["html", "javascript"]) == ["One  three\n four"]
    # Overlapping spans: HTML inside of what CSS's pattern takes.
    assert mapped("remove_code", ["a. <b>x</b> {y} z"]) == ["a z"]
    assert mapped("remove_code", ["No code. (a) b"]) == ["No code. (a) b"]


MARKUP = ["<", ">", "</", "a", "<b>", "</b>", "\n", " ", "</>"]


@settings(max_examples=150, deadline=None)
@given(some.lists(some.sampled_from(MARKUP), max_size=12).map("".join))
def test_elements_are_those_of_the_released_pattern(text):
    by_hand = re.sub(r"<[^>]+?>.+?</[^>]+?>", "", text)
    assert mapped("remove_code", [text], kinds=["html"]) == [by_hand]


def test_code_costs_no_more_than_a_texts_length():
    texts = ["." * 100_000 + "{", "function(" * 20_000, "</" * 20_000, "<a>" * 5_000 + "</"]
    assert mapped("remove_code", texts) == texts


def test_numbers_and_single_words_go_by_rule():
    text = "12,34.\n२०२४\nabcd 12.\nकख,\nabc."
    assert mapped("lines", [text], terminal=False, number_share=0.4) == ["abcd 12.\nकख,\nabc."]
    assert mapped("lines", ["ab12.", "abc12."], terminal=False, number_share=0.6) == ["", "abc12."]
    assert mapped("lines", [text], several_words=True) == ["abcd 12."]


def test_forms_are_compatible():
    assert mapped("normalise", ["ﬁ ２", "a"]) == ["fi 2", "a"]


def test_cleaning_is_idempotent():
    texts = ["One.\nTwo\nThree <b>x</b>.\n.a{b}\n", "नमस्ते।\nअंत", ""]
    once = mapped("lines", mapped("remove_code", mapped("normalise", texts)))
    assert mapped("lines", mapped("remove_code", mapped("normalise", once))) == once


def test_flagged_words_are_the_users(tmp_path: Path):
    path = tmp_path / "words.txt"
    path.write_text("bad\n", encoding="utf-8")
    operator = get_operator("score", "setu.flagged_words")
    found = apply_score(operator, Texts(["a Bad one", ""]), operator.settings(words=str(path)))["ratio"]
    assert found[0] == pytest.approx(1 / 3)
    assert numpy.isnan(found[1])


def rectangle(left: float, top: float, right: float, bottom: float) -> dict[str, Any]:
    corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    # A coordinate of 0 is left out, as services do.
    return {"normalizedVertices": [{k: v for k, v in zip("xy", pair, strict=True) if v} for pair in corners]}


def word(text: str, language: str = "hi", space: str = "SPACE") -> dict[str, Any]:
    symbols: list[dict[str, Any]] = [{"text": character} for character in text]
    symbols[-1]["property"] = {"detectedBreak": {"type": space}}
    told = {"detectedLanguages": [{"languageCode": "xx", "confidence": 0.1}]}
    told["detectedLanguages"].append({"languageCode": language, "confidence": 0.9})
    return {"symbols": symbols, "property": told}


def page(*blocks: tuple[tuple[float, ...], list[tuple[tuple[float, ...], list[dict[str, Any]]]]]) -> str:
    made = [
        {
            "boundingBox": rectangle(*box),
            "paragraphs": [{"boundingBox": rectangle(*one), "words": words} for one, words in paragraphs],
        }
        for box, paragraphs in blocks
    ]
    return json.dumps({"blocks": made})


PAGE = page(
    (
        (0.0, 0.0, 0.5, 0.4),
        [
            ((0.0, 0.0, 0.5, 0.2), [word("one"), word("two", "mr"), word("end", space="LINE_BREAK")]),
            ((0.1, 0.05, 0.3, 0.15), [word("nested")]),
            ((0.0, 0.2, 0.3, 0.3), [word("a", "hi"), word("b", "mr"), word("c", "ta")]),
        ],
    ),
    ((0.2, 0.25, 0.6, 0.9), [((0.2, 0.25, 0.6, 0.5), [word("last", space="LINE_BREAK")])]),
)


def test_boxes_equal_values_by_hand():
    operator = get_operator("map", "setu.page_text")
    made = apply_map(operator, Texts([""], metas=[PAGE]), operator.settings())
    assert made.texts == ["one two end\na b c last\n"]
    found = {name: float(values[0]) for name, values in made.signals.items()}
    assert (found["paragraphs"], found["nested"]) == (4, 1)
    assert found["horizontal_coverage"] == pytest.approx(0.6)
    assert found["vertical_coverage"] == pytest.approx(0.5)
    # The third paragraph and the last share 0.1 x 0.05, of 0.03 + 0.1 - 0.005.
    assert found["largest_overlap"] == pytest.approx(0.005 / 0.125)
    assert found["least_density"] == pytest.approx(min((0.1 + 0.03) / 0.2, 0.1 / 0.26))
    assert found["unsure"] == 1 / 4  # Three languages of three words: 1/3 < 0.5.


def test_coverage_is_of_its_own_axis():
    wide = numpy.array([[0.0, 0.1, 1.0, 0.2], [0.0, 0.8, 1.0, 0.9]])
    assert boxes.coverage(wide, 0) == pytest.approx(1.0)
    assert boxes.coverage(wide, 1) == pytest.approx(0.2)


def test_a_box_is_nested_only_beyond_the_share():
    large, small = [0.0, 0.0, 1.0, 1.0], [0.9, 0.0, 1.1, 0.1]  # Half of the small one is inside.
    pair = numpy.array([small, large])
    assert boxes.outer(pair, 0.6).tolist() == [True, True]
    assert boxes.outer(pair, 0.4).tolist() == [False, True]
    assert boxes.outer(numpy.array([large, large]), 0.95).tolist() == [True, False]


def test_paragraphs_are_unsure_below_half():
    half = [word("a", "hi"), word("b", "hi"), word("c", "mr"), word("d", "ta")]
    less = [*half, word("e", "bn")]
    box = (0.0, 0.0, 0.5, 0.5)
    read = [boxes.read_page(json.loads(page((box, [(box, words)])))) for words in (half, less)]
    assert [boxes.unsure_paragraphs(one) for one in read] == [0.0, 1.0]


@pytest.mark.parametrize("meta", ["", "[]", '{"blocks": [1]}', '{"blocks": [{"paragraphs": []}]}'])
def test_a_document_without_boxes_fails_alone(meta):
    operator = get_operator("map", "setu.page_text")
    with pytest.raises(BadDocument, match="boxes"):
        apply_map(operator, Texts([""], metas=[meta]), operator.settings())


def test_an_empty_page_has_null_measures():
    operator = get_operator("map", "setu.page_text")
    made = apply_map(operator, Texts([""], metas=['{"pages": [{"blocks": []}]}']), operator.settings())
    assert made.texts == [""]
    assert numpy.isnan(made.signals["vertical_coverage"][0])
    assert made.signals["paragraphs"].tolist() == [0]
