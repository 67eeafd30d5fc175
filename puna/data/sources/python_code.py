"""Python code: whole files as documents, or functions as requests that their docstrings answer, or ask."""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pydantic

from puna.core import archives
from puna.core.errors import PunaError
from puna.data.kinds import BadRowError
from puna.data.sources.common import (
    Item,
    Phrasings,
    PlacedSettings,
    Reading,
    asset_or_path,
    phrasing,
    source,
)

_LARGEST_FILE = 16 << 20  # bytes
_PLACES = re.compile(r"\{(signature|purpose|code)\}")


class PythonSettings(PlacedSettings):
    """The Python files of a wheel or a folder."""

    format: Literal["python"] = "python"
    below: str | None = None
    """Only files below this folder, such as "django/contrib"."""
    ask: Phrasings = ("Write this Python function: {signature}\n{purpose}",)
    """Of messages: what the user says, with {signature}, {purpose} (the first paragraph of the docstring) or
    {code} (the function without it); of several phrasings one is drawn for each function."""
    answer: str = "{code}"
    """Of messages: what the assistant says, with a place that the request does not have."""
    language: str | None = None
    """Language tag of the rows."""

    @pydantic.model_validator(mode="after")
    def _both_sides(self) -> PythonSettings:
        answered = set(_PLACES.findall(self.answer))
        for phrase in self.ask:
            asked = set(_PLACES.findall(phrase))
            if not asked or not answered:
                raise ValueError(f"none of {{signature}}, {{purpose}}, {{code}} in ask or answer: {phrase!r}")
            if asked & answered:
                raise ValueError(f"this request already holds its answer: {phrase!r}")
        return self

    def default_name(self) -> str:
        """The asset or the file's name."""
        return self.asset or Path(self.path or "").name.split("-")[0].split(".")[0]

    def files(self) -> list[Path]:
        """The wheel, or all files of the folder."""
        if self.path is None:
            return []
        path = Path(self.path)
        return sorted(path.rglob("*.py")) if path.is_dir() else [path]


@dataclass(frozen=True)
class Function:
    """A documented function: its first line, the first paragraph of its docstring, all else of it."""

    signature: str
    purpose: str
    code: str

    def filled(self, template: str) -> str:
        """``template`` with its places filled in."""
        return _PLACES.sub(lambda match: str(getattr(self, match[1])), template)


@source(PythonSettings, "documents", "messages")
def read_python(settings: PythonSettings, reading: Reading) -> Iterator[Item]:
    """A file is a source document: one row as it is, or a row for each function with a docstring."""
    count = 0
    for name, content in _files(settings, reading):
        count += 1
        if not reading.wants(name):
            continue
        try:
            text = _text(content)
            functions = functions_of(text) if reading.kind == "messages" else []
        except BadRowError as error:
            reading.bad_row(error, where=name)
            continue
        language = settings.language or reading.language
        if reading.kind == "messages":
            for index, function in enumerate(functions):
                reading.tally.keep()
                ask = function.filled(phrasing(settings.ask, reading, settings.title, name, index))
                said = [{"role": "user", "content": ask}]
                said.append({"role": "assistant", "content": function.filled(settings.answer)})
                yield Item(name, {"messages": said, "language": language}, index)
        elif text.strip():
            reading.tally.keep()
            yield Item(name, {"text": text, "language": language})
        else:
            reading.tally.drop("empty")
    reading.facts["files"] = count
    if not count:
        raise PunaError("no Python file here", where=settings.title, found=f"below {settings.below!r}")


def functions_of(text: str) -> list[Function]:
    """The functions of a file that have a docstring and something behind it, methods among them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # of odd escapes in other people's texts
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise BadRowError("not Python", "(file)", error) from None
    lines = text.splitlines(keepends=True)
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        purpose = (ast.get_docstring(node) or "").partition("\n\n")[0].strip()
        first, last, end = node.body[0].lineno, node.body[0].end_lineno, node.end_lineno
        if not purpose or first == node.lineno or last is None:
            continue
        head = "".join(lines[node.lineno - 1 : first - 1])
        code = textwrap.dedent(head + "".join(lines[last:end])).strip()
        found.append(Function(" ".join(head.split()), " ".join(purpose.split()), code))
    return found


def _text(content: bytes) -> str:
    try:
        return content.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise BadRowError("not UTF-8", "(file)", error) from None


def _files(settings: PythonSettings, reading: Reading) -> Iterator[tuple[str, bytes]]:
    path = asset_or_path(settings.asset, settings.path, reading)
    below = "" if settings.below is None else settings.below.rstrip("/") + "/"
    if path.is_dir():
        for file in sorted(path.rglob("*.py")):
            name = file.relative_to(path).as_posix()
            if name.startswith(below):
                yield name, file.read_bytes()
        return
    if path.suffix == ".py":
        yield path.name, path.read_bytes()
        return
    with archives.open_zip(path) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".py") and name.startswith(below):
                yield name, archives.read_member(archive, name, limit=_LARGEST_FILE)
