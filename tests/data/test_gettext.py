"""Catalogues: which are read, which messages are kept, and what the two sides are."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from little_sources import HEADER, entry, po, texts

from puna.core.errors import PunaError
from puna.data.sources.gettext import strip_accelerator

NL = "pkg/locale/nl/LC_MESSAGES/django.po"
PLURAL = '"Plural-Forms: nplurals={}; plural={};\\n"\n'


def sides(items: Any) -> list[tuple[str, str]]:
    return [(item.row["source_text"], item.row["target_text"]) for item in items]


def plural(original: str, plural_: str, *forms: str) -> str:
    lines = [f"msgid {json.dumps(original)}", f"msgid_plural {json.dumps(plural_)}"]
    return "\n".join([*lines, *(f"msgstr[{n}] {json.dumps(form)}" for n, form in enumerate(forms)), ""])


@pytest.fixture
def catalogue(write: Any) -> Any:
    return lambda *entries, header=HEADER: str(write("po/nl.po", po(*entries, header=header)))


def test_both_sides_of_a_translation_become_pairs_and_either_documents(read: Any, catalogue: Any) -> None:
    path = catalogue(entry("Hello %(name)s", "Hallo <b>%(name)s</b>"), entry("Bye", "Dag"))
    items, reading = read("sentence_pairs", path=path, language="nl", original_language="en-GB")
    assert sides(items) == [("Hello %(name)s", "Hallo <b>%(name)s</b>"), ("Bye", "Dag")]
    assert items[0].row["source_language"] == "en-GB" and items[0].row["target_language"] == "nl"
    assert [item.key for item in items] == ["nl.po#0", "nl.po#1"] and all(item.fragment for item in items)
    assert reading.tally.read == 2 and reading.facts["files"] == 1
    items, _ = read("documents", path=path, language="nl")
    assert texts(items) == ["Hallo <b>%(name)s</b>", "Dag"] and items[0].row["language"] == "nl"
    items, _ = read("documents", path=path, language="nl", side="original")
    assert texts(items) == ["Hello %(name)s", "Bye"] and items[0].row["language"] == "en"


def test_messages_that_nobody_translated_well_are_left_out_and_counted(read: Any, catalogue: Any) -> None:
    path = catalogue(
        entry("a", "A"),
        entry("b", "B", "#, fuzzy"),
        entry("c", ""),
        entry("OK", "OK"),
        '#~ msgid "old"\n#~ msgstr "oud"\n',
    )
    items, reading = read("documents", path=path, language="nl")
    assert texts(items) == ["A"]
    assert reading.tally.dropped == {
        "fuzzy": 1,
        "untranslated": 1,
        "identical to the original": 1,
        "obsolete": 1,
    }


def test_plural_forms_go_with_the_side_they_belong_to(read: Any, catalogue: Any) -> None:
    path = catalogue(
        plural("%d file", "%d files", "%d bestand", "%d bestanden"),
        header=HEADER + PLURAL.format(2, "n != 1"),
    )
    items, _ = read("sentence_pairs", path=path, language="nl")
    assert sides(items) == [("%d file", "%d bestand"), ("%d files", "%d bestanden")]


def test_the_catalogues_own_rule_says_which_form_is_for_one(read: Any, catalogue: Any) -> None:
    rule = "n==1 ? 2 : n>=2 && n<=4 ? 0 : 1"
    path = catalogue(plural("one", "more", "few", "many", "single"), header=HEADER + PLURAL.format(3, rule))
    items, _ = read("sentence_pairs", path=path, language="nl")
    assert sides(items) == [("more", "few"), ("more", "many"), ("one", "single")]


def test_a_language_without_plurals_and_a_broken_rule_are_read_too(
    read: Any, catalogue: Any, capsys: Any
) -> None:
    path = catalogue(plural("one", "more", "only"), header=HEADER + PLURAL.format(1, "0"))
    assert sides(read("sentence_pairs", path=path, language="nl")[0]) == [("more", "only")]
    path = catalogue(plural("one", "more", "a", "b"), header=HEADER + PLURAL.format(2, "import os"))
    assert sides(read("sentence_pairs", path=path, language="nl")[0]) == [("one", "a"), ("more", "b")]
    assert "Plural-Forms cannot be read" in capsys.readouterr().err


def test_zope_catalogues_have_their_english_in_a_comment(read: Any, catalogue: Any) -> None:
    path = catalogue(
        entry("label_save", "Opslaan", '#. Default: "Save"'),
        entry("help_quote", "Zeg 'ja'", '#. Default: "Say \\"yes\\""'),
        entry("label_lost", "Kwijt"),
        entry("Save as", "Opslaan als"),
    )
    items, reading = read("sentence_pairs", path=path, language="nl")
    assert sides(items) == [("Save", "Opslaan"), ('Say "yes"', "Zeg 'ja'"), ("Save as", "Opslaan als")]
    assert reading.tally.dropped == {"original is a symbol": 1}
    assert "Kwijt" in texts(read("documents", path=path, language="nl")[0])


def test_accelerators_are_taken_out_only_if_asked(read: Any, catalogue: Any) -> None:
    path = catalogue(entry("_Open", "_Openen"))
    assert sides(read("sentence_pairs", path=path, language="nl")[0]) == [("_Open", "_Openen")]
    items, _ = read("sentence_pairs", path=path, language="nl", strip_accelerator="_")
    assert sides(items) == [("Open", "Openen")]


@pytest.mark.parametrize(
    ("text", "mark", "expected"),
    [
        ("&File", "&", "File"),
        ("Save &as", "&", "Save as"),
        ("A &amp; B", "&", "A &amp; B"),
        ("Q&A", "&", "Q&A"),
        ("R && D", "&", "R && D"),
        ("_one _two", "_", "one _two"),
        ("snake_case", "_", "snake_case"),
    ],
)
def test_only_a_mark_at_a_words_start_is_an_accelerator(text: str, mark: str, expected: str) -> None:
    assert strip_accelerator(text, mark) == expected


def test_a_wheel_is_read_without_unpacking_and_sources_before_their_compiled_twins(
    read: Any, wheel: Any, write: Any, tmp_path: Path
) -> None:
    write("a.po", po(entry("one", "uno")))
    compile_mo(tmp_path / "a.po", tmp_path / "a.mo")
    compiled = (tmp_path / "a.mo").read_bytes()
    path = wheel(
        "pkg",
        **{
            NL: po(entry("a", "A")),
            NL.replace(".po", ".mo"): compiled,
            "pkg/locale/nl/LC_MESSAGES/other.mo": compiled,
            "pkg/locale/de/LC_MESSAGES/django.po": po(entry("a", "DE")),
        },
    )
    items, reading = read("documents", path=str(path), language="nl")
    assert [(item.document, item.row["text"]) for item in items] == [
        (NL, "A"),
        ("pkg/locale/nl/LC_MESSAGES/other.mo", "uno"),
    ]
    assert reading.facts["files"] == 2


def compile_mo(source: Path, target: Path) -> None:
    import polib

    polib.pofile(str(source)).save_as_mofile(str(target))


def test_a_regions_catalogues_serve_where_the_plain_language_has_none(
    read: Any, wheel: Any, capsys: Any
) -> None:
    region = "pkg/locale/nl_NL/LC_MESSAGES/a.po"
    path = str(wheel("pkg", **{region: po(entry("a", "A"))}))
    assert texts(read("documents", path=path, language="nl")[0]) == ["A"]
    assert "no catalogue of nl; reading nl-nl" in capsys.readouterr().err
    path = str(wheel("both", **{region: po(entry("a", "A")), NL: po(entry("a", "B"))}))
    assert texts(read("documents", path=path, language="nl")[0]) == ["B"]
    assert texts(read("documents", path=path, language="nl-NL")[0]) == ["A"]


def test_a_language_that_is_not_there_is_told_with_those_that_are(read: Any, wheel: Any) -> None:
    path = str(wheel("pkg", **{NL: po(entry("a", "A"))}))
    with pytest.raises(PunaError, match=r"(?s)no catalogue of language 'gl'.*nl"):
        read("documents", path=path, language="gl")
    with pytest.raises(PunaError, match="which language"):
        read("documents", path=path, language="und")
    with pytest.raises(PunaError, match="no catalogue at all"):
        read("documents", path=str(wheel("empty", readme="x")), language="nl")


def test_catalogues_of_an_installed_package_are_read_with_its_licence(
    read: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    about = site / "mypkg-1.5.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(
        "Metadata-Version: 2.4\nName: mypkg\nVersion: 1.5\nLicense-Expression: MIT\n"
    )
    (site / "mypkg/locale/nl/LC_MESSAGES").mkdir(parents=True)
    name = "mypkg/locale/nl/LC_MESSAGES/a.po"
    (site / name).write_text(po(entry("a", "A")))
    (about / "RECORD").write_text(f"{name},,\nmypkg/code.py,,\n")
    monkeypatch.syspath_prepend(str(site))
    items, reading = read("documents", installed="mypkg", language="nl")
    assert items[0].document == name and items[0].row["text"] == "A"
    assert reading.facts["version"] == "1.5" and reading.facts["licence"] == "MIT"
    with pytest.raises(PunaError, match=r"(?s)not installed here.*pip install no-such-package"):
        read("documents", installed="no-such-package", language="nl")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (NL, "nonsense without a keyword\n"),
        (NL, b'msgid "\xff\xfe"\nmsgstr "x"\n'),
        (NL.replace(".po", ".mo"), b"\xde\x12\x04\x95" + bytes(8)),
        (NL.replace(".po", ".mo"), b"rubbish"),
    ],
)
def test_a_broken_catalogue_is_told_or_counted(
    read: Any, wheel: Any, name: str, content: Any, tmp_path: Path
) -> None:
    path = str(wheel("pkg", **{name: content}))
    with pytest.raises(PunaError, match="the catalogue cannot be read") as error:
        read("documents", path=path, language="nl")
    assert name in str(error.value) and "/tmp/" not in str(error.value).replace(str(tmp_path), "")
    items, reading = read("documents", path=path, language="nl", on_bad_row="skip")
    assert items == [] and reading.tally.dropped == {"bad row": 1}


def test_odd_line_ends_inside_a_message_do_not_cut_it(read: Any, catalogue: Any) -> None:
    path = catalogue(entry("a", "een\u2028twee\x85drie"), entry("b", "vier\nvijf"))
    assert texts(read("documents", path=path, language="nl")[0]) == ["een\u2028twee\x85drie", "vier\nvijf"]


def test_exactly_one_place_is_given(read: Any) -> None:
    for places in ({}, {"path": "a.po", "installed": "b"}):
        with pytest.raises(PunaError, match="exactly one of asset, path, installed"):
            read("documents", format="gettext", language="nl", **places)


words = st.text(st.characters(codec="utf-8", exclude_characters="\r\0\4"), min_size=1).filter(
    lambda text: text.strip() and text == text.strip()
)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(words, words), min_size=1, max_size=5, unique_by=lambda pair: pair[0]))
def test_what_polib_writes_comes_back(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]
) -> None:
    import polib

    from puna.data.ledger import Tally
    from puna.data.sources.common import Reading
    from puna.data.sources.gettext import GettextSettings, read_gettext

    folder = tmp_path_factory.mktemp("po")
    catalogue = polib.POFile()
    catalogue.metadata = {"Content-Type": "text/plain; charset=utf-8"}
    for original, translation in pairs:
        catalogue.append(polib.POEntry(msgid=original, msgstr=translation))
    catalogue.save_as_mofile(str(folder / "nl.mo"))
    reading = Reading(kind="sentence_pairs", tally=Tally("rows"), language="nl")
    items = list(read_gettext(GettextSettings(path=str(folder / "nl.mo")), reading))
    symbol = (
        reading.tally.dropped["original is a symbol"] + reading.tally.dropped["identical to the original"]
    )
    assert len(items) + symbol == len(pairs)
    assert set(sides(items)) <= set(pairs)


def test_no_client_and_no_compiler_is_started(
    read: Any, catalogue: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    assert texts(read("documents", path=catalogue(entry("a", "A")), language="nl")[0]) == ["A"]
