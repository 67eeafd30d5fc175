"""What the inputs of a stage point at: outputs of earlier stages, paths, assets, ids on a hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from puna.core import assets
from puna.core.errors import PunaError, nearest, unknown_name
from puna.core.rows import META
from puna.core.stage import Input, Kind, Stage
from puna.run.source import Source

INPUT_NAME = re.compile(r"[A-Za-z0-9_-]+")
"""What a name of one input among several looks like."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_ON_HUB: tuple[Kind, ...] = ("model", "tokenizer")
_MARKS: dict[Kind, tuple[str, ...]] = {
    "corpus": (META,),
    "model": ("config.json", "puna.json", "adapter_config.json"),
    "tokenizer": ("tokenizer.json", "tokenizer.model", "spiece.model"),
    "state": ("state.json", "pool.json"),
}
"""Files that tell the kind of a folder, the first kind that has one first."""
# What else may stand where a kind is asked for: a model's folder holds its tokenizer.
_ACCEPTS: dict[Kind, tuple[Kind, ...]] = {"tokenizer": ("tokenizer", "model")}


@dataclass(frozen=True)
class Reference:
    """What an input points at: an output of a stage, a path, an asset, or an id on a hub."""

    text: str
    origin: Literal["stage", "path", "asset", "hub"]
    stage: str | None = None
    output: str | None = None

    def resolved(self) -> str:
        """The reference as a resolved recipe has it: outputs spelt out, paths absolute."""
        if self.origin == "stage":
            return f"{self.stage}.{self.output}"
        return str(Path(self.text).expanduser().absolute()) if self.origin == "path" else self.text


Inputs = dict[str, Reference | dict[str, Reference]]


@dataclass(frozen=True)
class InputBuilder:
    """Builds the inputs of stage ``identifier`` out of the stages before it (``earlier``)."""

    written: Source
    identifier: str
    stage: Stage
    earlier: Mapping[str, Stage]
    all_ids: Iterable[str]

    def build(self, given: Mapping[str, Any]) -> Inputs:
        """Resolve what the recipe gives; missing, unknown and unfit inputs are errors."""
        place = self._where()
        for name in given:
            if name not in self.stage.inputs:
                raise unknown_name(f"input of {self.stage.name!r}", str(name), self.stage.inputs, where=place)
        inputs: Inputs = {}
        for name, declared in self.stage.inputs.items():
            value = given.get(name)
            if value is not None and value != {} and value != []:
                inputs[name] = self._input(name, declared, value)
            elif not declared.optional:
                raise PunaError(f"input {name!r} is missing", where=place, expected=f"a {declared.kind}")
        return inputs

    def _where(self, *path: str) -> str:
        place = self.written.where(("stages", self.identifier, "in", *path))
        return f"{place}, stage {self.identifier}" + (f", input {'.'.join(path)}" if path else "")

    def _input(self, name: str, declared: Input, value: Any) -> Reference | dict[str, Reference]:
        if isinstance(value, str) and not declared.many:
            return self._refer(value, declared, self._where(name))
        value = [value] if isinstance(value, str) else value
        if not declared.many or not isinstance(value, (list, Mapping)):
            wanted = "one reference, a list, or a mapping from names" if declared.many else "one reference"
            raise PunaError("not an input", where=self._where(name), found=value, expected=wanted)
        named = [str(key) for key in value] if isinstance(value, Mapping) else None
        places = [self._where(name, key) for key in named] if named else [self._where(name)] * len(value)
        found: list[Reference] = []
        for text, where in zip(value.values() if isinstance(value, Mapping) else value, places, strict=True):
            if not isinstance(text, str):
                raise PunaError("not a reference", where=where, found=text)
            found.append(self._refer(text, declared, where))
        labels = named or default_names(found)
        references: dict[str, Reference] = {}
        for label, reference, where in zip(labels, found, places, strict=True):
            if not INPUT_NAME.fullmatch(label):
                raise PunaError(
                    f"{label!r} cannot name an input", where=where, expected="letters, digits, - and _"
                )
            if label in references:
                raise PunaError(
                    f"two inputs are called {label!r}", where=where, fix="name them: {name: reference}"
                )
            references[label] = reference
        return references

    def _refer(self, text: str, declared: Input, where: str) -> Reference:
        """Resolve one reference: an earlier stage, a path, an asset, or an id on a hub, in this order."""
        head, _, output = text.partition(".")
        if head in self.earlier:
            return self._refer_stage(text, head, output, declared, where)
        path = Path(text).expanduser()
        if path.exists():
            if declared.kind in _MARKS and _kind_of_path(path) not in _accepted(declared.kind):
                raise self._unfit(text, _kind_of_path(path), declared, where)
            return Reference(text, "path")
        if head in self.all_ids:
            raise PunaError(
                f"stage {head!r} does not come before this one", where=where, fix="put it further up"
            )
        if assets.is_asset(text):
            if declared.kind in _MARKS and _kind_of_asset(text) not in _accepted(declared.kind):
                raise self._unfit(text, _kind_of_asset(text), declared, where)
            return Reference(text, "asset")
        if _HUB_ID.fullmatch(text) and declared.kind in _ON_HUB:
            return Reference(text, "hub")
        fitting = [name for name in assets.names() if _kind_of_asset(name) in _accepted(declared.kind)]
        close = nearest(text, [*self.earlier, *fitting])
        raise PunaError(
            f"{text!r} is nothing that is known here",
            where=where,
            expected=self._expected(declared),
            fix=f"did you mean {close!r}?" if close else _how_to_read(text, declared),
        )

    def _expected(self, declared: Input) -> str:
        """What may stand for an input of this kind."""
        stages = ", ".join(self.earlier) or "none"
        others = "a path, an asset, or a hub id" if declared.kind in _ON_HUB else "or a path"
        return f"a {declared.kind}: an earlier stage ({stages}), {others}"

    def _unfit(self, text: str, kind: Kind | None, declared: Input, where: str) -> PunaError:
        """The error for a path or an asset that is there and is of another kind."""
        path = Path(text).expanduser()
        inside = sorted(path.iterdir()) if path.is_dir() else []
        fitting = [child for child in inside if _kind_of_path(child) in _accepted(declared.kind)]
        return PunaError(
            f"{text!r} is {f'a {kind}' if kind else f'no {declared.kind}'}",
            where=where,
            expected=self._expected(declared),
            fix=f"did you mean {str(fitting[0])!r}?" if fitting else _how_to_read(text, declared),
        )

    def _refer_stage(self, text: str, head: str, output: str, declared: Input, where: str) -> Reference:
        outputs = self.earlier[head].outputs
        if not outputs:
            raise PunaError(f"stage {head!r} has no outputs", where=where, found=text)
        if not output:
            # A bare stage means its first output that fits, be there an adapter beside the model.
            fitting = [name for name, kind in outputs.items() if kind in _accepted(declared.kind)]
            output = fitting[0] if fitting else next(iter(outputs))
        if output not in outputs:
            raise unknown_name(f"output of stage {head!r}", output, outputs, where=where)
        _check_kind(outputs[output], declared, text, where)
        return Reference(text, "stage", head, output)


