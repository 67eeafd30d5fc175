"""Files that steps name: a change of one is a change of what is kept, and a missing one is told at once."""

from __future__ import annotations

import json

import pytest

from puna.core.errors import PunaError
from puna.core.stage import validate
from puna.data.curate.curation import Curation
from puna.data.curate.named_files import named, named_in
from puna.data.curate.pool import Pool
from puna.data.curate.report import trace
from puna.data.curate.settings import CurateParameters


@pytest.fixture
def words(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"a {pet}"}) + "\n" for pet in ("cat", "dog"))
    )
    (tmp_path / "words.txt").write_text("dog\n")
    return tmp_path / "words.txt"


def parameters(words, **more):
    steps = [
        {"score": "toxicity.words", "settings": {"words": str(words)}},
        {"gate": {"name": "pets", "signal": "toxicity.words.count", "maximum": 0}},
    ]
    given = {
        "sources": [{"path": str(words.parent / "a.jsonl")}],
        "pipeline": steps,
        "executor": "here",
        **more,
    }
    return validate(CurateParameters, given, where="test")


def kept(pool):
    return [text for shard in pool.shards() for text in pool.documents(shard, len(pool.phases)).texts.texts]


def test_a_list_that_changed_is_read_again(words):
    place = words.parent / "pool"
    assert kept(Curation(parameters(words), place).run()) == ["a cat"]
    before = Pool.open(place).keys
    assert Curation(parameters(words), place).run().keys == before
    words.write_text("cat\n")
    pool = Curation(parameters(words), place).run()
    assert kept(pool) == ["a dog"] and pool.keys != before
    again = Curation(parameters(words, sources=[]), words.parent / "again", place).run()
    assert again.keys == pool.keys


def test_a_pool_opens_without_the_files_it_was_made_with(words):
    pool = Curation(parameters(words), words.parent / "pool").run()
    words.unlink()
    opened = Pool.open(pool.path)
    assert kept(opened) == ["a cat"] and opened.keys == pool.keys
    assert trace(opened, "a/a.jsonl:0").reason == ""


@pytest.mark.parametrize(
    ("score", "settings", "key"),
    [
        ("toxicity.words", {"words": "none.txt"}, "words"),
        ("quality.fasttext", {"model": "none"}, "model"),
        ("dclm.urls", {"strict_file": "none"}, "strict_file"),
    ],
)
def test_a_missing_file_is_told_before_anything_is_read(words, score, settings, key):
    made = parameters(words, pipeline=[{"score": score, "settings": settings}])
    with pytest.raises(PunaError, match=f"step {score}: {key}"):
        Curation(made, words.parent / "pool").run()
    assert not (words.parent / "pool").exists()


def test_a_stage_reads_what_its_steps_name(words):
    read = parameters(words, settings={"toxicity.words": {"words": str(words)}}).files()
    assert read == [words, words, words.parent / "a.jsonl"]
    file = words.parent / "mine.yaml"
    file.write_text(json.dumps({"steps": [{"score": "toxicity.words", "settings": {"words": str(words)}}]}))
    assert parameters(words, pipeline=str(file)).files() == [file, words, words.parent / "a.jsonl"]
    file.write_text("[1, ")
    assert named_in(file) == []


def test_what_is_no_file_names_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "en").write_text("")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "en").write_text("")
    assert list(
        named([".", "..", "./", "en", "a.b", "x" * 5000 + ".", "\0.", 1, None, {"k": ["./lists"]}])
    ) == [tmp_path.relative_to(tmp_path) / "lists" / "en"]
