"""ChatterBot's conversations: YAML files with lists of alternating statements."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import yaml

from puna.core import archives
from puna.core.errors import PunaError, unknown_name
from puna.data.kinds import BadRowError, check_messages
from puna.data.sources.common import (
    Item,
    PlacedSettings,
    Reading,
    asset_or_path,
    source,
)

_LARGEST_FILE = 16 << 20  # bytes


class ChatterbotSettings(PlacedSettings):
    """Conversations of one language out of a wheel, a folder, or one YAML file."""

    format: Literal["chatterbot"] = "chatterbot"
    folder: str | None = None
    """Only files in folders of this name: the corpus names its folders by languages, such as "dutch"."""
    topics: tuple[str, ...] = ()
    """Only files of these names, such as "humor"; none: all."""
    language: str | None = None
    """Language tag of the conversations."""

    def default_name(self) -> str:
        """The asset or the file's name."""
        return self.asset or Path(self.path or "").name.split("-")[0].split(".")[0]

    def files(self) -> list[Path]:
        """The wheel, file, or all files of the folder."""
        if self.path is None:
            return []
        path = Path(self.path)
        return sorted(path.rglob("*.yml")) if path.is_dir() else [path]


@source(ChatterbotSettings, "messages")
def read_chatterbot(settings: ChatterbotSettings, reading: Reading) -> Iterator[Item]:
    """Conversations: a file is a source document; user and assistant take turns, the user begins."""
    files = list(_files(settings, reading))
    reading.facts["files"] = len(files)
    if not files:
        raise PunaError("no YAML file here", where=settings.title, found=f"folder {settings.folder!r}")
    stems = sorted({PurePosixPath(name).stem for name, _ in files})
    for topic in settings.topics:
        if topic not in stems:
            raise unknown_name("topic", topic, stems, where=settings.title)
    for name, content in files:
        if settings.topics and PurePosixPath(name).stem not in settings.topics:
            continue
        if not reading.wants(name):
            continue
        try:
            conversations = _conversations(content)
        except BadRowError as error:
            reading.bad_row(error, where=name)
            continue
        for index, statements in enumerate(conversations):
            try:
                messages = _messages(statements)
            except BadRowError as error:
                reading.bad_row(error, where=f"{name}, conversation {index + 1}")
                continue
            if len(messages) < 2:
                reading.tally.drop("without an answer")
                continue
            reading.tally.keep()
            yield Item(name, {"messages": messages, "language": settings.language or reading.language}, index)


def _conversations(content: bytes) -> list[Any]:
    try:
        parsed = yaml.load(content, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadRowError("not valid YAML", "(file)", error) from None
    conversations = parsed.get("conversations") if isinstance(parsed, dict) else None
    if not isinstance(conversations, list):
        raise BadRowError("no list of conversations", "conversations", type(conversations).__name__)
    return conversations


def _messages(statements: Any) -> list[dict[str, str]]:
    if not isinstance(statements, list):
        raise BadRowError("not a list of statements", "conversations", repr(statements))
    roles = ("user", "assistant")
    messages = [
        # YAML reads an unquoted 42 or yes as a number or truth value.
        {"role": roles[number % 2], "content": text if isinstance(text, str) else _plain(text, number)}
        for number, text in enumerate(statements)
    ]
    check_messages(messages, "statements")
    return messages


def _plain(value: Any, number: int) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRowError("not a text", f"statements[{number}]", repr(value))
    return str(value)


def _files(settings: ChatterbotSettings, reading: Reading) -> Iterator[tuple[str, bytes]]:
    path = asset_or_path(settings.asset, settings.path, reading)
    if path.is_dir():
        for file in settings.files():
            name = file.relative_to(path).as_posix()
            if _in_folder(name, settings.folder):
                yield name, file.read_bytes()
    elif path.suffix in (".yml", ".yaml"):
        yield path.name, path.read_bytes()
    else:
        with archives.open_zip(path) as archive:
            for name in sorted(archive.namelist()):
                if name.endswith(".yml") and _in_folder(name, settings.folder):
                    yield name, archives.read_member(archive, name, limit=_LARGEST_FILE)


def _in_folder(name: str, folder: str | None) -> bool:
    return folder is None or folder in PurePosixPath(name).parts[:-1]
