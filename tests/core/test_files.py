"""Files are whole or absent, and fingerprints follow the content."""

import errno
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.core.errors import PunaError
from puna.core.files import (
    clear_leftovers,
    fingerprint,
    folder_aside,
    read_json,
    room_for,
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


def test_a_disk_without_room_is_told_with_file_need_and_free_space(tmp_path: Path) -> None:
    class SafetensorError(Exception):
        """As Rust's errors come: the system's number is in the words alone."""

    full = (
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: File too large (os error 27)"),
    )
    for error in full:
        with (
            pytest.raises(PunaError, match="no room to write this") as told,
            room_for(tmp_path / "new" / "x.bin", needed=1234567, fix="the rest is whole"),
        ):
            raise error
        assert told.value.where == tmp_path / "new" / "x.bin"
        assert "1,234,567 bytes" in str(told.value) and "the rest is whole" in str(told.value)
        assert f"bytes are free in {tmp_path}" in str(told.value)
    for other in (OSError(errno.EACCES, "Permission denied"), SafetensorError("header"), ValueError("28")):
        with pytest.raises(type(other)), room_for(tmp_path / "x"):
            raise other


def test_only_what_was_left_aside_is_cleared(tmp_path: Path) -> None:
    for name in (".a.json.0123abcd.part", ".b.00000000.old", ".hidden", ".c.part", "d.0123abcd.part"):
        (tmp_path / name).write_text("x")
    (tmp_path / ".folder.0123abcd.part").mkdir()
    clear_leftovers(tmp_path)
    clear_leftovers(tmp_path / "absent")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".c.part", ".hidden", "d.0123abcd.part"]
