"""LibreOffice's help, Debian's descriptions, ChatterBot's conversations, datasets of a hub."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from little_sources import texts

from puna.core import assets, registries
from puna.core.errors import PunaError
from puna.core.stage import models_of
from puna.data.sources import SOURCES, AnySource
from puna.data.sources.libreoffice_help import paragraphs

PAGE = """<html><body><div id="DisplayArea">
<h1 id="hd_id1" dir="auto">Opslaan &amp; sluiten</h1>
<p id="par_id2" class="paragraph">Kies <span class="switchinline"><span hidden="true" id="MACx_1">
<span>Voorkeuren</span></span><span hidden="true" id="defaultx_1"><span>Opties</span></span></span>,
of<br>stop.</p>
<p class="related">zonder nummer</p>
<p id="par_id3">OK</p>
<p id="par_id2">tweede keer</p>
<p id="par_id4"> </p></div><p id="bm_module">x</p></body></html>"""
ORIGINAL = """<h1 id="hd_id1">Save &amp; close</h1>
<p id="par_id2">Choose Options, or stop.</p><p id="par_id3">"OK"</p>"""


def test_paragraphs_of_a_help_page_are_found_by_their_ids() -> None:
    assert paragraphs(PAGE) == {
        "hd_id1": "Opslaan & sluiten",
        "par_id2": "Kies Opties, of stop.",
        "par_id3": "OK",
    }


def test_help_in_two_languages_is_paired_by_page_and_paragraph(read: Any, write: Any, tmp_path: Path) -> None:
    write("nl/text/a.html", PAGE)
    write("nl/text/b.html", '<p id="par_id9">Alleen hier</p>')
    write("en/text/a.html", ORIGINAL)
    settings = {"path": str(tmp_path / "nl"), "format": "libreoffice_help", "language": "nl"}
    with pytest.raises(PunaError, match="original_asset"):
        read("sentence_pairs", **settings)
    items, reading = read("sentence_pairs", **settings, original_path=str(tmp_path / "en"))
    assert [(item.row["source_text"], item.row["target_text"]) for item in items] == [
        ("Save & close", "Opslaan & sluiten"),
        ("Choose Options, or stop.", "Kies Opties, of stop."),
    ]
    assert reading.tally.dropped == {"identical to the original": 1, "no original": 1}
    items, reading = read("documents", **settings)
    assert len(items) == 4 and items[0].document == "text/a.html" and not reading.tally.dropped
    items, _ = read("documents", **settings, original_path=str(tmp_path / "en"))
    assert texts(items) == ["Opslaan & sluiten", "Kies Opties, of stop.", "Alleen hier"]


def test_a_help_folder_that_is_none_and_a_page_that_is_no_text_are_told(
    read: Any, write: Any, tmp_path: Path
) -> None:
    settings = {"format": "libreoffice_help", "language": "nl"}
    with pytest.raises(PunaError, match="not found"):
        read("documents", **settings, path=str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(PunaError, match="no help page"):
        read("documents", **settings, path=str(tmp_path / "empty"))
    write("bad/a.html", b"\xff\xfe")
    with pytest.raises(PunaError, match=r"a\.html: the page is not UTF-8"):
        read("documents", **settings, path=str(tmp_path / "bad"))
    _, reading = read("documents", **settings, path=str(tmp_path / "bad"), on_bad_row="skip")
    assert reading.tally.dropped == {"bad row": 1}


TRANSLATED = """Package: frog
Description-md5: aaaaaaaaaa
Description-nl: Een kikker
 Eerste alinea over
 twee regels.
 .
 Tweede alinea.

Package: toad
Description-md5: bbbbbbbbbb
Description-nl: Toad
 <trans>

Package: newt
Description-md5: cccccccccc
Description-nl: Een salamander
"""
ENGLISH = """Package: frog
Description-md5: aaaaaaaaaa
Description-en: A frog
 First paragraph
 .
 Second paragraph.

Package: toad
Description-md5: bbbbbbbbbb
Description-en: Toad
 An animal.

Package: newt
Description-md5: cccccccccc
Description-en: A newt
 Of fire.
