"""Text files and tables: what is read, and where a bad row stands."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from little_sources import texts

from puna.core.errors import PunaError
from puna.data.corpus import Corpus

GOOD = [{"text": "een"}, {"text": "twee"}]


def test_a_text_file_is_one_row_or_cut_at_a_string(read: Any, write: Any) -> None:
    path = write("a/book.txt", "één\n\ntwee\n\n\n\ndrie\n")
    items, _ = read("documents", path=str(path))
    assert texts(items) == ["één\n\ntwee\n\n\n\ndrie"] and items[0].key == "book.txt"
    items, reading = read("documents", path=str(path), split_on="\n\n", language="nl")
    assert texts(items) == ["één", "twee", "drie"] and items[2].key == "book.txt#3"
    assert reading.tally.dropped == {"empty": 1} and items[0].row["language"] == "nl"


def test_a_glob_reads_files_in_order_under_names_without_the_machines_folders(
    read: Any, write: Any, tmp_path: Path
) -> None:
    for name in ("texts/b.txt", "texts/a.txt", "texts/deep/c.txt.gz"):
        write(name, name)
    items, reading = read("documents", path=f"{tmp_path}/texts/**/*.txt*", format="text")
    assert [item.document for item in items] == ["a.txt", "b.txt", "deep/c.txt.gz"]
    assert texts(items)[2] == "texts/deep/c.txt.gz" and reading.facts["files"] == 3


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_json_lines_are_read_plain_and_gzipped(read: Any, write: Any, name: str, capsys: Any) -> None:
    items, _ = read("documents", path=str(write(name, GOOD)))
    assert texts(items) == ["een", "twee"] and items[1].document == f"{name}:2"
    assert f"{name}: raw text -> documents (text)" in capsys.readouterr().err


def test_a_json_file_holds_a_list_of_rows(read: Any, write: Any) -> None:
    path = write("rows.json", '[{"instruction": "a", "output": "b"}]')
    assert read("messages", path=str(path))[0][0].row["messages"][1]["content"] == "b"
    with pytest.raises(PunaError, match="must hold a list"):
        read("messages", path=str(write("one.json", '{"text": "a"}')))
    with pytest.raises(PunaError, match=r"rows2\.json:2:1"):
        read("messages", path=str(write("rows2.json", "[\n")))


def test_csv_and_tsv_are_read_with_quotes_and_line_breaks(read: Any, write: Any) -> None:
    path = write("a.csv", '\ufefftext,url\n"een, ""twee""\ndrie",x\n\nvier,y\n')
    items, _ = read("documents", path=str(path))
    assert texts(items) == ['een, "twee"\ndrie', "vier"] and items[0].document == "a.csv:3"
    path = write("p.tsv", "source_text\ttarget_text\nfour\tvier\n")
    items, _ = read("sentence_pairs", path=str(path), source_language="en", target_language="nl")
    assert items[0].row["target_text"] == "vier" and items[0].row["target_language"] == "nl"
    path = write("s.csv", "text;url\neen;x\n")
    assert texts(read("documents", path=str(path), delimiter=";")[0]) == ["een"]


def test_parquet_is_read_with_nested_columns(read: Any, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "hoi"}], "score": 1}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    items, _ = read("messages", path=str(tmp_path / "a.parquet"))
    assert items[0].row["messages"] == rows[0]["messages"] and items[0].document == "a.parquet:1"


def test_columns_can_be_named(read: Any, write: Any) -> None:
    path = write("a.jsonl", [{"body": "een"}])
    assert texts(read("documents", path=str(path), columns={"text": "body"})[0]) == ["een"]


def test_a_column_that_only_some_rows_have_is_used_where_it_stands(read: Any, write: Any) -> None:
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": "b", "input": "c"}]
    items, _ = read("messages", path=str(write("a.jsonl", rows)))
    assert [item.row["messages"][0]["content"] for item in items] == ["a", "a\n\nc"]


@pytest.mark.parametrize(
    ("name", "content", "place", "words"),
    [
        ("a.jsonl", '{"text": "een"}\n{"text": \n', "a.jsonl:2", "not valid JSON"),
        ("a.jsonl", '{"text": "een"}\n[1]\n', "a.jsonl:2", "object with named columns"),
        ("a.jsonl", '{"text": "een"}\n\n{"text": 3}\n', "a.jsonl:3, field text", "not a text"),
        ("a.jsonl", '{"text": "een"}\n{"txt": "x"}\n', "a.jsonl:2", "no format of documents"),
        ("a.jsonl", '{"text": "een"}\n{"text": "\\ud800"}\n', "a.jsonl:2, field text", "surrogate"),
        (
            "a.jsonl",
            '{"text": "een"}\n{"n": ' + "9" * 5000 + "}\n",
            "a.jsonl:2, field (line)",
            "not valid JSON",
        ),
        ("a.csv", "text,url\neen,x\ntwee\n", "a.csv:3", "another number of values"),
        ("a.csv", "text,url\neen,x\n ,y\n", "a.csv:3, field text", "empty"),
    ],
)
def test_a_bad_row_is_an_error_with_file_line_and_field_or_counted_and_left_out(
    read: Any, write: Any, name: str, content: str, place: str, words: str, capsys: Any
) -> None:
    path = str(write(name, content))
    with pytest.raises(PunaError) as error:
        read("documents", path=path)
    assert str(error.value).startswith(place) and words in str(error.value)
    assert "on_bad_row: skip" in str(error.value)
    items, reading = read("documents", path=path, on_bad_row="skip")
    assert texts(items) == ["een"] and reading.tally.dropped == {"bad row": 1}
    assert place in capsys.readouterr().err.replace("\n", " ")


def test_a_bad_parquet_row_is_found_by_its_number(read: Any, tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["een", None]}), tmp_path / "a.parquet")
    with pytest.raises(PunaError, match=r"a\.parquet:2, field text"):
        read("documents", path=str(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.jsonl", b"\xff\xfe", "not UTF-8"),
        ("a.csv", 'text\n"een\n', "not valid CSV"),
        ("a.csv", "text,text\neen,twee\n", "two columns have the same name"),
        ("a.parquet", b"PAR1", "not a readable Parquet"),
        ("a.jsonl", '{"body": "een"}\n', "no format of documents"),
        ("a.json", "[" * 100_000, "not valid JSON"),
    ],
)
def test_a_broken_file_is_told_whatever_the_policy(
    read: Any, write: Any, name: str, content: Any, words: str
) -> None:
    with pytest.raises(PunaError, match=words):
        read("documents", path=str(write(name, content)), on_bad_row="skip")


def test_a_cut_gzip_file_is_told(read: Any, write: Any) -> None:
    path = write("a.jsonl.gz", [{"text": str(number)} for number in range(1000)])
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(PunaError, match="gzip file is broken"):
        read("documents", path=str(path))
    path.write_bytes(b"no gzip")
    with pytest.raises(PunaError, match="gzip file is broken"):
        read("documents", path=str(path))


def test_no_file_a_missing_format_and_a_wrong_kind_are_told(read: Any, tmp_path: Path) -> None:
    with pytest.raises(PunaError, match=r"none\.txt: no file has this path"):
        read("documents", path=str(tmp_path / "none.txt"))
    with pytest.raises(PunaError, match="format cannot be told"):
        read("documents", path="data.bin")


def test_the_limit_counts_rows_that_are_looked_at(
    read: Any, write: Callable[[str, Any], Path], tmp_path: Path
) -> None:
    write("a.jsonl", GOOD)
    write("b.jsonl", GOOD)
    items, _ = read("documents", path=str(tmp_path / "*.jsonl"), limit=3)
    assert [item.document for item in items] == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1"]


def test_a_text_cannot_be_cut_at_nothing(read: Any, write: Any) -> None:
    with pytest.raises(PunaError, match="at least 1 character"):
        read("documents", path=str(write("a.txt", "een")), split_on="")


def test_a_column_may_name_the_task_of_a_row(
    make: Callable[..., Any], write: Callable[[str, Any], Path]
) -> None:
    lines = [{"prompt": f"ask {n}", "completion": "yes", "task_name": f"t{n % 2}"} for n in range(4)]
    path = str(write("rows.jsonl", lines))
    source = {"path": path, "name": "many", "task_column": "task_name"}
    outcome, _ = make(kind="messages", sources=[source])
    rows = list(Corpus.open(outcome.outputs["train"]).rows())
    assert [row["source"] for row in rows] == ["many/t0", "many/t1", "many/t0", "many/t1"]
    with pytest.raises(PunaError, match="no name of a task"):
        make("other", kind="messages", sources=[{**source, "task_column": "nothing"}])