def default_names(references: Sequence[Reference]) -> list[str]:
    """Names for references that were given none, by which metrics may be named.

    It is the stage, or the last part of a path, asset or id. Where two are called alike it is the stage
    with its output, or those parts of the path that tell them apart: a, b for a/model, b/model.
    """
    parts = [_parts(reference) for reference in references]
    names: list[str] = []
    for own, reference in zip(parts, references, strict=True):
        alike = [other for other in parts if other[-1] == own[-1]]
        if len(alike) == 1:
            names.append(own[-1])
        elif reference.stage is not None:
            names.append(f"{reference.stage}_{reference.output}")
        else:
            names.append("_".join(_telling(own, alike)))
    return [re.sub(r"[^A-Za-z0-9_-]+", "_", name) for name in names]


def _parts(reference: Reference) -> tuple[str, ...]:
    if reference.stage is not None:
        return (reference.stage,)
    if reference.origin != "path":
        return tuple(reference.text.split("/"))
    path = Path(os.path.abspath(Path(reference.text).expanduser()))
    return (*path.parts[1:-1], path.stem if path.is_file() else path.name)


def _telling(own: tuple[str, ...], alike: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The last parts by which ``own`` differs from those that end like it, without what all end in."""
    longest = max(map(len, alike))
    endings = {count: {parts[-count:] for parts in alike} for count in range(1, longest + 1)}
    shared = max(count for count in endings if len(endings[count]) == 1)
    for count in range(shared + 1, longest + 1):
        if len(endings[count]) == len(alike):
            return own[-count : len(own) - shared] or own[-1:]
    return own[-1:]


def _accepted(kind: Kind) -> tuple[Kind, ...]:
    return _ACCEPTS.get(kind, (kind,))


def _check_kind(kind: Kind, declared: Input, text: str, where: str) -> None:
    if kind not in _accepted(declared.kind):
        raise PunaError(f"{text!r} is a {kind}", where=where, expected=f"a {declared.kind}")


def _kind_of_path(path: Path) -> Kind | None:
    """The kind of what lies at ``path``, if its files tell."""
    if path.is_file():
        with path.open("rb") as file:
            return "model" if file.read(4) == b"GGUF" else None
    kinds = (kind for kind, marks in _MARKS.items() if any((path / mark).is_file() for mark in marks))
    return next(kinds, None)


def _kind_of_asset(name: str) -> Kind | None:
    """The kind of an asset that may stand where an input does; texts must be read into a corpus first."""
    asset = assets.describe(name)
    return asset.kind or ("model" if assets.file_name(asset).endswith(".gguf") else None)


def _how_to_read(text: str, declared: Input) -> str | None:
    """How something else than a corpus becomes one, or which assets there are."""
    if declared.kind != "corpus":
        fitting = [name for name in assets.names() if _kind_of_asset(name) in _accepted(declared.kind)]
        return f"assets that fit: {', '.join(fitting)}" if fitting and assets.is_asset(text) else None
    if Path(text).expanduser().exists():
        said = f"{{path: {text}}}"
    elif assets.is_asset(text):
        said = f"{{asset: {text}}}"
    elif _HUB_ID.fullmatch(text):
        said = f"{{format: huggingface, id: {text}}}"
    else:
        return None
    return f"read it in a stage before this one: use: corpus, sources: [{said}]"
