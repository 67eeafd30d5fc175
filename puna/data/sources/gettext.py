"""Gettext catalogues (.po, .mo) in wheels, folders and installed packages: text that people translated."""

from __future__ import annotations

import gettext
import importlib.util
import re
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import pydantic

from puna.core import archives
from puna.core.errors import PunaError
from puna.core.progress import Track, say
from puna.data.kinds import UNDETERMINED, BadRowError
from puna.data.sources.common import (
    Item,
    PlacedSettings,
    Reading,
    asset_or_path,
    source,
)

_LARGEST_CATALOGUE = 64 << 20  # bytes
# Zope's catalogues name messages by symbols and keep the English in a comment.
_DEFAULT_COMMENT = re.compile(r'Default:\s*"(.*)"', re.DOTALL)
_SYMBOL = re.compile(r"[a-z0-9]+(?:[_.\-:][a-z0-9]+)+")


class GettextSettings(PlacedSettings):
    """Catalogues of one language in a wheel, a folder, one file, or an installed package.

    The English (original) side is the msgid, the other the msgstr."""

    format: Literal["gettext"] = "gettext"
    installed: str | None = None
    """Name of an installed Python package."""
    language: str | None = None
    """Whose catalogues are read. Where a package has none of exactly that name, those of a region are."""
    original_language: str = "en"
    """Language tag of the msgid side."""
    side: Literal["translation", "original"] = "translation"
    """Which side becomes documents; pairs have both."""
    strip_accelerator: str | None = pydantic.Field(default=None, min_length=1, max_length=1)
    """The character that marks the access key in a label, such as "&" or "_", taken out if given here."""

    def places(self) -> dict[str, str | None]:
        """An installed package is a third place."""
        return {**super().places(), "installed": self.installed}

    def default_name(self) -> str:
        """The asset, the package, or the file's name up to its first dash or dot."""
        return self.asset or self.installed or re.split(r"[-.]", Path(self.path or "").name)[0]

    def files(self) -> list[Path]:
        """The wheel or file, or all catalogues of the folder or installed package."""
        if self.installed is not None:
            return [file for _, file in _installed_files(self.installed)]
        if self.path is None:
            return []
        path = Path(self.path)
        return sorted(path.rglob("*.[pm]o")) if path.is_dir() else [path]


@dataclass(frozen=True)
class _Catalogue:
    name: str
    language: str
    read: Callable[[], bytes]


@source(GettextSettings, "documents", "sentence_pairs")
def read_gettext(settings: GettextSettings, reading: Reading) -> Iterator[Item]:
    """Catalogues: a catalogue is a source document, a message a fragment or a pair.

    Untranslated, fuzzy and obsolete messages, and those equal to their original, are dropped and
    counted; markup and placeholders stay as they are.
    """
    language = settings.language or reading.language
    if language == UNDETERMINED:
        raise PunaError(
            "which language's catalogues are to be read?", where=settings.title, fix="set language"
        )
    if importlib.util.find_spec("polib") is None:
        raise PunaError("gettext catalogues need polib", fix="pip install puna[data]")
    with _catalogues(settings, reading, language) as found:
        chosen = _of_language(found, language, where=settings.title)
        reading.facts["files"] = len(chosen)
        with Track(f"reading {settings.title}", len(chosen), unit="catalogues") as track:
            for catalogue in chosen:
                if reading.wants(catalogue.name):
                    yield from _messages(catalogue, settings, reading, language)
                track.advance()


def _messages(
    catalogue: _Catalogue, settings: GettextSettings, reading: Reading, language: str
) -> Iterator[Item]:
    try:
        entries, headers = _parse(catalogue)
    except BadRowError as error:
        reading.bad_row(error, where=catalogue.name)
        return
    singular = _plural_rule(headers, catalogue.name)
    index = 0
    for entry in entries:
        for original, translation in _sides(entry, singular):
            reason = _unusable(entry, original, translation)
            if reason is None and reading.kind == "sentence_pairs" and _SYMBOL.fullmatch(original):
                reason = "original is a symbol"
            if reason is not None:
                reading.tally.drop(reason)
                continue
            reading.tally.keep()
            row = _row(settings, reading.kind, original, translation, language)
            yield Item(catalogue.name, row, index, fragment=True)
            index += 1


def _row(
    settings: GettextSettings, kind: str, original: str, translation: str, language: str
) -> dict[str, Any]:
    if settings.strip_accelerator is not None:
        original = strip_accelerator(original, settings.strip_accelerator)
        translation = strip_accelerator(translation, settings.strip_accelerator)
    if kind == "sentence_pairs":
        return {
            "source_text": original,
            "target_text": translation,
            "source_language": settings.original_language,
            "target_language": language,
        }
    if settings.side == "original":
        return {"text": original, "language": settings.original_language}
    return {"text": translation, "language": language}


def strip_accelerator(text: str, mark: str) -> str:
    """``text`` without the first ``mark`` before a letter at a word's start; entities (&amp;) stay."""
    pattern = rf"(?<![\w{re.escape(mark)}]){re.escape(mark)}(?=\w)(?!\w+;)"
    return re.sub(pattern, "", text, count=1)


def _unusable(entry: Any, original: str, translation: str) -> str | None:
    if entry.obsolete:
        return "obsolete"
    if "fuzzy" in entry.flags:
        return "fuzzy"
    if not translation.strip():
        return "untranslated"
    if not original.strip():
        return "no original"
    if translation == original:
        return "identical to the original"
    return None


