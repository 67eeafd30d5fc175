"""Archives made by others cannot write where they like or grow without bound."""

import io
import tarfile
import zipfile
from pathlib import Path

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.core import archives
from puna.core.errors import PunaError


def make_zip(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize(
    "name", ["../up", "a/../../up", "/etc/passwd", "C:\\x", "c:x", "a\\..\\b", "..", "", "a\0b"]
)
def test_a_member_that_would_leave_its_folder_is_refused(name: str) -> None:
    with pytest.raises(PunaError, match="unsafe path"):
        archives.refuse_unsafe(name)


@given(st.lists(st.text("abc_-.é", min_size=1).filter(lambda part: set(part) != {"."}), min_size=1))
def test_an_ordinary_member_passes(parts: list[str]) -> None:
    assert archives.refuse_unsafe("/".join(parts)) == "/".join(parts)


def test_an_archive_with_one_unsafe_name_is_refused_as_a_whole(tmp_path: Path) -> None:
    file = make_zip(tmp_path / "a.zip", **{"good": b"1", "../bad": b"2"})
    with pytest.raises(PunaError, match=r"(?s)a\.zip.*\.\./bad"), archives.open_zip(file):
        pass


def test_a_member_is_read_up_to_its_limit_and_no_further(tmp_path: Path) -> None:
    file = make_zip(tmp_path / "a.zip", bomb=bytes(5_000_000))
    with archives.open_zip(file) as archive:
        assert archives.read_member(archive, "bomb", limit=5_000_000) == bytes(5_000_000)
        target = io.BytesIO()
        with pytest.raises(PunaError, match=r"(?s)a\.zip:bomb.*more than it may.*4,999,999"):
            archives.copy_member(archive, "bomb", target, limit=4_999_999)
        assert len(target.getvalue()) < 4_999_999


def test_the_limit_holds_even_if_the_directory_lies_about_the_size(tmp_path: Path) -> None:
    file = make_zip(tmp_path / "a.zip", bomb=bytes(3_000_000))
    content = bytearray(file.read_bytes())
    entry = content.rfind(b"PK\x01\x02")
    content[entry + 24 : entry + 28] = (10).to_bytes(4, "little")
    file.write_bytes(content)
    with archives.open_zip(file) as archive, pytest.raises(PunaError):
        archives.read_member(archive, "bomb", limit=2_000_000)


def test_broken_and_missing_archives_and_members_are_told(tmp_path: Path) -> None:
    with pytest.raises(PunaError, match="file not found"), archives.open_zip(tmp_path / "no.zip"):
        pass
    (tmp_path / "text.zip").write_text("no zip at all")
    with pytest.raises(PunaError, match="not a readable zip"), archives.open_zip(tmp_path / "text.zip"):
        pass
    file = make_zip(tmp_path / "a.zip", one=b"some words " * 1000)
    with archives.open_zip(file) as archive, pytest.raises(PunaError, match="no such member"):
        archives.read_member(archive, "two", limit=10)
    content = bytearray(file.read_bytes())
    content[45:60] = b"\xff" * 15
    file.write_bytes(content)
    with archives.open_zip(file) as archive, pytest.raises(PunaError, match="cannot be unpacked"):
        archives.read_member(archive, "one", limit=100_000)


def _tar(path: Path, members: dict[str, bytes], *, link: str | None = None) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        if link is not None:
            entry = tarfile.TarInfo(link)
            entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(entry)
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def test_a_file_of_a_tar_archive_is_read_and_nothing_else_unpacked(tmp_path: Path) -> None:
    path = _tar(tmp_path / "a.tar.gz", {"../out.txt": b"evil", "d/x.csv": b"a,b\n" * 1000})
    assert archives.read_tar_member(path, "d/x.csv", limit=4000) == b"a,b\n" * 1000
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["a.tar.gz"]


def test_a_tar_members_bound_links_and_absence_are_errors(tmp_path: Path) -> None:
    path = _tar(tmp_path / "a.tar.gz", {"x": b"12345"}, link="way")
    with pytest.raises(PunaError, match="at most 4 bytes"):
        archives.read_tar_member(path, "x", limit=4)
    for absent in ("way", "y"):
        with pytest.raises(PunaError, match="no such file"):
            archives.read_tar_member(path, absent, limit=4)
    large = _tar(tmp_path / "b.tar.gz", {"x": numpy.random.default_rng(0).bytes(50_000)})
    for broken in (b"no archive", large.read_bytes()[:20_000]):
        large.write_bytes(broken)
        with pytest.raises(PunaError, match="not a readable tar archive"):
            archives.read_tar_member(large, "x", limit=50_000)
    with pytest.raises(PunaError, match="file not found"):
        archives.read_tar_member(tmp_path / "c.tar.gz", "y", limit=4)


def test_a_folder_of_a_tar_archive_is_unpacked_and_nothing_else(tmp_path: Path) -> None:
    members = {"p/d/x.csv": b"a,b\n", "p/d/in/y.csv": b"c", "p/other.txt": b"no", "p/dd/z": b"no"}
    path = _tar(tmp_path / "a.tar.gz", members, link="p/d/way")
    archives.unpack_tar_folder(path, "p/d", tmp_path / "out", limit=5)
    found = {file.relative_to(tmp_path / "out").as_posix() for file in (tmp_path / "out").rglob("*.*")}
    assert found == {"x.csv", "in/y.csv"}
    with pytest.raises(PunaError, match="more than it may"):
        archives.unpack_tar_folder(path, "p/d", tmp_path / "less", limit=4)
    with pytest.raises(PunaError, match="no file in this folder"):
        archives.unpack_tar_folder(path, "p/none", tmp_path / "none", limit=9)
    evil = _tar(tmp_path / "b.tar.gz", {"p/d/../../out.txt": b"evil"})
    with pytest.raises(PunaError, match="unsafe path"):
        archives.unpack_tar_folder(evil, "p/d", tmp_path / "evil", limit=9)
    with pytest.raises(PunaError, match="file not found"):
        archives.unpack_tar_folder(tmp_path / "none.tar", "p", tmp_path / "none", limit=9)
