"""Corpora of labelled texts and words: their rows, their sources, and the labels in corpus.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from puna.core.errors import PunaError
from puna.core.stage import Context, get_stage, validate
from puna.data.corpus import Corpus, write_corpus
from puna.data.describe import describe
from puna.data.next_word import NextWordParameters, next_word_rows

ABOUT: dict[str, Any] = {"provenance": [{"source": "test", "licence": "CC0"}], "ledger": {}}
TAIL = {"source": "test", "language": "en"}


def make(out: Path, **parameters: Any) -> Corpus:
    stage = get_stage("corpus")
    context = Context("corpus", out, {})
    outcome = stage.function(context, validate(stage.parameters, parameters, where="test"))
    return Corpus.open(outcome.outputs["train"])


def test_labels_are_counted_in_the_corpus(tmp_path: Path) -> None:
    rows = [
        {"id": "1", "words": ["a", "cat", "sat"], "labels": ["O", "B-CAT", "O"], **TAIL},
        {"id": "2", "words": ["dog"], "labels": ["O"], **TAIL},
    ]
    corpus = write_corpus(tmp_path / "words", "labelled_words", rows, **ABOUT)
    assert corpus.labels == ("B-CAT", "O") and corpus.meta["labels"] == {"B-CAT": 1, "O": 3}
    assert list(corpus.rows()) == rows and corpus.meta["counts"]["words"] == 4
    assert any(
        "label" in str(column.header) for part in describe(corpus) for column in getattr(part, "columns", ())
    )
    plain = write_corpus(tmp_path / "plain", "documents", [{"id": "1", "text": "a", **TAIL}], **ABOUT)
    assert "labels" not in plain.meta
    with pytest.raises(PunaError, match="have no labels"):
        _ = plain.labels


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"words": ["a", "b"], "labels": ["O"]}, "every word needs a label"),
        ({"words": [], "labels": []}, "not a list of texts"),
        ({"words": ["a", " "], "labels": ["O", "O"]}, "the text is empty"),
        ({"words": "a b", "labels": ["O", "O"]}, "not a list of texts"),
        ({"words": ["a"], "labels": [3]}, "not a text"),
    ],
)
def test_a_row_of_words_without_a_label_each_is_refused(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(PunaError, match=message):
        write_corpus(tmp_path / "c", "labelled_words", [{"id": "1", **row, **TAIL}], **ABOUT)


def test_tables_of_labelled_rows_are_read(tmp_path: Path) -> None:
    lines = [{"tokens": ["a", "cat"], "tags": ["O", "B-CAT"]}, {"tokens": ["b"], "tags": ["O"]}]
    (tmp_path / "words.jsonl").write_text("\n".join(map(json.dumps, lines)))
    columns = {"words": "tokens", "labels": "tags"}
    sources = [{"path": str(tmp_path / "words.jsonl"), "columns": columns}]
    words = make(tmp_path / "one", kind="labelled_words", sources=sources)
    assert [row["words"] for row in words.rows()] == [["a", "cat"], ["b"]]
    (tmp_path / "texts.csv").write_text("text,label\nwell done,good\noh no,bad\n")
    texts = make(tmp_path / "two", kind="labelled_texts", sources=[{"path": str(tmp_path / "texts.csv")}])
    assert texts.labels == ("bad", "good")
    lines[0]["tags"].append("O")
    (tmp_path / "words.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(PunaError, match="3 labels for 2 words"):
        make(tmp_path / "three", kind="labelled_words", sources=sources)


def test_a_task_of_bigbench_gives_labelled_texts(tmp_path: Path) -> None:
    examples = [
        {"input": "Nice.", "target_scores": {"positive": 1, "negative": 0}},
        {"input": "Awful!", "target_scores": {"positive": 0, "negative": 1}},
    ]
    (tmp_path / "task.json").write_text(json.dumps({"examples": examples}))
    sources = [{"format": "bigbench", "path": str(tmp_path / "task.json")}]
    corpus = make(tmp_path / "out", kind="labelled_texts", sources=sources)
    assert [(row["text"], row["label"]) for row in corpus.rows()] == [
        ("Nice.", "positive"),
        ("Awful!", "negative"),
    ]
    alone = make(tmp_path / "alone", kind="documents", sources=sources)
    assert [row["text"] for row in alone.rows()] == ["Nice.", "Awful!"]


OBO = """format-version: 1.2

[Term]
id: HP:0000001
name: All

[Term]
id: HP:0000118
name: Phenotypic abnormality
is_a: HP:0000001 ! All

