"""Readers of raw pages: WARC and WET files, HTML and PDF files, and OCR's JSON."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from puna.core.archives import UNREADABLE
from puna.core.errors import PunaError
from puna.data.curate.readers import file_parts, text_record
from puna.data.curate.records import Limits, Part, Record, opened, reader, too_large
from puna.data.sources.files import FileSettings

_MEDIA = {"text/html": "html", "application/xhtml+xml": "html", "application/pdf": "pdf"}


class WarcSettings(FileSettings):
    """WARC files of pages as they were served, and WET files of text extracted from them; plain or packed."""

    format: Literal["warc"] = "warc"


class HtmlSettings(FileSettings):
    """HTML files, a page each."""

    format: Literal["html"] = "html"


class PdfSettings(FileSettings):
    """PDF files, a document each."""

    format: Literal["pdf"] = "pdf"


class ArchiveSettings(FileSettings):
    """Archives of a project's sources (.zip, .tar, .tar.gz), a document each."""

    format: Literal["archive"] = "archive"


class OcrSettings(FileSettings):
    """What an OCR service wrote about scanned pages: a JSON file each, or zip files of them.

    The JSON is kept beside the document, whose text is empty until an operator makes it of the boxes.
    """

    format: Literal["ocr"] = "ocr"


def missing(package: str) -> PunaError:
    """The error for a library of the extra ``curate`` that is not installed."""
    return PunaError(f"this needs {package}", fix="pip install 'puna[curate]'")


@reader(WarcSettings, file_parts)
def read_warc(settings: WarcSettings, part: Part, limits: Limits) -> Iterator[Record]:
    """Pages that were answered with HTML or PDF, and texts of WET files; other records are none."""
    try:
        from fastwarc.warc import ArchiveIterator, WarcRecordType
    except ImportError:
        raise missing("fastwarc") from None
    wanted = WarcRecordType.response | WarcRecordType.conversion | WarcRecordType.resource
    number = 0
    try:
        pages = ArchiveIterator(part.file, record_types=wanted, parse_http=True, fsspec_args=False)
        for page in pages:
            number += 1
            record = _warc_record(settings, f"{part.name}:{number}", page, limits)
            if record is not None:
                yield record
    except (OSError, EOFError, ValueError, RuntimeError) as error:
        yield Record(
            f"{part.name}:{number + 1}", failed=f"the rest of the file cannot be read: {error}"[:200]
        )


def _warc_record(settings: WarcSettings, key: str, page: Any, limits: Limits) -> Record | None:
    headers = page.headers
    url = str(headers.get("WARC-Target-URI", "") or "")
    text = headers.get("WARC-Type") == "conversion"
    kind = str((page.http_content_type if page.is_http else headers.get("Content-Type")) or "")
    media = _MEDIA.get(kind.partition(";")[0].strip().lower())
    if media is None and kind.startswith("text/plain"):
        text = True
    if media is None and not text:
        return None
    content = page.reader.read(limits.document_bytes + 1)
    if len(content) > limits.document_bytes:
        return Record(key, url=url, failed=too_large(limits))
    if text:
        record = text_record(settings, key, content, limits)
        record.url = url
        return record
    return Record(key, content=content, media=media or "", url=url, language=settings.language or "")


@reader(HtmlSettings, file_parts)
def read_html(settings: HtmlSettings, part: Part, limits: Limits) -> Iterator[Record]:
    """HTML files as they are."""
    yield _page(settings, part, limits, "html")


@reader(PdfSettings, file_parts)
def read_pdf(settings: PdfSettings, part: Part, limits: Limits) -> Iterator[Record]:
    """PDF files as they are."""
    yield _page(settings, part, limits, "pdf")


@reader(ArchiveSettings, file_parts)
def read_archive(settings: ArchiveSettings, part: Part, limits: Limits) -> Iterator[Record]:
    """Archives, unpacked no further than their outermost packing."""
    yield _page(settings, part, limits, "archive")


def _page(settings: FileSettings, part: Part, limits: Limits, media: str) -> Record:
    with opened(part.file, limits) as stream:
        content = stream.read(limits.document_bytes + 1)
    if len(content) > limits.document_bytes:
        return Record(part.name, failed=too_large(limits))
    return Record(part.name, content=content, media=media, language=settings.language or "")


@reader(OcrSettings, file_parts)
def read_ocr(settings: OcrSettings, part: Part, limits: Limits) -> Iterator[Record]:
    """JSON files, or those in a zip file."""
    if Path(part.file).suffix != ".zip":
        with opened(part.file, limits) as stream:
            yield _boxes(settings, part.name, stream.read(limits.document_bytes + 1), limits)
        return
    try:
        with zipfile.ZipFile(part.file) as archive:
            for name in sorted(archive.namelist()):
                if name.endswith(".json"):
                    with archive.open(name) as stream:
                        content = stream.read(limits.document_bytes + 1)
                    yield _boxes(settings, f"{part.name}/{name}", content, limits)
    except UNREADABLE as error:
        yield Record(part.name, failed=f"the archive cannot be read: {error}")


def _boxes(settings: OcrSettings, key: str, content: bytes, limits: Limits) -> Record:
    if len(content) > limits.document_bytes:
        return Record(key, failed=too_large(limits))
    try:
        meta = content.decode("utf-8-sig")
        json.loads(meta)
        meta.encode("utf-8")
    except (ValueError, RecursionError) as error:
        return Record(key, failed=f"not valid JSON: {error}"[:200])
    return Record(key, "", meta=meta, language=settings.language or "")
