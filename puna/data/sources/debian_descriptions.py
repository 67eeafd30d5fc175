"""Debian's package descriptions, translated by people, out of apt's own lists."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from puna.core import assets, registries
from puna.core.errors import PunaError
from puna.core.files import sha256_of
from puna.core.progress import Track
from puna.data.kinds import UNDETERMINED
from puna.data.sources.common import Item, Reading, SourceSettings, source

_LICENCE = "as each package; no explicit grant found"
_STUB = "<trans>"


class DebianDescriptionsSettings(SourceSettings):
    """Descriptions in one language, as this machine's apt sources serve them."""

    format: Literal["debian_descriptions"] = "debian_descriptions"
    language: str | None = None
    """Language of the descriptions."""
    original_language: str = "en"
    """Language they were translated from."""
    lists: str | None = None
    """A folder with apt's list files, in place of fetching them into the user's cache."""

    def default_name(self) -> str:
        """The format's name."""
        return "debian-descriptions"

    def files(self) -> list[Path]:
        """The list files of a folder that was given."""
        return [] if self.lists is None else sorted(Path(self.lists).glob("*_i18n_Translation-*"))


@source(DebianDescriptionsSettings, "documents", "sentence_pairs")
def read_debian_descriptions(settings: DebianDescriptionsSettings, reading: Reading) -> Iterator[Item]:
    """Descriptions: a package is a source document, a paragraph a fragment or a pair.

    Pairs have the same checksum of the original description and as many paragraphs on both sides.
    """
    language = settings.language or reading.language
    if language == UNDETERMINED:
        raise PunaError(
            "which language's descriptions are to be read?", where=settings.title, fix="set language"
        )
    lists = Path(settings.lists) if settings.lists else _fetched(language, settings.original_language)
    translated = _list_files(lists, language)
    originals = {stanza["md5"]: stanza for stanza in _stanzas(_list_files(lists, settings.original_language))}
    reading.facts.setdefault("licence", _LICENCE)
    reading.facts["sha256"] = {file.name: sha256_of(file) for file in translated}
    size = sum(file.stat().st_size for file in translated)
    with Track(f"reading {settings.title}", size, unit="bytes") as track:
        for stanza in _stanzas(translated, track):
            # Several packages may share a description, so the checksum is part of the name.
            name = f"{stanza['package']}:{stanza['md5'][:8]}"
            if reading.wants(name):
                yield from _items(name, stanza, originals.get(stanza["md5"]), settings, reading, language)


def _items(
    name: str,
    stanza: dict[str, str],
    original: dict[str, str] | None,
    settings: DebianDescriptionsSettings,
    reading: Reading,
    language: str,
) -> Iterator[Item]:
    ours = _paragraphs(stanza["text"])
    theirs = _paragraphs(original["text"]) if original else []
    aligned = len(ours) == len(theirs)
    for index, text in enumerate(ours):
        if not text or _STUB in text:
            reading.tally.drop("untranslated")
        elif aligned and theirs[index] == text:
            reading.tally.drop("identical to the original")
        elif reading.kind == "documents":
            reading.tally.keep()
            yield Item(name, {"text": text, "language": language}, index, fragment=True)
        elif not original:
            reading.tally.drop("no original")
        elif not aligned or not theirs[index]:
            reading.tally.drop("paragraphs do not match")
        else:
            reading.tally.keep()
            pair = {"source_text": theirs[index], "target_text": text}
            tags = {"source_language": settings.original_language, "target_language": language}
            yield Item(name, {**pair, **tags}, index, fragment=True)


def _paragraphs(text: str) -> list[str]:
    """The synopsis and the paragraphs of a description, each on one line."""
    synopsis, _, rest = text.partition("\n")
    blocks = rest.split("\n.\n") if rest else []
    return [" ".join(block.split()) for block in (synopsis, *blocks)]


def _stanzas(files: list[Path], track: Track | None = None) -> Iterator[dict[str, str]]:
    """Package, checksum (``md5``) and text of each description in the list files."""
    for file in files:
        with file.open(encoding="utf-8", errors="replace") as lines:
            stanza: dict[str, str] = {}
            text: list[str] = []
            for number, line in enumerate(lines, start=1):
                if track is not None:
                    track.advance(len(line.encode()))
                if line.startswith(" "):
                    text.append(line[1:].rstrip("\n"))
                elif line.strip():
                    key, colon, value = line.rstrip("\n").partition(": ")
                    if not colon:
                        raise PunaError(
                            "not a list of descriptions", where=f"{file}:{number}", found=line.strip()[:80]
                        )
                    if key == "Package":
                        stanza["package"] = value
                    elif key == "Description-md5":
                        stanza["md5"] = value
                    elif key.startswith("Description-"):
                        text = [value]
                else:
                    yield from _finished(stanza, text)
                    stanza, text = {}, []
            yield from _finished(stanza, text)


def _finished(stanza: dict[str, str], text: list[str]) -> Iterator[dict[str, str]]:
    if {"package", "md5"} <= set(stanza) and text:
        yield {**stanza, "text": "\n".join(text)}


def _list_files(folder: Path, language: str) -> list[Path]:
    """The main archive's lists of descriptions in ``language``."""
    files = sorted(folder.glob(f"*_main_i18n_Translation-{language}"))
    if not files:
        there = sorted(
            {file.name.rpartition("Translation-")[2] for file in folder.glob("*_i18n_Translation-*")}
        )
        raise PunaError(
            f"apt's lists hold no descriptions in {language!r}",
            where=folder,
            found=", ".join(there) or "no list of descriptions",
            fix="Debian names languages as in nl, it, pt_BR, zh_CN",
        )
    return files


def _fetched(*languages: str) -> Path:
    """The folder of the lists in the user's cache; fetched once, then used offline."""
    folder = assets.cache_folder() / "debian-descriptions" / "-".join(languages)
    if folder.is_dir() and any(folder.iterdir()):
        return folder
    with contextlib.ExitStack() as stack:
        stack.enter_context(assets.locked(folder.parent))
        if folder.is_dir() and any(folder.iterdir()):
            return folder
        scratch = Path(
            stack.enter_context(tempfile.TemporaryDirectory(dir=folder.parent, prefix=".scratch-"))
        )
        registries.update_apt_lists(scratch, languages)
        from puna.core.files import folder_aside

        with folder_aside(folder) as aside:
            for language in languages:
                for file in _list_files(scratch / "lists", language):
                    shutil.copyfile(file, aside / file.name)
    return folder