[Term]
id: HP:1
name: Hearing impairment
def: "A low hearing (hearing impairment) with large ears, and Tall Stature." [a]
synonym: "Deafness" EXACT layperson []
synonym: "Ear trouble" RELATED []
is_a: HP:0000118 ! Phenotypic abnormality

[Term]
id: HP:2
name: Tall stature
def: "Ear trouble, or \\"deafness\\"." []
is_a: HP:1 ! Hearing impairment

[Term]
id: HP:3
name: Often
def: "Nothing that often stands here." []
is_a: HP:0000001 ! All

[Term]
id: HP:4
name: Large ears
def: "Gone." []
is_a: HP:0000118 ! Phenotypic abnormality
is_obsolete: true
"""


def test_definitions_of_an_ontology_are_labelled_by_its_terms(tmp_path: Path) -> None:
    (tmp_path / "hp.obo").write_text(OBO)
    corpus = make(tmp_path / "out", kind="labelled_words", sources=[{"path": str(tmp_path / "hp.obo")}])
    rows = {row["id"]: row for row in corpus.rows()}
    marked = {
        name: [
            f"{word}/{label[0]}"
            for word, label in zip(row["words"], row["labels"], strict=True)
            if label != "O"
        ]
        for name, row in rows.items()
    }
    # Names and exact synonyms below the root in any case; not related ones, other branches, or what is gone.
    assert marked == {
        "hp/HP:1": ["hearing/B", "impairment/I", "Tall/B", "Stature/I"],
        "hp/HP:2": ["deafness/B"],
    }
    assert rows["hp/HP:1"]["words"][:6] == ["A", "low", "hearing", "(", "hearing", "impairment"]
    ledger = corpus.meta["ledger"]["hp: read"]
    assert ledger["dropped"] == {"without an entity": 1} and ledger["kept"] == 2
    with pytest.raises(PunaError, match="no term lies below the root"):
        make(
            tmp_path / "none",
            kind="labelled_words",
            sources=[{"path": str(tmp_path / "hp.obo"), "root": "HP:9"}],
        )


def test_labels_of_words_follow_from_the_next_word_and_nothing_else() -> None:
    parameters = NextWordParameters(rows=400, held_out_rows=10)
    rows = list(next_word_rows(parameters, "train", 0))
    triggers = set(parameters.words[: parameters.triggers])
    for row in rows:
        assert row["labels"] == ["B-MARK" if word in triggers else "O" for word in [*row["words"][1:], ""]]
    assert {len(row["words"]) for row in rows} == set(range(8, 17))
    marked = [label for row in rows for label in row["labels"]].count("B-MARK")
    assert 0.2 < marked / sum(len(row["words"]) for row in rows) < 0.35
    again = list(next_word_rows(parameters, "train", 0))
    assert again == rows != list(next_word_rows(parameters, "train", 1))
    assert len(list(next_word_rows(parameters, "held_out", 0))) == 10
    with pytest.raises(ValueError, match="fewer than half"):
        NextWordParameters(words=("a", "b"), triggers=1)


def test_sentences_of_the_brown_corpus_are_labelled_by_their_parts_of_speech(tmp_path: Path) -> None:
    folder = tmp_path / "brown"
    folder.mkdir()
    (folder / "README").write_text("not a text")
    (folder / "ca01").write_text("\n\n\tThe/at City's/nn$-tl 1/2/cd isn't/bez* ,/, ''/''\n\n\tAh/uh ./.\n")
    (folder / "cr09").write_text("\tDas/fw-at --/-- there's/ex+bez */*\n")
    sources = [{"format": "brown", "path": str(folder)}]
    corpus = make(tmp_path / "base", kind="labelled_words", sources=sources)
    rows = {row["id"]: (row["words"], row["labels"]) for row in corpus.rows()}
    assert rows == {
        "brown/ca01#0": (["The", "City's", "1/2", "isn't", ",", "''"], ["at", "nn", "cd", "bez", ",", "''"]),
        "brown/ca01#1": (["Ah", "."], ["uh", "."]),
        "brown/cr09#0": (["Das", "--", "there's", "*"], ["at", "--", "ex", "*"]),
    }
    whole = make(tmp_path / "whole", kind="labelled_words", sources=[{**sources[0], "tags": "whole"}])
    assert next(whole.rows())["labels"] == ["at", "nn$-tl", "cd", "bez*", ",", "''"]
    (folder / "cr09").write_text("\tDas\n")
    with pytest.raises(PunaError, match=r"cr09:1: a word without a tag"):
        make(tmp_path / "bad", kind="labelled_words", sources=sources)
    with pytest.raises(PunaError, match="none of the Brown corpus's texts"):
        make(tmp_path / "none", kind="labelled_words", sources=[{"format": "brown", "path": str(tmp_path)}])
