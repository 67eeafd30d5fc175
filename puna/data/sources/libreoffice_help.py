"""LibreOffice's help: one HTML page per topic, the same paragraph ids in every language."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pydantic

from puna.core.errors import PunaError
from puna.core.progress import Track
from puna.data.sources.common import (
    AssetName,
    Item,
    PlacedSettings,
    Reading,
    asset_or_path,
    source,
)

_BLOCK = re.compile(
    r'<(?P<tag>p|h[1-6])\b[^>]*\bid="(?P<id>(?:par|hd)_id\w+)"[^>]*>(?P<inside>.*?)</(?P=tag)\s*>', re.DOTALL
)
_TOKEN = re.compile(r"<[^>]*>|[^<]+|<")
_TAG = re.compile(r"<(?P<slash>/?)(?P<name>[A-Za-z][A-Za-z0-9]*)")
_HIDDEN = re.compile(r"\shidden\b")
_DEFAULT = re.compile(r'\sid="default')


class LibreofficeHelpSettings(PlacedSettings):
    """The help of one language, a folder, and for pairs also of the original one."""

    format: Literal["libreoffice_help"] = "libreoffice_help"
    original_asset: AssetName | None = None
    """The asset in the original language: needed for pairs; for documents it shows what is untranslated."""
    original_path: str | None = None
    """The folder in the original language, in place of an asset."""
    language: str | None = None
    """Language tag of the help."""
    original_language: str = "en"
    """Language tag of the original."""

    @pydantic.model_validator(mode="after")
    def _one_original(self) -> LibreofficeHelpSettings:
        if self.original_asset is not None and self.original_path is not None:
            raise ValueError("give original_asset or original_path, not both")
        return self

    def default_name(self) -> str:
        """The asset or the folder's name."""
        return self.asset or Path(self.path or "").name

    def files(self) -> list[Path]:
        """The pages of folders that are not assets."""
        folders = [folder for folder in (self.path, self.original_path) if folder is not None]
        return [page for folder in folders for page in sorted(Path(folder).rglob("*.html"))]


@source(LibreofficeHelpSettings, "documents", "sentence_pairs")
def read_libreoffice_help(settings: LibreofficeHelpSettings, reading: Reading) -> Iterator[Item]:
    """Help pages: a page is a source document, a paragraph a fragment, or a pair with the same id."""
    original = _original_folder(settings, reading)
    if original is None and reading.kind == "sentence_pairs":
        raise PunaError(
            "pairs need the help in the original language too", where=settings.title, fix="set original_asset"
        )
    folder = asset_or_path(settings.asset, settings.path, reading)
    pages = sorted(folder.rglob("*.html"))
    if not pages:
        raise PunaError("no help page in the folder", where=folder)
    language = settings.language or reading.language
    reading.facts["files"] = len(pages)
    with Track(f"reading {settings.title}", len(pages), unit="pages") as track:
        for page in pages:
            name = page.relative_to(folder).as_posix()
            if reading.wants(name):
                originals = None if original is None else _paragraphs_or_none(original / name)
                yield from _page(page, name, originals, settings, reading, language)
            track.advance()


def _original_folder(settings: LibreofficeHelpSettings, reading: Reading) -> Path | None:
    if settings.original_asset is None and settings.original_path is None:
        return None
    told = Reading(kind=reading.kind, tally=reading.tally)
    folder = asset_or_path(settings.original_asset, settings.original_path, told)
    reading.facts["original"] = told.facts
    return folder


def _page(
    page: Path,
    name: str,
    originals: dict[str, str] | None,
    settings: LibreofficeHelpSettings,
    reading: Reading,
    language: str,
) -> Iterator[Item]:
    try:
        found = paragraphs(page.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        reading.bad("the page is not UTF-8", where=name, found=error)
        return
    for index, (key, text) in enumerate(found.items()):
        original = None if originals is None else originals.get(key)
        if original is None and reading.kind == "sentence_pairs":
            reading.tally.drop("no original")
        elif original is not None and _letters(original) == _letters(text):
            reading.tally.drop("identical to the original")
        else:
            reading.tally.keep()
            row = {"text": text, "language": language}
            if original is not None and reading.kind == "sentence_pairs":
                row = {
                    "source_text": original,
                    "target_text": text,
                    "source_language": settings.original_language,
                    "target_language": language,
                }
            yield Item(name, row, index, fragment=True)


def _letters(text: str) -> str:
    return re.sub(r"\W+", "", text)


def _paragraphs_or_none(page: Path) -> dict[str, str] | None:
    return paragraphs(page.read_text(encoding="utf-8", errors="replace")) if page.is_file() else {}


def paragraphs(page: str) -> dict[str, str]:
    """Text of each paragraph and heading of a help page by its id, in order; empty ones are left out.

    Of a phrase with variants for systems or modules, which the page's script shows or hides, the
    default variant is taken.
    """
    found: dict[str, str] = {}
    for match in _BLOCK.finditer(page):
        text = " ".join(_visible(match["inside"]).split())
        if text:
            found.setdefault(match["id"], text)
    return found


def _visible(markup: str) -> str:
    """The text of ``markup`` without hidden elements, but with hidden default variants."""
    pieces = []
    hidden = ""  # name of the hidden element that is being passed over
    depth = 0
    for token in _TOKEN.findall(markup):
        tag = _TAG.match(token)
        if tag is None:
            if not hidden:
                pieces.append(html.unescape(token))
            continue
        closes, name = bool(tag["slash"]), tag["name"].lower()
        if hidden:
            depth += (-1 if closes else 1) if name == hidden else 0
            hidden = hidden if depth else ""
        elif name == "br":
            pieces.append(" ")
        elif not closes and _HIDDEN.search(token) and not _DEFAULT.search(token):
            hidden, depth = name, 1
    return "".join(pieces)
