"""Assets are fetched once, checked, kept whole, and used offline."""

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydantic
import pytest

from puna.core import assets, registries
from puna.core.assets import Asset, SourceArchive
from puna.core.errors import PunaError

CONTENT = b"weights " * 5000
MEMBER = "littlemodel/model.bin"


def make_wheel(folder: Path, content: bytes = CONTENT) -> Path:
    """A wheel that pip accepts, with one data file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "littlemodel-1.0-py3-none-any.whl"
    about = "Metadata-Version: 2.1\nName: littlemodel\nVersion: 1.0\n"
    how = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in (
            (MEMBER, content),
            ("littlemodel-1.0.dist-info/METADATA", about),
            ("littlemodel-1.0.dist-info/WHEEL", how),
            ("littlemodel-1.0.dist-info/RECORD", ""),
        ):
            archive.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), text)
    return file


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def declare(wheel: Path, *, whole: bool = False, **changes: Any) -> Asset:
    content = wheel.read_bytes()
    source: dict[str, Any] = {
        "registry": "pypi",
        "package": "littlemodel",
        "version": "1.0",
        "sha256": sha(content),
        "bytes": len(content),
    }
    if not whole:
        source["member"] = {"path": MEMBER, "sha256": sha(CONTENT), "bytes": len(CONTENT)}
    return Asset(**{"name": "little", "what": "a model", "licence": "MIT", "from": {**source, **changes}})


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all pip knows; the cache is empty."""
    monkeypatch.setenv("PUNA_CACHE", str(tmp_path / "cache"))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


