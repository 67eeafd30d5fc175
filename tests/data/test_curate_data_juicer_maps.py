"""Data-Juicer's mappers: what they change, what they leave."""

from __future__ import annotations

import io
import re
import tarfile
import unicodedata
import zipfile
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from puna.core.errors import PunaError
from puna.core.stage import validate
from puna.data.curate.curation import Curation
from puna.data.curate.operator import BadDocument, apply_map, get_operator
from puna.data.curate.settings import CurateParameters
from puna.data.curate.texts import Texts


def mapped(name: str, texts: list[str], **values: Any) -> list[str]:
    operator = get_operator("map", f"data_juicer.{name}")
    made = apply_map(operator, Texts(texts), validate(operator.settings, values, where="test"))
    return [old if new is None else new for old, new in zip(texts, made.texts, strict=True)]


def test_addresses_and_links_are_taken_out():
    assert mapped("clean_email", ["to a.b+c@x.org, or me@host"]) == ["to , or me@host"]
    assert mapped("clean_email", ["a@b.co"], replacement=r"\1") == [r"\1"]
    assert mapped("clean_ip", ["at 10.0.0.1 or 2001:db8:0:0:0:0:0:1!"]) == ["at  or !"]
    found = mapped("clean_links", ["see http://a.b/c(d)e, and www.x.org. ok foo.com/bar! it is 3:30 a:b"])
    assert found == ["see , and . ok ! it is 3:30 a:b"]


# Data-Juicer's pattern as it is released, nested repetitions and all: what it finds is found, on texts
# short enough for it.
RELEASED = re.compile(
    r"(?i)\b("
    r"(?:[a-z][\w-]+:(?:\/{1,3}|[a-z0-9%])|www\d{0,3}[.]|[a-z0-9.\-]+[.][a-z]{2,4}\/)"
    r"(?:[^\s()<>]+|\(([^\s()<>]+|(\([^\s()<>]+\)))*\))+"
    r"(?:\(([^\s()<>]+|(\([^\s()<>]+\)))*\)|[^\s`!()\[\]{};:\'\".,<>?«»“”‘’])"
    r")"
)
LINK_PARTS = [
    "http",
    "://",
    ":/",
    "www",
    ".",
    "com",
    "/",
    "(",
    ")",
    " ",
    "a",
    "é",
    "!",
    "-",
    "_",
    "1",
    "%",
    "\n",
]


@settings(max_examples=150, deadline=None)
@given(some.lists(some.sampled_from(LINK_PARTS), max_size=14).map("".join))
def test_links_are_those_of_the_released_pattern(text):
    assert mapped("clean_links", [text]) == [RELEASED.sub("", text)]


def test_links_cost_no_more_than_their_length():
    text = "x:/" + "!" * 20_000 + " www." + "(" * 5_000
    assert mapped("clean_links", [text]) == [text]


def test_a_comment_with_copyright_goes_and_others_stay():
    cases = {
        "/* Copyright me */\ncode": "\ncode",
        "/* other */\n// x\ncode": "/* other */\n// x\ncode",
        "# head\n\n-- more\ncode # x": "code # x",
    }
    assert mapped("clean_copyright", list(cases)) == list(cases.values())


def test_markup_goes():
    page = "<p>One &amp; two</p><ul><li>a</li><li>b</li></ul><script>var x;</script>"
    assert mapped("clean_html", [page, "plain"]) == ["One & two\n*a\n*b", "plain"]


def test_characters_are_normalised():
    assert mapped("punctuation", ["“a”，b…—c", "a"]) == ['"a",b... - c', "a"]
    assert mapped("white_space", [" \ta\u00a0b\u200bc\td\n\ne ", "x"]) == ["a b c d\n\ne", "x"]
    assert mapped("remove_characters", ["◆a|b■"]) == ["a|b"]
    assert mapped("chinese_only", ["中文ab1é!😀"]) == ["中文ab1!"]
    only = {"keep_alphabet": False, "keep_number": False, "keep_punctuation": False}
    assert mapped("chinese_only", ["中文ab1é!"], **only) == ["中文"]


