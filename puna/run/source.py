"""YAML as it should be read from anybody: no objects, no duplicate keys, no bombs, and a line for every key.

Scalars follow YAML 1.2: ``1e-3`` is a number, and ``no`` (Norwegian) is a word.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from puna.core.errors import PunaError

KeyPath = tuple[str | int, ...]

_LARGEST_FILE = 1_000_000  # bytes
_MOST_NODES = 50_000  # with every alias written out
_DEEPEST = 40

_SCALARS: tuple[tuple[str, str, str], ...] = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
)
_PREFIX = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """Composes nodes with YAML 1.2's rules for plain scalars."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own class attribute)


for _name, _pattern, _first in _SCALARS:
    # A key of "" stands for the empty scalar in PyYAML's table of first characters.
    _Loader.add_implicit_resolver(
        _PREFIX + _name, re.compile(f"^(?:{_pattern})$"), ["" if c == "\0" else c for c in _first]
    )
_Loader.add_implicit_resolver(_PREFIX + "merge", re.compile("^<<$"), ["<"])


@dataclass
class Source:
    """A YAML value with where each part of it was written."""

    value: Any
    name: str
    origins: dict[KeyPath, str] = field(default_factory=dict)

    def where(self, path: KeyPath = ()) -> str:
        """The place of the value at ``path``, or of the nearest one around it that was written down."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return self.name

    def put(self, path: KeyPath, value: Any, origin: str) -> None:
        """Set the value at ``path``, making mappings on the way; ``origin`` says who did."""
        target = self.value
        for depth, step in enumerate(path[:-1]):
            if isinstance(target, list):
                target = target[_index(target, step, path[:depth], origin)]
                continue
            if not isinstance(target.get(step), (dict, list)):
                target[step] = {}
            target = target[step]
        last: str | int = path[-1]
        if isinstance(target, list):
            last = _index(target, last, path[:-1], origin)
        target[last] = value
        for other in [p for p in self.origins if p[: len(path)] == path]:
            del self.origins[other]
        self.origins[path] = origin


def _index(items: list[Any], step: str | int, path: KeyPath, origin: str) -> int:
    text = str(step)
    if not text.isdigit() or int(text) >= len(items):
        raise PunaError(
            f"{'.'.join(map(str, path))} is a list",
            where=origin,
            found=step,
            expected=f"a position from 0 to {len(items) - 1}",
        )
    return int(text)


def read(path: Path | str) -> Source:
    """Read a YAML file; a missing, unreadable or unsafe one is a :class:`PunaError` with file and line."""
    file = Path(path)
    try:
        if file.stat().st_size > _LARGEST_FILE:
            raise PunaError("too large for a recipe", where=file, expected=f"at most {_LARGEST_FILE:,} bytes")
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise PunaError("file not found", where=file) from None
    except (OSError, UnicodeDecodeError) as error:
        raise PunaError("not a readable text file", where=file, found=error) from None
    return parse(text, str(file))


def parse(text: str, name: str) -> Source:
    """Parse YAML text; ``name`` is the file, or whatever else the text came from."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}, line {mark.line + 1}" if mark else name
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise PunaError(f"not valid YAML: {problem}", where=place) from None
    except yaml.YAMLError as error:
        raise PunaError("not valid YAML", where=name, found=error) from None
    except RecursionError:
        raise PunaError("nested too deeply", where=name, expected=f"at most {_DEEPEST} levels") from None
    source = Source(None, name)
    if node is not None:
        source.value = _Builder(source).build(node, (), 0)
    return source


def parse_value(text: str, origin: str) -> Any:
    """The value of a setting given on the command line, typed as in a recipe."""
    return parse(text, origin).value


class _Dumper(yaml.SafeDumper):
    """Quotes whatever would be read as something else under YAML 1.1 or 1.2, and writes no aliases."""

    yaml_implicit_resolvers: dict[str, Any] = {  # noqa: RUF012  (PyYAML's own class attribute)
        first: [
            *yaml.SafeDumper.yaml_implicit_resolvers.get(first, []),
            *_Loader.yaml_implicit_resolvers.get(first, []),
        ]
        for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
    }

    def ignore_aliases(self, data: Any) -> bool:
        """Write shared values out each time."""
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    # Outside of double quotes PyYAML folds these line breaks of Unicode into spaces.
    style = '"' if any(character in text for character in "\x85\u2028\u2029") else None
    return dumper.represent_scalar(_PREFIX + "str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def dump(value: Any) -> str:
    """``value`` as YAML that :func:`parse` reads back as it was, keys in the order given."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110))


class _Builder:
    """Makes plain values of nodes, and counts them: an alias costs what it stands for."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.nodes = 0

    def _place(self, node: yaml.Node) -> str:
        return f"{self.source.name}, line {node.start_mark.line + 1}"

    def build(self, node: yaml.Node, path: KeyPath, depth: int) -> Any:
        self.nodes += 1
        if self.nodes > _MOST_NODES:
            raise PunaError(
                "aliases write out to too much",
                where=self._place(node),
                expected=f"at most {_MOST_NODES:,} values",
            )
        if depth > _DEEPEST:
            raise PunaError(
                "nested too deeply", where=self._place(node), expected=f"at most {_DEEPEST} levels"
            )
        self.source.origins.setdefault(path, self._place(node))
        if isinstance(node, yaml.MappingNode) and node.tag == _PREFIX + "map":
            return self._mapping(node, path, depth)
        if isinstance(node, yaml.SequenceNode) and node.tag == _PREFIX + "seq":
            return [self.build(item, (*path, index), depth + 1) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        raise PunaError(f"a value of type {node.tag} is not allowed here", where=self._place(node))

    def _mapping(self, node: yaml.MappingNode, path: KeyPath, depth: int) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _PREFIX + "merge":
                merged = {**self._merge(value_node, path, depth), **merged}
                continue
            key = self._key(key_node)
            if key in own:
                raise PunaError(f"key {key!r} stands twice in one mapping", where=self._place(key_node))
            self.source.origins[(*path, key)] = self._place(key_node)
            own[key] = self.build(value_node, (*path, key), depth + 1)
        return {**merged, **own}

    def _merge(self, node: yaml.Node, path: KeyPath, depth: int) -> dict[str, Any]:
        sources = node.value if isinstance(node, yaml.SequenceNode) else [node]
        merged: dict[str, Any] = {}
        for source in sources:
            value = self.build(source, path, depth + 1)
            if not isinstance(value, dict):
                raise PunaError("<< merges mappings only", where=self._place(source))
            merged = {**value, **merged}
        return merged

    def _key(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise PunaError("a key must be a word", where=self._place(node))
        return str(node.value)

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        kind, text = node.tag.removeprefix(_PREFIX), node.value
        try:
            if kind == "str":
                return text
            if kind == "null":
                return None
            if kind == "bool":
                return {"true": True, "false": False}[text.lower()]
            if kind == "int":
                return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
            if kind == "float":
                return float(re.sub(r"\.(inf|nan)$", r"\1", text.lower()))
        except (KeyError, ValueError):
            pass
        raise PunaError(f"{text[:60]!r} is not a value of type {node.tag}", where=self._place(node))