"""


@pytest.fixture
def lists(write: Any) -> str:
    write("lists/mirror_main_i18n_Translation-nl", TRANSLATED)
    return str(write("lists/mirror_main_i18n_Translation-en", ENGLISH).parent)


def test_descriptions_are_paired_by_checksum_and_paragraph(read: Any, lists: str) -> None:
    settings = {"format": "debian_descriptions", "language": "nl", "lists": lists}
    items, reading = read("sentence_pairs", **settings)
    assert [(item.row["source_text"], item.row["target_text"]) for item in items] == [
        ("A frog", "Een kikker"),
        ("First paragraph", "Eerste alinea over twee regels."),
        ("Second paragraph.", "Tweede alinea."),
    ]
    assert items[0].document == "frog:aaaaaaaa"
    assert reading.tally.dropped == {
        "identical to the original": 1,
        "untranslated": 1,
        "paragraphs do not match": 1,
    }
    items, _ = read("documents", **settings)
    assert texts(items)[-1] == "Een salamander"


def test_a_language_debian_lacks_and_a_broken_list_are_told(read: Any, write: Any, lists: str) -> None:
    with pytest.raises(PunaError, match=r"(?s)no descriptions in 'gl'.*en, nl"):
        read("documents", format="debian_descriptions", language="gl", lists=lists)
    write("lists/mirror_main_i18n_Translation-nl", "Package: a\nrubbish\n")
    with pytest.raises(PunaError, match=r"Translation-nl:2: not a list of descriptions"):
        read("documents", format="debian_descriptions", language="nl", lists=lists)


def test_lists_are_fetched_once_into_the_cache(
    read: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PUNA_CACHE", str(tmp_path / "cache"))
    asked: list[tuple[str, ...]] = []

    def update(folder: Path, languages: Any) -> list[str]:
        asked.append(tuple(languages))
        (folder / "lists").mkdir()
        (folder / "lists" / "mirror_main_i18n_Translation-nl").write_text(TRANSLATED)
        (folder / "lists" / "mirror_main_i18n_Translation-en").write_text(ENGLISH)
        (folder / "lists" / "mirror_main_Packages").write_text("large")
        return []

    monkeypatch.setattr(registries, "update_apt_lists", update)
    first, reading = read("sentence_pairs", format="debian_descriptions", language="nl")
    second, _ = read("sentence_pairs", format="debian_descriptions", language="nl")
    assert first == second and asked == [("nl", "en")]
    kept = sorted(file.name for file in assets.cache_folder().rglob("mirror*"))
    assert kept == ["mirror_main_i18n_Translation-en", "mirror_main_i18n_Translation-nl"]
    assert len(reading.facts["sha256"]["mirror_main_i18n_Translation-nl"]) == 64


CONVERSATIONS = """categories: [x]
conversations:
- - Hoi
  - Hallo
- - Hoeveel is 6 keer 7?
  - 42
  - Dank je
