"""Operators and their registry: score, map, extract, and global ones.

A score says what documents are like, a mapper what they are turned into, an extractor what text a page
holds; a global operator sees all documents before it says anything of one. None of them drops a document:
gates do, over what scores and global operators have stored (:mod:`puna.data.curate.gates`).

An operator is a function of a whole batch (:class:`~puna.data.curate.texts.Texts`), registered under
``family.name`` with the class of its settings and the names of its signals. The modules of the folders
``scores``, ``maps``, ``extracts`` and ``globals`` are imported when an operator is first asked for.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy
from numpy.typing import NDArray

from puna.core.errors import PunaError, unknown_name
from puna.core.stage import Parameters
from puna.data.curate.segments import Segments
from puna.data.curate.texts import Texts

Kind = Literal["score", "map", "extract", "global"]
_FOLDERS = ("scores", "maps", "extracts", "globals")
_NAME = re.compile(r"[a-z0-9_]+\.[a-z0-9_]+")


class NoSettings(Parameters):
    """Settings of an operator that has none."""


class BadDocument(ValueError):  # noqa: N818  (what is bad is the document, not the program)
    """A document or page that an operator cannot work on; the message is the reason told in the pool."""


@dataclass(frozen=True)
class Spans:
    """A signal of parts of documents: ``values`` [n] of the characters from ``starts`` to ``ends`` [n].

    ``document`` [n] is the document's place in the batch, in order; starts and ends count characters from
    the document's start. nan is null.
    """

    document: NDArray[numpy.int64]
    starts: NDArray[numpy.int64]
    ends: NDArray[numpy.int64]
    values: NDArray[numpy.float64]

    @classmethod
    def of(cls, segments: Segments, values: NDArray[Any]) -> Spans:
        """``values`` [n] of segments of a batch."""
        origin = segments.texts.bounds[segments.document]
        numbers = numpy.asarray(values, dtype=numpy.float64)
        return cls(segments.document, segments.starts - origin, segments.ends - origin, numbers)

    @classmethod
    def nothing(cls) -> Spans:
        """No span at all."""
        places = numpy.zeros(0, dtype=numpy.int64)
        return cls(places, places, places, numpy.zeros(0))


Signals = Mapping[str, "NDArray[Any] | Sequence[float] | Spans"]
"""By name, one number per document ([count]; nan is null, and null is not 0), or spans."""


@dataclass(frozen=True)
class Mapped:
    """What a mapper made: the new text of each document (None: as it was), and signals about it.

    A mapper that finds out languages gives them too (None: as it was known before).
    """

    texts: Sequence[str | None]
    signals: Signals = field(default_factory=dict)
    languages: Sequence[str | None] | None = None


@dataclass(frozen=True)
class Resolved:
    """What a global operator says of the documents of one shard.

    ``cut`` are the parts of documents that are removed from their texts, whatever their values.
    """

    signals: Signals = field(default_factory=dict)
    cut: Spans | None = None


class Sketch(Protocol):
    """What a global operator stored of one shard: of the documents that were kept up to it, in order."""

    count: int
    """Documents."""

    def ids(self) -> Sequence[str]:
        """The documents' ids."""
        ...

    def read(self, name: str) -> NDArray[Any]:
        """[count, ...] a stored column."""
        ...

    def ragged(self, name: str) -> tuple[NDArray[Any], NDArray[numpy.int64]]:
        """A stored ragged column: its values [n] and the bounds [count + 1] of each document's."""
        ...


SketchColumns = Mapping[str, "NDArray[Any] | tuple[NDArray[Any], NDArray[numpy.int64]]"]
"""By name, an array whose first axis is that of the documents, or (values, bounds) of a ragged one."""


class GlobalOperator(Protocol):
    """A global operator: a class without state."""

    def sketch(self, texts: Texts, settings: Any) -> SketchColumns:
        """What is stored of a batch; called shard by shard, in parallel."""
        ...

    def resolve(self, sketches: Sequence[Sketch], settings: Any, work: Path) -> Iterator[Resolved]:
        """What is said of each shard, in order; called once.

        It reads the sketches as it needs them, as often as it needs; ``work`` is a folder for files that
        do not fit into memory, thrown away afterwards.
        """
        ...


@dataclass(frozen=True)
class Operator:
    """A registered operator.

    ``signals`` tells, by name, what each number per document means; ``spans`` the same of signals of
    parts of documents. ``media`` is what an extractor reads: ``html``, ``pdf``. A score that is ``apart``
    looks at documents one by one and shares nothing of a batch with others: it is not asked about
    documents that are dropped already. Raise ``version`` when results change: pools made before are then
    made again.
    """

    name: str
    kind: Kind
    function: Any
    settings: type[Parameters]
    signals: Mapping[str, str]
    spans: Mapping[str, str]
    source: str
    version: int
    summary: str
    media: str = ""
    apart: bool = False

    def signal_names(self) -> list[str]:
        """The full names of its signals, as gates write them."""
        return [f"{self.name}.{signal}" for signal in (*self.signals, *self.spans)]


_OPERATORS: dict[tuple[Kind, str], Operator] = {}
_loaded = False
Function = TypeVar("Function", bound=Callable[..., Any])
Class = TypeVar("Class", bound=type)