UNICODE_PARTS = [
    "a",
    " ",
    "\n",
    "&amp;",
    "<",
    "é",
    "cafÃ©",
    "“",
    "â€œ",
    "\r\n",
    "\x1b[1m",
    "ﬁ",
    "\u2028",
    "Ａ",
    "\x00",
    "e\u0301",
    "œ",
    "–",
    "&no",
    "ｶ",
    "＜",
    "\x0c",
    "½",
]


@settings(max_examples=150, deadline=None)
@given(some.lists(some.sampled_from(UNICODE_PARTS), max_size=12).map("".join))
def test_unicode_is_fixed_as_ftfy_fixes_the_whole_text(text):
    ftfy = pytest.importorskip("ftfy")
    assert mapped("fix_unicode", [text]) == [ftfy.fix_text(text, normalization="NFC")]


def test_unicode_has_a_form_of_choice():
    assert mapped("fix_unicode", ["e\u0301"]) == ["é"]
    assert mapped("fix_unicode", ["é"], form="NFD") == [unicodedata.normalize("NFD", "é")]


def test_latex_is_cleaned():
    source = "\\title{x}\n\\section{A} 50\\% of % a comment\n% a line\ntext\n\\bibliography{b} more"
    assert mapped("remove_bibliography", [source])[0].endswith("text\n")
    assert mapped("remove_comments", ["a % b\n%c\n50\\% d"]) == ["a\n50\\% d"]
    assert mapped("remove_comments", ["a % b\n%c\nd"], inline=False) == ["a % b\nd"]
    assert mapped("remove_header", [source])[0].startswith("\\section{A}")
    operator = get_operator("map", "data_juicer.remove_header")
    made = apply_map(operator, Texts([source, "none"]), operator.settings())
    assert made.signals["has_header"].tolist() == [1, 0]
    macro = "\\newcommand{\\me}{Me \\1}\n\\def\\you{You}\n\\me, \\you. \\mess"
    assert mapped("expand_macro", [macro])[0].endswith("Me \\1, You. \\mess")


def test_words_are_taken_out():
    text = "a  loooooooong\tb\n\nsee http://x and (veryveryverylong)!"
    assert mapped("remove_long_words", [text], maximum=8) == ["a\tb\nsee http://x and"]
    # A word too long with its brackets fits without them.
    assert mapped("remove_long_words", ["(((word)))"], maximum=4) == ["(((word)))"]
    assert mapped("remove_words_with", [text]) == ["a loooooooong\tb\nsee and (veryveryverylong)!"]
    # The substring is special characters at the word's end, which do not count.
    assert mapped("remove_words_with", ["one// //two a//b"]) == ["one// //two"]


def test_repeated_sentences_go():
    text = "It is so. It was. It is so! New.\nIt was. 'A.' b."
    assert mapped("remove_repeated_sentences", [text]) == ["It is so. It was. New.\n 'A.' b."]
    assert mapped("remove_repeated_sentences", ["It was. it was."], lower=True) == ["It was."]
    assert mapped("remove_repeated_sentences", ["A. A. A."], minimum=2) == ["A. A. A."]


def test_tables_go_and_prose_stays():
    text = "Title\na b c\nd e f\ng h i\nThis is a sentence of prose.\n"
    assert mapped("remove_tables", [text]) == ["Title\nThis is a sentence of prose.\n"]
    assert mapped("remove_tables", [text], minimum=4) == [text]


def test_patterns_are_replaced_in_turn():
    pairs = [{"pattern": "a.b", "replacement": "<x>"}, {"pattern": "<(x)>", "replacement": r"\1\1"}]
    assert mapped("replace_content", ["1 a\nb 2"], replacements=pairs) == ["1 xx 2"]
    with pytest.raises(PunaError, match="regular expression"):
        mapped("replace_content", ["a"], replacements=[{"pattern": "("}])


def test_sentences_stand_on_lines():
    text = 'He left. "Why?" she said. Dr. Who came at 5 p.m. today! Ok. यह है। वह'
    lines = ["He left.", '"Why?" she said.', "Dr. Who came at 5 p.m. today!", "Ok.", "यह है।", "वह"]
    assert mapped("split_sentences", [text]) == ["\n".join(lines)]


CHANGES = [
    "delete_word",
    "swap_words",
    "split_word",
    "delete_character",
    "swap_characters",
    "insert_character",
]


