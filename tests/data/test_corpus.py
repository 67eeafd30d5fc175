"""Corpora on disk: what goes in comes out, and a broken one is told."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.data import corpus as module
from puna.data.corpus import KINDS, Corpus, write_corpus
from puna.data.kinds import COLUMNS, ROLES, BadRowError, check_row
from puna.data.ledger import Ledger

text = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": text}), min_size=1, max_size=3
)


def rows_of_kind(kind: str) -> st.SearchStrategy[list[dict[str, Any]]]:
    if kind == "labelled_words":
        pairs = st.lists(st.tuples(text, text), min_size=1, max_size=4)
        words = {"words": pairs, "labels": st.none(), **dict.fromkeys(("id", "source", "language"), text)}
        both = st.fixed_dictionaries(words).map(_words_and_labels)
        return st.lists(both, min_size=1, max_size=6, unique_by=lambda row: row["id"])
    columns = {name: text if shape == "text" else messages for name, shape in COLUMNS[kind].items()}  # type: ignore[index]
    return st.lists(st.fixed_dictionaries(columns), min_size=1, max_size=6, unique_by=lambda row: row["id"])


def _words_and_labels(row: dict[str, Any]) -> dict[str, Any]:
    """As many labels as words, each its own."""
    words, labels = zip(*row["words"], strict=True)
    ordered = {name: row[name] for name in COLUMNS["labelled_words"]}
    return {**ordered, "words": list(words), "labels": list(labels)}


def document(number: int = 0, **changes: Any) -> dict[str, Any]:
    return {"id": f"d{number}", "text": "een twee drie", "source": "s", "language": "nl", **changes}


def write(folder: Path, rows: list[dict[str, Any]], kind: str = "documents", **more: Any) -> Corpus:
    about: dict[str, Any] = {"provenance": [{"source": "s", "licence": "MIT"}], "ledger": {}}
    return write_corpus(folder, kind, rows, **{**about, **more})


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_rows_of_every_kind_come_back_as_they_were(
    kind: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows = data.draw(rows_of_kind(kind))
    folder = tmp_path_factory.mktemp("corpus") / "c"
    written = write(folder, rows, kind)
    opened = Corpus.open(folder, kind=kind)
    assert list(opened.rows()) == rows and opened.count == len(rows) == written.count
    opened.verify()


def test_many_rows_are_cut_into_shards_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS_PER_GROUP", 3)
    monkeypatch.setattr(module, "_ROWS_PER_SHARD", 6)
    made = write(tmp_path / "c", [document(number) for number in range(16)])
    assert [shard["rows"] for shard in made.meta["shards"]] == [6, 6, 4]
    assert [row["id"] for row in made.rows()] == [f"d{number}" for number in range(16)]
    assert list(made.texts()) == ["een twee drie"] * 16


def test_counts_are_noted_by_source_and_language(tmp_path: Path) -> None:
    rows = [document(0), document(1, source="t", language="fy", text="ien twa é")]
    made = write(tmp_path / "c", rows)
    assert made.meta["counts"] == {"rows": 2, "words": 6, "bytes": 13 + 10}
    assert made.meta["sources"]["t"] == {"rows": 1, "words": 3, "bytes": 10}
    assert set(made.meta["languages"]) == {"nl", "fy"} and made.meta["licences"] == ["MIT"]


def test_pairs_are_counted_under_both_their_languages(tmp_path: Path) -> None:
    row = {"id": "1", "source_text": "a b", "target_text": "c", "source": "s"}
    made = write(
        tmp_path / "c", [{**row, "source_language": "en", "target_language": "nl"}], "sentence_pairs"
    )
    assert made.meta["languages"] == {"en → nl": {"rows": 1, "words": 3, "bytes": 4}}


def test_the_fingerprint_follows_the_rows_and_not_the_place(tmp_path: Path) -> None:
    one, two = write(tmp_path / "1", [document()]), write(tmp_path / "2", [document()])
    other = write(tmp_path / "3", [document(text="iets anders")])
    assert one.fingerprint == two.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("row", "field", "words"),
    [
        ({"id": "1", "text": "a", "source": "s"}, "language", "missing"),
        (document(text=" \n"), "text", "empty"),
        (document(text=3), "text", "not a text"),
        (document(text="half \ud800"), "text", "surrogate"),
        (document(score=3), "score", "no such column"),
    ],
)
def test_a_row_that_is_not_of_its_kind_is_refused_with_its_field(
    tmp_path: Path, row: dict[str, Any], field: str, words: str
) -> None:
    with pytest.raises(PunaError, match=rf"(?s)row 2.*field {field}.*{words}"):
        write(tmp_path / "c", [document(9), row])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ([], "messages"),
        ("hello", "messages"),
        ([{"role": "user"}], "messages[0]"),
        ([{"role": "boss", "content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": "x"}, {"role": "user", "content": ""}], "messages[1].content"),
    ],
)
def test_a_bad_message_is_found_by_its_place(value: Any, field: str) -> None:
    with pytest.raises(BadRowError) as error:
        check_row("messages", {"id": "1", "messages": value, "source": "s", "language": "nl"})
    assert error.value.field == field


def test_nothing_is_written_of_no_rows_double_ids_an_unknown_kind_or_a_wrong_ledger(tmp_path: Path) -> None:
    ledger = Ledger()
    ledger.step("read", "rows").read = 2
    for rows, more, words in (
        ([], {}, "no row is left"),
        ([document(), document()], {}, "same id"),
        ([document()], {"kind": "poems"}, "unknown kind"),
        ([document()], {"ledger": ledger}, "do not add up"),
    ):
        with pytest.raises(PunaError, match=words):
            write(tmp_path / "c", rows, **more)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_source_leaves_the_old_corpus(tmp_path: Path) -> None:
    def rows() -> Any:
        yield document(1)
        raise RuntimeError

    old = write(tmp_path / "c", [document()])
    with pytest.raises(RuntimeError):
        write_corpus(tmp_path / "c", "documents", rows(), provenance=[], ledger={})
    assert Corpus.open(tmp_path / "c").fingerprint == old.fingerprint


def test_a_ledger_may_be_filled_while_the_rows_are_read(tmp_path: Path) -> None:
    ledger = Ledger()

    def rows() -> Any:
        ledger.step("read", "rows").drop("short")
        ledger.step("read", "rows").keep()
        yield document()

    made = write_corpus(tmp_path / "c", "documents", rows(), provenance=[], ledger=ledger)
    assert made.meta["ledger"] == {"read": {"unit": "rows", "read": 2, "kept": 1, "dropped": {"short": 1}}}


def damaged(folder: Path, **changes: Any) -> None:
    meta = json.loads((folder / "corpus.json").read_text())
    (folder / "corpus.json").write_text(json.dumps({**meta, **changes}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: shutil.rmtree(folder), "not a corpus"),
        (lambda folder: (folder / "corpus.json").unlink(), "not a corpus"),
        (lambda folder: (folder / "corpus.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "corpus.json").write_text("[]"), "not the description"),
        (lambda folder: damaged(folder, kind="poems"), "unknown kind"),
        (lambda folder: damaged(folder, format=99), "another version"),
        (lambda folder: damaged(folder, shards=[{}]), "not described"),
        (lambda folder: damaged(folder, counts={"rows": 7}), "do not add up"),
        (lambda folder: next(folder.glob("*.parquet")).unlink(), "missing or not whole"),
        (lambda folder: next(folder.glob("*.parquet")).write_bytes(b"PAR1"), "missing or not whole"),
    ],
)
def test_a_broken_corpus_is_told_when_it_is_opened(tmp_path: Path, damage: Any, words: str) -> None:
    write(tmp_path / "c", [document()])
    damage(tmp_path / "c")
    with pytest.raises(PunaError, match=words):
        Corpus.open(tmp_path / "c")


def test_changed_bytes_are_found_on_reading_or_verifying(tmp_path: Path) -> None:
    made = write(tmp_path / "c", [document()])
    shard = next((tmp_path / "c").glob("*.parquet"))
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(PunaError, match="was changed"):
        made.verify()
    with pytest.raises(PunaError, match="cannot be read"):
        list(made.rows())


def test_another_kind_than_needed_is_told(tmp_path: Path) -> None:
    write(tmp_path / "c", [document()])
    with pytest.raises(PunaError, match=r"(?s)another kind.*documents.*messages"):
        Corpus.open(tmp_path / "c", kind="messages")
    said = [{"role": "user", "content": "hoi"}]
    row = {"id": "1", "messages": said, "source": "s", "language": "nl"}
    with pytest.raises(PunaError, match="only documents"):
        list(write(tmp_path / "m", [row], "messages").texts())
