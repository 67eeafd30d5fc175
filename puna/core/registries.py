"""Fetching package files through the registries' own clients, ``pip``, ``npm`` and ``apt-get``.

The clients know the machine's proxies, certificates, mirrors and passwords, and pip takes a dropped
connection up where it broke. What is added here is progress, a bound on the size, and plain errors.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from puna.core.errors import PunaError
from puna.core.progress import Track

_SECONDS_BETWEEN_LOOKS = 0.2
# Only to scale the progress: what Debian bookworm's lists weigh.
_BYTES_OF_LISTS = 60_000_000
_BYTES_PER_LANGUAGE = 30_000_000
_BYTES_OF_BUILDING = 8_000_000  # a build tool that pip fetches for an archive may be as large
_DOWNLOAD = [sys.executable, "-m", "pip", "download", "--no-deps", "--ignore-requires-python"]
_DOWNLOAD += ["--no-cache-dir", "--no-input", "--progress-bar", "off", "--disable-pip-version-check"]


def download_wheel(package: str, version: str, scratch: Path, *, size: int) -> Path:
    """Download the wheel of ``package`` ``version`` into ``scratch``; returns the file.

    ``size`` is the expected size in bytes: it scales the progress and stops a larger download.
    Only wheels are accepted, since fetching a source archive runs its build: :func:`download_source`.
    """
    _need_pip()
    ready = scratch / "ready"
    command = [*_DOWNLOAD, "--only-binary", ":all:", "--dest", str(ready), f"{package}=={version}"]
    _run(command, scratch, f"fetching {package} {version}", size, watched=scratch, bound=size)
    return _only_file(ready, f"{package}=={version}")


def download_source(package: str, version: str, scratch: Path, *, sha256: str, size: int) -> Path:
    """Download the source archive of ``package`` ``version`` into ``scratch``; returns the file.

    For packages that have no wheel. pip runs such an archive's build to learn its metadata, and that
    only after the archive was found to be the one with ``sha256``.
    """
    _need_pip()
    scratch.mkdir(parents=True, exist_ok=True)
    ready, wanted = scratch / "ready", scratch / "requirements.txt"
    wanted.write_text(f"{package}=={version} --hash=sha256:{sha256}\n", encoding="utf-8")
    command = [*_DOWNLOAD, "--no-binary", package, "--require-hashes", "--dest", str(ready)]
    command += ["--requirement", str(wanted)]
    bound = 2 * size + _BYTES_OF_BUILDING  # pip unpacks the archive beside it
    _run(command, scratch, f"fetching {package} {version}", size, watched=scratch, bound=bound)
    return _only_file(ready, f"{package}=={version}")


def download_npm(package: str, version: str, scratch: Path, *, size: int) -> Path:
    """Download the archive of an npm package into ``scratch``; returns the file. None of its scripts run.

    ``size`` (bytes) scales the progress; twice as much is an error.
    """
    if shutil.which("npm") is None:
        raise PunaError(
            "this machine has no npm, which fetches this package",
            found=f"{package} {version}",
            fix="install Node.js with npm, or leave out what comes from it",
        )
    ready = scratch / "ready"
    ready.mkdir(parents=True, exist_ok=True)
    command = ["npm", "pack", "--ignore-scripts", "--cache", str(scratch / "npm"), f"{package}@{version}"]
    _run(command, scratch, f"fetching {package} {version}", size, watched=ready, bound=2 * size, folder=ready)
    return _only_file(ready, f"{package}@{version}")


def download_deb(package: str, scratch: Path, *, size: int, bound: int) -> Path:
    """Download the Debian package ``package`` as this machine's sources serve it; returns the file.

    ``size`` (bytes) scales the progress; more than ``bound`` bytes is an error.
    """
    _need("apt-get", "dpkg-deb")
    ready = scratch / "ready"
    ready.mkdir(parents=True, exist_ok=True)

    def download(*options: str) -> None:
        command = ["apt-get", *options, "download", package]
        _run(command, scratch, f"fetching {package}", size, watched=ready, bound=bound, folder=ready)

    try:
        download()
    except PunaError:
        # Fresh machines have no package lists, or old ones; private lists need no root.
        download(*update_apt_lists(scratch / "apt", ()))
    return _only_file(ready, package)


def unpack_deb(file: Path, folder: Path, *, limit: int) -> None:
    """Unpack the files of a Debian package below ``folder``; over ``limit`` bytes is an error.

    The bound is checked on the archive's listing before anything is written.
    """
    _need("dpkg-deb")
    listing = subprocess.run(["dpkg-deb", "--contents", str(file)], capture_output=True, text=True)
    if listing.returncode:
        raise PunaError("not a readable Debian package", where=file, found=listing.stderr.strip())
    total = sum(int(line.split()[2]) for line in listing.stdout.splitlines() if line.startswith("-"))
    if total > limit:
        raise PunaError(
            "the package unpacks to more than it may",
            where=file,
            found=f"{total:,} bytes",
            expected=f"at most {limit:,} bytes",
        )
    done = subprocess.run(["dpkg-deb", "--extract", str(file), str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise PunaError("the Debian package cannot be unpacked", where=file, found=done.stderr.strip())


def update_apt_lists(folder: Path, languages: Sequence[str]) -> list[str]:
    """Fetch package lists with the descriptions in ``languages``; nothing outside ``folder`` changes.

    Returns the options that make ``apt-get`` use them; the list files lie in ``folder/lists``.
    """
    _need("apt-get")
    (folder / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    (folder / "cache" / "archives" / "partial").mkdir(parents=True, exist_ok=True)
    quoted = " ".join(f'"{language}";' for language in languages) or '"none";'
    # The machine may have switched translations off in its own settings, so that list is cleared first.
    (folder / "apt.conf").write_text(
        "#clear Acquire::Languages;\n"
        f"Acquire::Languages {{ {quoted} }};\n"
        f'Dir::State::Lists "{(folder / "lists").absolute()}";\n'
        f'Dir::Cache "{(folder / "cache").absolute()}";\n'
        'Acquire::GzipIndexes "false";\n'
        'APT::Update::Post-Invoke-Success "";\n',
        encoding="utf-8",
    )
    options = ["-c", str(folder / "apt.conf")]
    guess = _BYTES_OF_LISTS + _BYTES_PER_LANGUAGE * len(languages)
    _run(["apt-get", *options, "update"], folder, "fetching Debian package lists", guess, watched=folder)
    return options


def _need_pip() -> None:
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode:
        raise PunaError(
            "this Python has no pip, which fetches packages",
            where=sys.executable,
            fix="install it: python -m ensurepip",
        )


def _need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            raise PunaError(
                f"this machine has no {program}, which fetches and unpacks Debian packages",
                fix="use Debian or Ubuntu (packages apt and dpkg), or leave out the sources from Debian",
            )


def _run(
    command: list[str],
    scratch: Path,
    what: str,
    size: int,
    *,
    watched: Path,
    bound: int | None = None,
    folder: Path | None = None,
) -> None:
    """Run a client with its temporary files below ``scratch``; show progress by what grows in ``watched``."""
    scratch.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "TMPDIR": str(scratch.absolute()), "LC_ALL": "C.UTF-8"}
    log = scratch / "client.log"
    with log.open("wb") as output, Track(what, size, unit="bytes") as track:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, cwd=folder
        )
        try:
            seen = 0
            while process.poll() is None:
                time.sleep(_SECONDS_BETWEEN_LOOKS)
                sizes = _sizes(watched)
                now = max(min(sum(sizes), size), seen)
                track.advance(now - seen)
                seen = now
                if bound is not None and max(sizes, default=0) > bound:
                    raise PunaError(
                        f"{what}: the download is larger than declared",
                        found=f"over {bound:,} bytes",
                        expected=f"at most {bound:,} bytes",
                    )
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode:
        said = log.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in said if line.lower().startswith(("error", "e:", "npm err"))] or said
        raise PunaError(
            f"{what} failed",
            where=command[0] if command[0] in ("apt-get", "npm") else "pip",
            found="; ".join(errors[-3:]) or f"exit status {process.returncode}",
            fix="check the network and the client's settings (proxy, certificate, index), then try again",
        )


def _sizes(folder: Path) -> list[int]:
    """Sizes in bytes of the files below ``folder``; files may vanish meanwhile."""
    sizes = []
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                sizes.append(os.stat(os.path.join(root, name)).st_size)
    return sizes


def _only_file(folder: Path, what: str) -> Path:
    files = [file for file in folder.iterdir() if file.is_file()] if folder.exists() else []
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "nothing"
        raise PunaError(f"the client did not leave one file for {what}", where=folder, found=names)
    return files[0]
