"""What all sources share: their settings, what they are told and count while reading, and the registry."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import pydantic

from puna.core import assets
from puna.core.errors import PunaError, nearest
from puna.core.progress import say
from puna.core.seeds import derive
from puna.core.stage import Parameters
from puna.data.kinds import UNDETERMINED, BadRowError, Kind
from puna.data.ledger import Tally

_EXAMPLES_SHOWN = 3


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Phrasings = Annotated[tuple[str, ...], pydantic.BeforeValidator(_as_tuple), pydantic.Field(min_length=1)]
"""One template, or several of which one is drawn for each row."""


def phrasing(templates: tuple[str, ...], reading: Reading, *row: object) -> str:
    """The template that a row is written by: a function of the seed and the row's name alone."""
    return templates[derive(reading.seed, "phrasing", *row) % len(templates)]


class SourceSettings(Parameters):
    """What every source can be told."""

    name: str | None = None
    """Name of the source in the corpus; without it the asset's, package's or file's name."""
    licence: str | None = None
    """Licence of the text; an asset knows its own."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Whether a row that cannot be read stops the work, or is counted and left out."""
    limit: pydantic.PositiveInt | None = None
    """Look at no more than this many source documents (catalogues, files, or rows of a table)."""

    @abstractmethod
    def default_name(self) -> str:
        """The name of the source when none is given."""

    def files(self) -> list[Path]:
        """Local files the source reads, assets apart: the corpus depends on their content."""
        return []

    @property
    def title(self) -> str:
        """The source's name."""
        return self.name or self.default_name()


@dataclass(frozen=True)
class Item:
    """One row out of a source, without id and source.

    ``document`` names the source document it lies in, the unit of the split; ``index`` its place
    there, or None if the document is one row. A ``fragment`` is a piece of running text, such as
    one message of a catalogue, that is joined with its neighbours into documents. A ``task`` is told in the
    row's column ``source``, behind the name of the source.
    """

    document: str
    row: dict[str, Any]
    index: int | None = None
    fragment: bool = False
    task: str | None = None

    @property
    def key(self) -> str:
        """Name of the row within its source."""
        return self.document if self.index is None else f"{self.document}#{self.index}"


@dataclass
class Reading:
    """One pass over a source: which kind of rows is wanted, of which source documents, and the counts."""

    kind: Kind
    tally: Tally
    wanted: Callable[[str], bool] = lambda document: True
    limit: int | None = None
    on_bad_row: str = "error"
    language: str = UNDETERMINED
    seed: int = 0
    """What draws go by where a source has a choice, such as that of a phrasing."""
    seen: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    """What the source found out about itself, for the provenance: version, hash, number of files."""

    @property
    def exhausted(self) -> bool:
        """Whether the limit on source documents is reached."""
        return self.limit is not None and self.seen >= self.limit

    def wants(self, document: str) -> bool:
        """Count a source document as seen; False if it is past the limit or belongs to another pass."""
        if self.exhausted:
            return False
        self.seen += 1
        return self.wanted(document)

    def bad(self, message: str, *, where: str, row_field: str | None = None, found: object = None) -> None:
        """A row that cannot be read: an error, or counted as dropped, as the settings say."""
        place = where if row_field is None else f"{where}, field {row_field}"
        shown = None if found is None else str(found)[:200]
        if self.on_bad_row == "error":
            raise PunaError(
                message,
                where=place,
                found=shown,
                fix="mend the row, or leave such rows out: {path: ..., on_bad_row: skip}",
            )
        if self.tally.dropped["bad row"] < _EXAMPLES_SHOWN:
            say(f"bad row left out: {place}: {message}")
        self.tally.drop("bad row")

    def bad_row(self, error: BadRowError, *, where: str) -> None:
        """:meth:`bad` for a row that is not one of its kind."""
        self.bad(str(error), where=where, row_field=error.field, found=error.found)


def known_asset(name: str) -> str:
    """``name`` if it is that of an asset, else a ``ValueError`` with the nearest one."""
    if not assets.is_asset(name):
        close = nearest(name, assets.names())
        raise ValueError(f"unknown asset; did you mean {close!r}?" if close else "unknown asset")
    return name


AssetName = Annotated[str, pydantic.AfterValidator(known_asset)]
"""Name of a declared asset."""


class PlacedSettings(SourceSettings):
    """Settings of a source that is either an asset or lies at a path."""

    asset: AssetName | None = None
    """Name of an asset that holds it."""
    path: str | None = None
    """Where it lies: a file or folder of this format."""

    @pydantic.model_validator(mode="after")
    def _one_place(self) -> Self:
        exactly_one(**self.places())
        return self

    def places(self) -> dict[str, str | None]:
        """The settings of which exactly one says where the source is."""
        return {"asset": self.asset, "path": self.path}


Settings = TypeVar("Settings", bound=SourceSettings)
Read = Callable[[Any, Reading], Iterator[Item]]


@dataclass(frozen=True)
class Source:
    """A registered kind of source: its settings, what reads it, and which kinds of rows it can give."""

    format: str
    settings: type[SourceSettings]
    read: Read
    kinds: tuple[Kind, ...]


SOURCES: dict[type[SourceSettings], Source] = {}
"""Every registered kind of source by the class of its settings."""


def source(
    settings: type[Settings], *kinds: Kind
) -> Callable[[Callable[[Settings, Reading], Iterator[Item]]], Callable[[Settings, Reading], Iterator[Item]]]:
    """Register a function as what reads the sources with these ``settings``, giving rows of ``kinds``."""

    def register(
        function: Callable[[Settings, Reading], Iterator[Item]],
    ) -> Callable[[Settings, Reading], Iterator[Item]]:
        SOURCES[settings] = Source(settings.model_fields["format"].default, settings, function, kinds)
        return function

    return register


def asset_or_path(asset: str | None, path: str | None, reading: Reading) -> Path:
    """The path of an asset (fetched if need be) or the given path; notes what the asset is."""
    if asset is not None:
        found = assets.fetch(asset)
        described = assets.describe(asset)
        reading.facts |= {
            "asset": asset,
            "what": described.what,
            "licence": described.licence,
            "version": assets.recorded_version(described),
            "sha256": assets.recorded_sha256(described),
        }
        return found
    assert path is not None, "the settings demand one of asset and path"
    if not Path(path).exists():
        raise PunaError("file or folder not found", where=path)
    return Path(path)


def exactly_one(**given: object) -> None:
    """For validators: raise ``ValueError`` unless just one of the named settings is given."""
    if sum(value is not None for value in given.values()) != 1:
        raise ValueError(f"give exactly one of {', '.join(given)}")
