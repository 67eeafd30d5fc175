"""Web archives out of packages: real HTML pages of documentation, written as a crawler writes them.

Each page is a response record of a gzipped WARC file (ISO 28500), packed alone so that readers can seek.
No page comes from the web: the host in its URL is the asset's name below ``.example``.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Iterator
from pathlib import Path

import pydantic

from puna.core import assets
from puna.core.errors import PunaError
from puna.core.files import write_aside
from puna.core.stage import Parameters

_DATE = "2000-01-01T00:00:00Z"  # one for all, so that the same pages make the same file
_SUFFIXES = (".html", ".htm", ".xhtml")


class PageSource(Parameters):
    """Pages of one asset."""

    asset: str
    """The asset's name; it is a folder with HTML files."""
    under: str = ""
    """Folder below it, such as text/scalc."""
    without: tuple[str, ...] = ()
    """Folders below that one which are left out."""
    limit: pydantic.PositiveInt | None = None
    """Pages at most, the first by name; null takes all."""
    times: pydantic.PositiveInt = 1
    """How often each page is written, under another URL each time: planted copies."""


class WebArchiveParameters(Parameters):
    """Parameters of the stage ``web_archive``."""

    pages: list[PageSource] = pydantic.Field(min_length=1)
    """Where pages come from, in the order in which they are written."""


def write_web_archive(parameters: WebArchiveParameters, file: Path) -> dict[str, float]:
    """Write the pages; returns how many there are and their bytes."""
    count = size = 0
    with write_aside(file) as aside, aside.open("wb") as stream:
        for source in parameters.pages:
            for url, content in _pages(source):
                stream.write(gzip.compress(_record(url, content), mtime=0))
                count, size = count + 1, size + len(content)
    return {"pages": float(count), "bytes": float(size)}


def _pages(source: PageSource) -> Iterator[tuple[str, bytes]]:
    root = assets.fetch(source.asset)
    folder = root / source.under
    left_out = [folder / name for name in source.without]
    absent = [path for path in left_out if not path.is_dir()]
    if absent:
        raise PunaError("a folder to leave out is not there", where=folder, found=absent[0].name)
    pages = (path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    kept = (path for path in pages if not any(path.is_relative_to(other) for other in left_out))
    files = sorted(kept)[: source.limit]
    if not files:
        raise PunaError("no HTML page lies there", where=folder, expected="files such as index.html")
    for number in range(source.times):
        host = f"{source.asset}.example" if number == 0 else f"copy{number}.{source.asset}.example"
        for path in files:
            yield f"https://{host}/{path.relative_to(root).as_posix()}", path.read_bytes()


def _record(url: str, content: bytes) -> bytes:
    answer = (
        f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {len(content)}\r\n\r\n".encode()
        + content
    )
    identity = hashlib.sha256(url.encode()).hexdigest()
    uuid = "-".join((identity[:8], identity[8:12], identity[12:16], identity[16:20], identity[20:32]))
    head = {
        "WARC-Type": "response",
        "WARC-Record-ID": f"<urn:uuid:{uuid}>",
        "WARC-Date": _DATE,
        "WARC-Target-URI": url,
        "Content-Type": "application/http; msgtype=response",
        "Content-Length": str(len(answer)),
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
    return f"WARC/1.1\r\n{lines}\r\n".encode() + answer + b"\r\n\r\n"