def _sides(entry: Any, singular: int) -> Iterator[tuple[str, str]]:
    """(original, translation) of an entry; of one with plural forms a pair for each form.

    The form for one goes with msgid, all others with msgid_plural; a language with a single form
    has it for msgid_plural.
    """
    if not entry.msgid_plural:
        comment = _DEFAULT_COMMENT.search(entry.comment or "")
        yield (comment[1].replace('\\"', '"') if comment else entry.msgid), entry.msgstr
        return
    forms: dict[int, str] = entry.msgstr_plural
    for number, form in sorted(forms.items()):
        one = number == singular and len(forms) > 1
        yield (entry.msgid if one else entry.msgid_plural), form


def _plural_rule(headers: dict[str, str], where: str) -> int:
    """The number of the plural form for n = 1, out of the catalogue's Plural-Forms."""
    match = re.search(r"plural\s*=\s*([^;]+)", headers.get("Plural-Forms", ""))
    if match is None:
        return 0
    try:
        return int(gettext.c2py(match[1])(1))
    except ValueError as error:
        say(f"{where}: Plural-Forms cannot be read ({error}); form 0 is taken for one")
        return 0


def _parse(catalogue: _Catalogue) -> tuple[list[Any], dict[str, str]]:
    """Entries and headers of a catalogue. polib needs a file: given text, it would cut at odd line ends."""
    import polib

    suffix = PurePosixPath(catalogue.name).suffix
    with tempfile.NamedTemporaryFile(suffix=suffix) as file:
        file.write(catalogue.read())
        file.flush()
        try:
            parsed = polib.mofile(file.name) if suffix == ".mo" else polib.pofile(file.name)
        except (OSError, ValueError, IndexError, LookupError, TypeError, struct.error) as error:
            told = str(error).replace(file.name, catalogue.name)
            raise BadRowError("the catalogue cannot be read", "(file)", told) from None
    return list(parsed), dict(parsed.metadata)


@contextmanager
def _catalogues(settings: GettextSettings, reading: Reading, language: str) -> Iterator[list[_Catalogue]]:
    """All catalogues of the wheel, folder, file or installed package."""
    if settings.installed is not None:
        yield _installed(settings.installed, reading)
        return
    path = asset_or_path(settings.asset, settings.path, reading)
    if path.is_dir():
        yield [_on_disk(file, file.relative_to(path).as_posix()) for file in sorted(path.rglob("*.[pm]o"))]
    elif path.suffix in (".po", ".mo"):
        # Whoever names one file knows its language.
        yield [_Catalogue(path.name, _tag(language), path.read_bytes)]
    else:
        with archives.open_zip(path) as archive:
            names = sorted(name for name in archive.namelist() if name.endswith((".po", ".mo")))
            yield [
                _Catalogue(
                    name,
                    _language_of(name),
                    lambda name=name: archives.read_member(archive, name, limit=_LARGEST_CATALOGUE),  # type: ignore[misc]
                )
                for name in names
            ]


def _distribution(package: str) -> metadata.Distribution:
    try:
        return metadata.distribution(package)
    except metadata.PackageNotFoundError:
        raise PunaError(
            "the package is not installed here", where=package, fix=f"pip install {package}"
        ) from None


def _installed_files(package: str) -> list[tuple[str, Path]]:
    """Name and place of each catalogue of an installed package."""
    distribution = _distribution(package)
    names = sorted(file.as_posix() for file in distribution.files or [] if file.suffix in (".po", ".mo"))
    return [(name, Path(str(distribution.locate_file(name)))) for name in names]


def _installed(package: str, reading: Reading) -> list[_Catalogue]:
    distribution = _distribution(package)
    about = distribution.metadata
    told = (about.get_all("License-Expression") or []) + (about.get_all("License") or [])
    licence = told[0] if told else "unknown"
    reading.facts |= {"package": package, "version": distribution.version, "licence": licence}
    return [_on_disk(file, name) for name, file in _installed_files(package)]


def _on_disk(file: Path, name: str) -> _Catalogue:
    return _Catalogue(name, _language_of(file.absolute().as_posix()), file.read_bytes)


def _language_of(name: str) -> str:
    """The language a catalogue's path tells: the folder above LC_MESSAGES, else the file's own name."""
    parts = PurePosixPath(name).parts
    tag = parts[-3] if len(parts) > 2 and parts[-2] == "LC_MESSAGES" else PurePosixPath(name).stem
    return _tag(tag)


def _tag(language: str) -> str:
    return language.replace("_", "-").lower()


def _of_language(catalogues: list[_Catalogue], language: str, *, where: str) -> list[_Catalogue]:
    """The catalogues of ``language``, sources (.po) rather than their compiled twins (.mo)."""
    wanted = _tag(language)
    chosen = [catalogue for catalogue in catalogues if catalogue.language == wanted]
    if not chosen:
        chosen = [catalogue for catalogue in catalogues if catalogue.language.startswith(f"{wanted}-")]
        regions = sorted({catalogue.language for catalogue in chosen})
        if regions:
            say(f"{where}: no catalogue of {language}; reading {', '.join(regions)}")
    if not chosen:
        there = sorted({catalogue.language for catalogue in catalogues})
        raise PunaError(
            f"no catalogue of language {language!r}",
            where=where,
            found=", ".join(there) or "no catalogue at all",
        )
    sources = {catalogue.name[:-3] for catalogue in chosen if catalogue.name.endswith(".po")}
    return [c for c in chosen if c.name.endswith(".po") or c.name[:-3] not in sources]