@pytest.mark.parametrize("change", CHANGES)
def test_noise_depends_on_the_text_alone(change):
    text = "one two three four five six seven eight nine ten"
    alone = mapped("augment", [text], changes=[change], share=0.2)
    assert mapped("augment", ["other text here", text], changes=[change], share=0.2)[1:] == alone
    assert alone != [text]
    assert mapped("augment", [text], changes=[change], share=0.2, seed=1) != alone
    letters = {"delete_word": -8, "delete_character": -2, "insert_character": 2}.get(change)
    if letters is not None and change != "delete_word":
        assert len(alone[0]) == len(text) + letters
    if change in ("swap_words", "swap_characters", "split_word"):
        assert sorted(alone[0].replace(" ", "")) == sorted(text.replace(" ", ""))


def archive(kind: str, files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
            for name, content in files.items():
                packed.writestr(name, content)
    else:
        with tarfile.open(fileobj=buffer, mode="w:gz") as packed:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                packed.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_latex_archives_are_merged_within_bounds(kind):
    operator = get_operator("extract", "data_juicer.latex_archive")
    content = archive(kind, {"a.tex": b"one", "b.png": b"no", "c.tex": b"two", "big.tex": b"x" * 5000})
    assert operator.function(content, operator.settings(file_bytes=100)) == "one\n\ntwo"
    with pytest.raises(BadDocument, match="no LaTeX"):
        operator.function(content, operator.settings(file_bytes=2))
    with pytest.raises(BadDocument, match="archive"):
        operator.function(b"\x1f\x8bnothing", operator.settings())


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize("flip", [0x01, 0xFF])
def test_a_damaged_latex_archive_is_read_or_refused_wherever_the_damage_is(kind, flip):
    operator = get_operator("extract", "data_juicer.latex_archive")
    content = archive(kind, {"a.tex": b"one and one and two", "c.tex": b"two and two and one"})
    refused = 0
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= flip
        try:
            operator.function(bytes(damaged), operator.settings())
        except BadDocument:
            refused += 1
    assert refused > 20


def test_signals_tell_what_mappers_did():
    operator = get_operator("map", "data_juicer.clean_email")
    made = apply_map(operator, Texts(["a@b.co c@d.co", "none"]), operator.settings())
    assert made.texts[1] is None
    assert numpy.array_equal(made.signals["replaced"], [2, 0])


def test_an_archive_is_a_document_of_a_pool(tmp_path):
    (tmp_path / "a.zip").write_bytes(archive("zip", {"a.tex": b"\\section{A} text"}))
    (tmp_path / "b.tar.gz").write_bytes(archive("tar", {"b.tex": b"\\section{B} text"}))
    (tmp_path / "c.zip").write_bytes(b"nothing")
    steps = [{"extract": "data_juicer.latex_archive"}]
    source = {"format": "archive", "path": str(tmp_path / "*")}
    made = CurateParameters(sources=[source], pipeline=steps, executor="here")
    pool = Curation(made, tmp_path / "pool").run()
    texts = [text for shard in pool.shards() for text in pool.documents(shard, len(pool.phases)).texts.texts]
    assert sorted(texts) == ["\\section{A} text", "\\section{B} text"]


@pytest.mark.parametrize(
    ("conversion", "text", "made"),
    [
        ("t2s", "後來，乾隆皇帝在裡面。 Hello", "后来，乾隆皇帝在里面。 Hello"),  # 乾 stays in a name
        ("t2s", "餅乾", "饼干"),  # and does not in a cracker
        ("s2t", "皇后的头发 1", "皇后的頭髮 1"),
        ("s2t", "发展", "發展"),
        ("s2twp", "鼠标", "滑鼠"),
        ("jp2t", "学校", "學校"),
    ],
)
def test_chinese_scripts_are_converted_by_phrases(conversion, text, made):
    pytest.importorskip("opencc")
    assert mapped("chinese_convert", [text], conversion=conversion) == [made]


def test_what_is_not_chinese_is_not_given_to_opencc(monkeypatch):
    pytest.importorskip("opencc")
    from puna.data.curate.maps import data_juicer_chinese

    monkeypatch.setattr(data_juicer_chinese, "_converter", lambda conversion: None)
    texts = ["plain", "ёж ひらがな", "", "汉\ud800"]
    assert mapped("chinese_convert", texts) == texts