def score(
    name: str,
    *,
    settings: type[Parameters] = NoSettings,
    signals: Mapping[str, str] | None = None,
    spans: Mapping[str, str] | None = None,
    source: str,
    version: int = 1,
    apart: bool = False,
) -> Callable[[Function], Function]:
    """Register ``function(texts, settings) -> Signals``."""
    if not signals and not spans:
        raise ValueError(f"{name}: a score has signals")
    return _register("score", name, settings, signals, spans, source, version, apart=apart)


def mapper(
    name: str,
    *,
    settings: type[Parameters] = NoSettings,
    signals: Mapping[str, str] | None = None,
    spans: Mapping[str, str] | None = None,
    source: str,
    version: int = 1,
) -> Callable[[Function], Function]:
    """Register ``function(texts, settings) -> list[str | None] | Mapped``."""
    return _register("map", name, settings, signals, spans, source, version)


def extractor(
    name: str, *, media: str, settings: type[Parameters] = NoSettings, source: str, version: int = 1
) -> Callable[[Function], Function]:
    """Register ``function(content: bytes, settings) -> str``, which may raise :class:`BadDocument`.

    It is given the documents whose reader said that their bytes are of the kind ``media``.
    """
    return _register("extract", name, settings, None, None, source, version, media)


def global_operator(
    name: str,
    *,
    settings: type[Parameters] = NoSettings,
    signals: Mapping[str, str] | None = None,
    spans: Mapping[str, str] | None = None,
    source: str,
    version: int = 1,
) -> Callable[[Class], Class]:
    """Register a class as a :class:`GlobalOperator`."""
    return _register("global", name, settings, signals, spans, source, version)


def _register(
    kind: Kind,
    name: str,
    settings: type[Parameters],
    signals: Mapping[str, str] | None,
    spans: Mapping[str, str] | None,
    source: str,
    version: int,
    media: str = "",
    apart: bool = False,
) -> Callable[[Any], Any]:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r}: an operator is named family.name")
    if (kind, name) in _OPERATORS:
        raise ValueError(f"two operators of kind {kind} are named {name!r}")

    def register(function: Any) -> Any:
        summary = (function.__doc__ or "").strip().splitlines()
        if not summary:
            raise ValueError(f"{name}: an operator says what it does")
        made = function() if kind == "global" else function
        _OPERATORS[kind, name] = Operator(
            name, kind, made, settings, signals or {}, spans or {}, source, version, summary[0], media, apart
        )
        return function

    return register


def all_operators() -> list[Operator]:
    """Every operator by kind and name; imports their modules on the first call."""
    global _loaded
    if not _loaded:
        for folder in _FOLDERS:
            package = importlib.import_module(f"puna.data.curate.{folder}")
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{package.__name__}.{module.name}")
        _loaded = True
    return [_OPERATORS[key] for key in sorted(_OPERATORS)]


def get_operator(kind: Kind, name: str, *, where: object = None) -> Operator:
    """The operator of that kind and name; an unknown one is an error with the nearest name."""
    known = {operator.name: operator for operator in all_operators() if operator.kind == kind}
    if name not in known:
        others = [operator.kind for operator in all_operators() if operator.name == name]
        if others:
            fix = f"write {{{others[0]}: {name}}}"
            raise PunaError(f"no {kind} operator, but of kind {others[0]}", where=where, found=name, fix=fix)
        raise unknown_name(f"{kind} operator", name, known, where=where)
    return known[name]


def apply_score(operator: Operator, texts: Texts, settings: Parameters) -> Signals:
    """A score's signals of a batch, checked: just those it declares, of the right shape."""
    return checked(operator, operator.function(texts, settings), texts.count)


def apply_map(operator: Operator, texts: Texts, settings: Parameters) -> Mapped:
    """What a mapper makes of a batch, checked."""
    made = operator.function(texts, settings)
    mapped = made if isinstance(made, Mapped) else Mapped(made)
    if len(mapped.texts) != texts.count:
        raise ValueError(f"{operator.name}: {len(mapped.texts)} texts for {texts.count} documents")
    if mapped.languages is not None and len(mapped.languages) != texts.count:
        raise ValueError(f"{operator.name}: {len(mapped.languages)} languages for {texts.count} documents")
    return Mapped(mapped.texts, checked(operator, mapped.signals, texts.count), mapped.languages)


def checked(operator: Operator, signals: Signals, count: int) -> dict[str, NDArray[Any] | Spans]:
    """``signals`` of ``count`` documents, as float64; others than the declared ones are a ``ValueError``."""
    declared = {*operator.signals, *operator.spans}
    if set(signals) != declared:
        raise ValueError(f"{operator.name}: signals {sorted(signals)}, declared are {sorted(declared)}")
    result: dict[str, NDArray[Any] | Spans] = {}
    for name, values in signals.items():
        if isinstance(values, Spans) != (name in operator.spans):
            raise ValueError(f"{operator.name}.{name}: not what is declared, a number per document or spans")
        if not isinstance(values, Spans):
            numbers = numpy.asarray(values, dtype=numpy.float64)
            if numbers.shape != (count,):
                raise ValueError(f"{operator.name}.{name}: {numbers.shape} numbers for {count} documents")
            result[name] = numbers
        else:
            result[name] = values
    return result
