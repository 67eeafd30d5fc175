import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from puna.core.errors import PunaError
from puna.core.rows import corpus_kind, read_columns


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two shards of two and one rows."""
    for name, ids in (("a.parquet", ["1", "2"]), ("b.parquet", ["3"])):
        table = pyarrow.table({"id": ids, "text": [f"text {index}" for index in ids]})
        pyarrow.parquet.write_table(table, tmp_path / name)
    meta = {"kind": "documents", "shards": [{"file": "a.parquet"}, {"file": "b.parquet"}]}
    (tmp_path / "corpus.json").write_text(json.dumps(meta))
    return tmp_path


def test_columns_of_all_shards_come_in_order(corpus: Path) -> None:
    assert corpus_kind(corpus) == "documents"
    assert list(read_columns(corpus, ["text", "id"])) == [("text 1", "1"), ("text 2", "2"), ("text 3", "3")]


def test_a_folder_that_is_no_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PunaError, match=r"corpus\.json: file not found"):
        corpus_kind(tmp_path)
    (tmp_path / "corpus.json").write_text("[]")
    with pytest.raises(PunaError, match="names no kind"):
        corpus_kind(tmp_path)
    (tmp_path / "corpus.json").write_text('{"kind": "documents"}')
    with pytest.raises(PunaError, match="names no shards"):
        list(read_columns(tmp_path, ["text"]))


@pytest.mark.parametrize("damage", ["cut", "gone", "column"])
def test_a_shard_that_cannot_be_read_is_named(corpus: Path, damage: str) -> None:
    shard = corpus / "b.parquet"
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-9])
    elif damage == "gone":
        shard.unlink()
    with pytest.raises(PunaError, match=r"b\.parquet|a\.parquet"):
        list(read_columns(corpus, ["text", "nothing"] if damage == "column" else ["text"]))