- - Alleen
"""


def test_statements_become_turns_and_the_folder_chooses_the_language(read: Any, wheel: Any) -> None:
    path = str(
        wheel("talk", **{"talk/data/dutch/a.yml": CONVERSATIONS, "talk/data/hindi/a.yml": CONVERSATIONS})
    )
    settings = {"format": "chatterbot", "path": path, "language": "nl"}
    items, reading = read("messages", **settings, folder="dutch")
    assert [[m["role"] for m in item.row["messages"]] for item in items] == [
        ["user", "assistant"],
        ["user", "assistant", "user"],
    ]
    assert items[1].row["messages"][1]["content"] == "42" and items[1].key == "talk/data/dutch/a.yml#1"
    assert reading.tally.dropped == {"without an answer": 1}
    assert len(read("messages", **settings)[0]) == 4
    with pytest.raises(PunaError, match="no YAML file here"):
        read("messages", **settings, folder="frisian")


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ("a: [", "field (file)"),
        ("- a", "field conversations"),
        ("conversations: {}", "field conversations"),
        ("conversations: [[a, b], hallo]", "conversation 2, field conversations"),
        ("conversations: [[a, [b]]]", "conversation 1, field statements[1]"),
        ("conversations: [[a, yes]]", "conversation 1, field statements[1]"),
        ("conversations: [[a, '']]", "conversation 1, field statements[1].content"),
    ],
)
def test_a_broken_conversation_is_told_by_file_and_place(
    read: Any, write: Any, content: str, place: str
) -> None:
    path = str(write("a.yml", content))
    with pytest.raises(PunaError) as error:
        read("messages", format="chatterbot", path=path)
    assert str(error.value).startswith("a.yml") and place in str(error.value)
    _, reading = read("messages", format="chatterbot", path=path, on_bad_row="skip")
    assert reading.tally.dropped == {"bad row": 1}


def test_a_hub_dataset_in_a_local_folder_is_read(
    read: Any, write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write("set/train.jsonl", [{"body": "een"}, {"body": "twee"}])
    settings = {"format": "huggingface", "id": str(tmp_path / "set"), "columns": {"text": "body"}}
    items, reading = read("documents", **settings)
    assert texts(items) == ["een", "twee"] and items[1].document == "train:2"
    assert reading.facts["id"] == str(tmp_path / "set")
    with pytest.raises(PunaError, match="the dataset cannot be opened"):
        read("documents", **{**settings, "split": "none"})
    with pytest.raises(PunaError, match="the dataset cannot be opened"):
        read("documents", **{**settings, "id": str(tmp_path / "nothing")})


@pytest.mark.parametrize(
    ("library", "settings"),
    [("datasets", {"format": "huggingface", "id": "a/b"}), ("polib", {"path": "nl.po", "language": "nl"})],
)
def test_a_missing_extra_is_told_with_what_to_install(
    read: Any, write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, settings: Any
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    write("nl.po", "")
    with pytest.raises(PunaError, match=rf"(?s){library}.*pip install puna"):
        read("documents", **settings, on_bad_row="skip")


def test_every_registered_source_can_be_named_in_a_recipe_and_has_a_format() -> None:
    assert set(models_of(AnySource)) == set(SOURCES)
    formats = [source.format for source in SOURCES.values()]
    assert len(set(formats)) == len(formats) == 13
    assert all(source.kinds for source in SOURCES.values())
    assert json.dumps(formats)


def test_a_misspelt_asset_format_or_key_is_told(read: Any) -> None:
    for settings, words in (
        ({"asset": "djanga"}, "did you mean 'django'"),
        ({"format": "libreoffice_help", "asset": "libreoffice-help-n"}, "libreoffice-help-nl"),
        ({"format": "word", "path": "a.doc"}, "'word'|word"),
        ({"path": "a.jsonl", "colums": {}}, "did you mean 'columns'"),
        ({"asset": "smollm2-135m-instruct"}, "format cannot be told"),
    ):
        with pytest.raises(PunaError, match=words):
            read("documents", **settings)


def _task(*examples: Any) -> str:
    return json.dumps({"name": "a task", "examples": list(examples)})


def test_examples_of_a_task_become_questions_with_their_first_answer(
    read: Any, write: Any, tmp_path: Path
) -> None:
    write(
        "tasks/one/task.json",
        _task({"input": " 2 + 2? ", "target": ["4", "four"]}, {"input": "a", "target": "b"}),
    )
    write("tasks/two/task.json", _task({"input": "red?", "target_scores": {"no": 0, "yes": 1}}))
    settings = {"format": "bigbench", "path": str(tmp_path / "tasks")}
    items, _ = read("messages", **settings, task="one", ask="Say: {input}")
    assert [m["content"] for m in items[0].row["messages"]] == ["Say: 2 + 2?", "4"]
    assert items[0].document != items[1].document  # so that a split parts them
    assert read("messages", **settings, task="two")[0][0].row["messages"][1]["content"] == "yes"
    file = str(tmp_path / "tasks" / "two" / "task.json")
    assert len(read("messages", format="bigbench", path=file)[0]) == 1
    with pytest.raises(PunaError, match="did you mean 'one'"):
        read("messages", **settings, task="onne")
    with pytest.raises(PunaError, match="which task is meant"):
        read("messages", **settings)
    with pytest.raises(PunaError, match="holds one task"):
        read("messages", format="bigbench", path=file, task="two")
    with pytest.raises(PunaError, match="no place"):
        read("messages", **settings, task="one", ask="Say it")


@pytest.mark.parametrize(
    ("example", "place"),
    [
        ({"input": "", "target": "b"}, "field input"),
        ({"input": "a", "target": []}, "field target"),
        ({"input": "a"}, "field target"),
        ({"input": "a", "target_scores": {"x": 1, "y": 1}}, "field target_scores"),
        ("text", "field input"),
    ],
)
def test_a_broken_example_is_told_by_file_and_place(read: Any, write: Any, example: Any, place: str) -> None:
    path = str(write("task.json", _task({"input": "a", "target": "b"}, example)))
    with pytest.raises(PunaError) as error:
        read("messages", format="bigbench", path=path)
    assert "example 1" in str(error.value) and place in str(error.value)
    items, reading = read("messages", format="bigbench", path=path, on_bad_row="skip")
    assert len(items) == 1 and reading.tally.dropped == {"bad row": 1}


@pytest.mark.parametrize("text", ["{", "[]", '{"examples": 3}'])
def test_a_file_that_is_no_task_is_refused(read: Any, write: Any, text: str) -> None:
    with pytest.raises(PunaError, match="not a"):
        read("messages", format="bigbench", path=str(write("task.json", text)))


def test_a_bigbench_example_is_asked_in_one_of_several_wordings(read: Any, write: Any) -> None:
    examples = [{"input": f"What is {n}?", "target": str(n)} for n in range(30)]
    path = str(write("task.json", json.dumps({"examples": examples})))
    ask = ["First: {input}", "{input} Second"]
    items, _ = read("messages", format="bigbench", path=path, ask=ask)
    asked = [item.row["messages"][0]["content"] for item in items]
    assert {text.startswith("First: What") for text in asked} == {True, False}
    assert all(text.startswith("First") or text.endswith("Second") for text in asked)
    with pytest.raises(PunaError, match="no place"):
        read("messages", format="bigbench", path=path, ask=["{input}", "nothing"])


def test_topics_choose_files_of_chatterbot(read: Any, tmp_path: Path) -> None:
    for topic in ("food", "money"):
        (tmp_path / f"{topic}.yml").write_text(f"conversations:\n- - What about {topic}?\n  - All well.\n")
    items, _ = read("messages", format="chatterbot", path=str(tmp_path), topics=["money"])
    assert [item.document for item in items] == ["money.yml"]
    with pytest.raises(PunaError, match="unknown topic"):
        read("messages", format="chatterbot", path=str(tmp_path), topics=["monies"])