@pytest.fixture
def unplugged(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called, it makes any further start of a client fail."""

    def unplug() -> None:
        def refuse(*arguments: Any, **options: Any) -> None:
            raise AssertionError(f"started {arguments}")

        monkeypatch.setattr(subprocess, "Popen", refuse)
        monkeypatch.setattr(subprocess, "run", refuse)

    return unplug


def debris(folder: Path) -> list[str]:
    return [file.name for file in folder.rglob("*") if file.name.startswith(".") and file.name != ".lock"]


def test_a_member_is_fetched_checked_and_then_found_without_any_client(
    index: Path, unplugged: Callable[[], None]
) -> None:
    asset = declare(make_wheel(index))
    assert assets.local(asset) is None
    path = assets.fetch_asset(asset)
    assert path.read_bytes() == CONTENT and path.name == "model.bin"
    assert debris(assets.cache_folder()) == []
    assert [file.name for file in path.parent.glob("*.whl")] == []
    unplugged()
    assert assets.fetch_asset(asset) == path == assets.local(asset)
    assert assets.recorded_sha256(asset) == sha(CONTENT)


def test_without_a_member_the_package_itself_is_kept(index: Path) -> None:
    wheel = make_wheel(index)
    path = assets.fetch_asset(declare(wheel, whole=True))
    assert path.name == "littlemodel-1.0.whl" and path.read_bytes() == wheel.read_bytes()


def test_an_unchanged_file_is_not_hashed_again(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asset = declare(make_wheel(index))
    path = assets.fetch_asset(asset)
    hashed: list[Path] = []
    monkeypatch.setattr(assets, "sha256_of", lambda file: hashed.append(file) or sha(file.read_bytes()))
    assert assets.local(asset) == path and hashed == []
    os.utime(path, (1, 1))
    assert assets.local(asset) == path and hashed == [path]
    assert assets.local(asset) == path and hashed == [path]


def test_a_lost_or_broken_sidecar_only_costs_a_hash(index: Path, unplugged: Callable[[], None]) -> None:
    asset = declare(make_wheel(index))
    path = assets.fetch_asset(asset)
    unplugged()
    stamp = next(path.parent.glob("*.stamp.json"))
    for broken in ("{", "[]", "{}"):
        stamp.write_text(broken)
        assert assets.fetch_asset(asset) == path
    stamp.unlink()
    assert assets.fetch_asset(asset) == path
    assert json.loads(stamp.read_text())["sha256"] == sha(CONTENT)


def test_a_damaged_copy_is_fetched_again_and_this_is_said(
    index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asset = declare(make_wheel(index))
    path = assets.fetch_asset(asset)
    path.write_bytes(CONTENT[:-1] + b"!")
    assert assets.local(asset) is None
    assert assets.fetch_asset(asset).read_bytes() == CONTENT
    assert "fetching it again" in capsys.readouterr().err


def test_a_new_declaration_does_not_take_the_old_file(index: Path) -> None:
    assets.fetch_asset(declare(make_wheel(index)))
    newer = declare(make_wheel(index), member={"path": MEMBER, "sha256": "0" * 64, "bytes": len(CONTENT)})
    assert assets.local(newer) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sha256": "0" * 64}, "the package file is not the declared one"),
        ({"bytes": 10**6}, "the package file is not the declared one"),
        (
            {"member": {"path": MEMBER, "sha256": "0" * 64, "bytes": len(CONTENT)}},
            "model.bin is not the declared one",
        ),
        ({"member": {"path": MEMBER, "sha256": sha(CONTENT), "bytes": 9}}, "unpacks to more than it may"),
        ({"member": {"path": "no/such", "sha256": sha(CONTENT), "bytes": 9}}, "no such member"),
        ({"version": "2.0"}, "fetching littlemodel 2.0 failed"),
        ({"package": "no-such-model"}, "fetching no-such-model 1.0 failed"),
    ],
)
def test_what_is_not_as_declared_is_refused_and_leaves_nothing(
    index: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(PunaError, match=words):
        assets.fetch_asset(declare(make_wheel(index), **changes))
    assert [
        file for file in assets.cache_folder().rglob("*") if file.is_file() and file.name != ".lock"
    ] == []
    assert debris(assets.cache_folder()) == []


def test_a_download_larger_than_declared_is_stopped(tmp_path: Path) -> None:
    endless = "with open('big', 'wb', 0) as file:\n while True: file.write(bytes(1 << 16))"
    with pytest.raises(PunaError, match="larger than declared"):
        registries._run(
            [sys.executable, "-c", endless],
            tmp_path,
            "fetching",
            1000,
            watched=tmp_path,
            bound=100_000,
            folder=tmp_path,
        )


def test_source_archives_are_not_built(index: Path, tmp_path: Path) -> None:
    asset = declare(make_wheel(tmp_path / "elsewhere"))
    source = tmp_path / "littlemodel-1.0"
    source.mkdir()
    (source / "setup.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    shutil.make_archive(str(index / "littlemodel-1.0"), "gztar", tmp_path, "littlemodel-1.0")
    with pytest.raises(PunaError, match="failed"):
        assets.fetch_asset(asset)
    assert not (tmp_path / "ran").exists()


def test_a_wheel_with_an_unsafe_member_is_refused(index: Path) -> None:
    wheel = make_wheel(index)
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("../../outside", "x")
    with pytest.raises(PunaError, match="unsafe path"):
        assets.fetch_asset(declare(wheel))


def test_leftovers_of_a_killed_fetch_are_cleared(index: Path) -> None:
    asset = declare(make_wheel(index))
    left = assets.cache_folder() / "assets" / "little" / ".scratch-killed"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"x")
    assets.fetch_asset(asset)
    assert debris(assets.cache_folder()) == []


def _fetch(asset: Asset, results: "multiprocessing.Queue[str]") -> None:
    results.put(str(assets.fetch_asset(asset)))


def test_two_processes_that_want_the_same_asset_do_not_clash(index: Path) -> None:
    asset = declare(make_wheel(index))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=_fetch, args=(asset, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    paths = {results.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
    assert len(paths) == 1 and Path(paths.pop()).read_bytes() == CONTENT


def test_the_one_who_waits_says_so_and_does_not_fetch(index: Path, capfd: pytest.CaptureFixture[str]) -> None:
    asset = declare(make_wheel(index))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with assets.locked(assets.cache_folder() / "assets" / "little"):
        worker = context.Process(target=_fetch, args=(asset, results))
        worker.start()
        worker.join(timeout=1)
        assert worker.is_alive() and results.empty()
    assert Path(results.get(timeout=60)).read_bytes() == CONTENT
    worker.join()


def test_a_cache_that_cannot_be_written_is_told(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("PUNA_CACHE", str(tmp_path / "file"))
    with pytest.raises(PunaError, match=r"(?s)cannot be kept in the cache.*PUNA_CACHE"):
        assets.fetch_asset(declare(make_wheel(index)))


def test_a_python_without_pip_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(PunaError, match="ensurepip"):
        registries.download_wheel("a", "1", tmp_path / "scratch", size=1)


def make_deb(folder: Path, tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        "Package: help-xx\nVersion: 1:2.3-4\nArchitecture: all\nMaintainer: A <a@b.org>\nDescription: h\n"
    )
    (root / "usr/share/help/xx").mkdir(parents=True)
    (root / "usr/share/help/xx/page.html").write_text("hallo")
    file = folder / "help-xx_1%3a2.3-4_all.deb"
    subprocess.run(["dpkg-deb", "--build", str(root), str(file)], check=True, capture_output=True)
    return file


@pytest.fixture
def debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asset:
    """A Debian asset, and an apt-get that serves it once its lists are private and new."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("this machine has no dpkg-deb")
    monkeypatch.setenv("PUNA_CACHE", str(tmp_path / "cache"))
    deb = make_deb(tmp_path, tmp_path)
    fake = tmp_path / "bin" / "apt-get"
    fake.parent.mkdir()
    fake.write_text(
        "#!/bin/sh\n"
        f'echo "$@" >> {tmp_path}/calls\n'
        'case "$*" in\n'
        f"  -c*download*) cp {deb} . ;;\n"
        f"  -c*update) cp $2 {tmp_path}/apt.conf ;;\n"
        '  *) echo "E: Unable to locate package" >&2; exit 100 ;;\n'
        "esac\n"
    )
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    source = {
        "registry": "debian",
        "package": "help-xx",
        "version": "as served",
        "bytes": deb.stat().st_size,
        "folder": "usr/share/help/xx",
    }
    return Asset(**{"name": "help", "what": "help", "licence": "MPL-2.0", "from": source})


def test_a_debian_package_is_unpacked_after_private_lists_were_fetched(
    debian: Asset, tmp_path: Path, unplugged: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    path = assets.fetch_asset(debian)
    assert path.is_dir() and (path / "page.html").read_text() == "hallo"
    assert assets.recorded_version(debian) == "1:2.3-4"
    digest = assets.recorded_sha256(debian)
    assert digest is not None and len(digest) == 64
    assert digest in capsys.readouterr().err.replace("\n", "")
    calls = (tmp_path / "calls").read_text().splitlines()
    assert (
        calls[0] == "download help-xx"
        and calls[1].endswith("update")
        and calls[2].endswith("download help-xx")
    )
    settings = (tmp_path / "apt.conf").read_text()
    assert "#clear Acquire::Languages" in settings and str(tmp_path / "cache") in settings
    unplugged()
    assert assets.fetch_asset(debian) == path


def test_a_folder_with_a_changed_or_lost_file_is_fetched_again(debian: Asset) -> None:
    page = assets.fetch_asset(debian) / "page.html"
    page.write_text("changed")
    assert assets.local(debian) is None
    assert (assets.fetch_asset(debian) / "page.html").read_text() == "hallo"
    page.unlink()
    assert (assets.fetch_asset(debian) / "page.html").read_text() == "hallo"


def test_a_debian_package_that_would_unpack_to_too_much_is_refused(debian: Asset, tmp_path: Path) -> None:
    deb = next(tmp_path.glob("*.deb"))
    with pytest.raises(PunaError, match="unpacks to more than it may"):
        registries.unpack_deb(deb, tmp_path / "unpacked", limit=2)
    assert not (tmp_path / "unpacked").exists()
    deb.write_bytes(b"no package")
    with pytest.raises(PunaError, match="not a readable Debian package"):
        registries.unpack_deb(deb, tmp_path / "unpacked", limit=2)


def test_a_package_without_the_declared_folder_is_told(debian: Asset) -> None:
    source = debian.source.model_copy(update={"folder": "usr/share/none"})
    with pytest.raises(PunaError, match="no folder usr/share/none"):
        assets.fetch_asset(debian.model_copy(update={"source": source}))


def test_a_machine_without_apt_is_told_what_it_lacks(
    debian: Asset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(PunaError, match=r"(?s)no apt-get.*Debian or Ubuntu"):
        assets.fetch_asset(debian)


def test_the_catalogue_that_comes_along_is_sound() -> None:
    assert assets.names() == sorted(assets.names()) and len(assets.names()) > 10
    model = assets.describe("smollm2-135m-instruct")
    assert model.licence == "Apache-2.0" and model.size == 92_871_040 and model.version == "0.1.2"
    assert assets.is_asset("django") and not assets.is_asset("meta-llama/Llama-2-7b")
    with pytest.raises(PunaError, match="did you mean 'smollm2-135m-instruct'"):
        assets.describe("smollm2-135m")
    with pytest.raises(PunaError, match="unknown asset"):
        assets.fetch("no such thing")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "not a readable list"),
        ("[a, b]", "mapping"),
        ("a: {what: x, licence: y}", "'from' is missing"),
        ("a: {what: x, licence: y, from: {registry: cargo}}", "cargo"),
        (
            "a: {what: x, licence: y, from: {registry: pypi, package: p, version: v, sha256: a, bytes: 1}}",
            "sha256",
        ),
    ],
)
def test_a_broken_catalogue_is_told(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "assets.yaml"
    file.write_text(text)
    with pytest.raises(PunaError, match=words):
        assets.load_catalogue(file)


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PUNA_CACHE", str(tmp_path))
    assert assets.cache_folder() == tmp_path
    monkeypatch.delenv("PUNA_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert assets.cache_folder() == tmp_path / ".cache" / "puna"


BACKEND = """
import io, os, tarfile, pathlib
pathlib.Path(os.environ["BUILT"]).write_text("the build ran")
def prepare_metadata_for_build_wheel(directory, config_settings=None):
    folder = pathlib.Path(directory, "littlesource-1.0.dist-info")
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: littlesource\\nVersion: 1.0\\n")
    return folder.name
def build_wheel(directory, config_settings=None, metadata_directory=None):
    raise RuntimeError("nothing asks for a wheel")
"""


def make_source(folder: Path) -> Path:
    """A source archive with a build of its own that needs no tools and leaves a mark."""
    project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    project += '[project]\nname = "littlesource"\nversion = "1.0"\n'
    about = "Metadata-Version: 2.1\nName: littlesource\nVersion: 1.0\n"
    file = folder / "littlesource-1.0.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        for name, text in (
            ("PKG-INFO", about.encode()),
            ("pyproject.toml", project.encode()),
            ("backend.py", BACKEND.encode()),
            ("data.bin", CONTENT),
        ):
            entry = tarfile.TarInfo(f"littlesource-1.0/{name}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text))
    return file


def declare_source(file: Path, **changes: Any) -> Asset:
    source = {
        "registry": "pypi-source",
        "package": "littlesource",
        "version": "1.0",
        "sha256": sha(file.read_bytes()),
        "bytes": file.stat().st_size,
        "member": {"path": "littlesource-1.0/data.bin", "sha256": sha(CONTENT), "bytes": len(CONTENT)},
    }
    return Asset(**{"name": "source", "what": "data", "licence": "MIT", "from": {**source, **changes}})


def test_a_file_of_a_source_archive_is_fetched_and_checked(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUILT", str(tmp_path / "built"))
    asset = declare_source(make_source(index))
    path = assets.fetch_asset(asset)
    assert path.name == "data.bin" and path.read_bytes() == CONTENT
    assert assets.local(asset) == path and assets.recorded_sha256(asset) == sha(CONTENT)


def test_a_folder_of_a_source_archive_is_an_asset_too(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUILT", str(tmp_path / "built"))
    file = make_source(index)
    asset = declare_source(file, member=None, folder="littlesource-1.0", unpacked=100_000)
    path = assets.fetch_asset(asset)
    assert path.name == "littlesource-1.0" and (path / "data.bin").read_bytes() == CONTENT
    assert assets.local(asset) == path and assets.recorded_sha256(asset) == sha(file.read_bytes())
    (path / "data.bin").write_bytes(b"other")
    assert assets.local(asset) is None


def test_a_source_archive_names_a_member_or_a_folder() -> None:
    with pytest.raises(pydantic.ValidationError, match="give a member, or a folder"):
        SourceArchive(registry="pypi-source", package="p", version="1", sha256="0" * 64, bytes=1)


def test_another_source_archive_is_refused_before_its_build_runs(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUILT", str(tmp_path / "built"))
    with pytest.raises(PunaError, match="failed"):
        assets.fetch_asset(declare_source(make_source(index), sha256="0" * 64))
    assert not (tmp_path / "built").exists()
