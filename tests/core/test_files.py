"""Files are whole or absent, and fingerprints follow the content."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.core.files import (
    fingerprint,
    folder_aside,
    read_json,
    write_aside,
    write_json,
    write_text,
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def test_a_write_that_fails_leaves_the_old_file_and_no_debris(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    write_text(file, "old")
    with pytest.raises(RuntimeError), write_aside(file) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_is_not_there_before_it_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "a.txt"
    with write_aside(file) as aside:
        aside.write_text("new")
        assert not file.exists()
    assert file.read_text() == "new"


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with folder_aside(folder) as aside:
        (aside / "one").write_text("1")
    with pytest.raises(RuntimeError), folder_aside(folder) as aside:
        (aside / "two").write_text("2")
        raise RuntimeError
    assert [file.name for file in folder.iterdir()] == ["one"]
    with folder_aside(folder) as aside:
        (aside / "three").write_text("3")
    assert [file.name for file in folder.iterdir()] == ["three"]
    assert list(tmp_path.iterdir()) == [folder]


@given(json_values)
def test_json_comes_back_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    file = tmp_path_factory.mktemp("json") / "value.json"
    write_json(file, value)
    assert read_json(file) == value


def test_broken_and_missing_json_are_told_with_their_file(tmp_path: Path) -> None:
    with pytest.raises(PunaError, match=r"nothing\.json: file not found"):
        read_json(tmp_path / "nothing.json")
    broken = tmp_path / "broken.json"
    broken.write_text('{"a": 1,}')
    with pytest.raises(PunaError, match=r"(?s)broken\.json: not valid JSON.*line 1"):
        read_json(broken)
    broken.write_bytes(b"\xff\xfe")
    with pytest.raises(PunaError, match="not valid JSON"):
        read_json(broken)


@given(st.dictionaries(st.text(), json_values, min_size=2, max_size=4))
def test_a_fingerprint_does_not_depend_on_the_order_of_keys(value: dict[str, object]) -> None:
    backwards = dict(reversed(value.items()))
    assert fingerprint(value) == fingerprint(backwards) == fingerprint(json.loads(json.dumps(value)))
    assert fingerprint(value) != fingerprint({**value, "another key": 1})
