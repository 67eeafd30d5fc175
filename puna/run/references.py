"""What the inputs of a stage point at: outputs of earlier stages, paths, assets, ids on a hub."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from puna.core import assets
from puna.core.errors import PunaError, nearest, unknown_name
from puna.core.stage import Input, Kind, Stage
from puna.run.source import Source

_INPUT_NAME = re.compile(r"[A-Za-z0-9_-]+")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_ON_HUB: tuple[Kind, ...] = ("model", "tokenizer", "corpus")
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
        if isinstance(value, str):
            reference = self._refer(value, declared, self._where(name))
            return {_short_name(reference): reference} if declared.many else reference
        if not declared.many or not isinstance(value, (list, Mapping)):
            wanted = "one reference, a list, or a mapping from names" if declared.many else "one reference"
            raise PunaError("not an input", where=self._where(name), found=value, expected=wanted)
        references: dict[str, Reference] = {}
        for key, text in value.items() if isinstance(value, Mapping) else [(None, text) for text in value]:
            where = self._where(name) if key is None else self._where(name, key)
            if not isinstance(text, str):
                raise PunaError("not a reference", where=where, found=text)
            reference = self._refer(text, declared, where)
            label = _short_name(reference) if key is None else str(key)
            if not _INPUT_NAME.fullmatch(label):
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
            kind = _kind_of_path(path)
            if kind is not None:
                _check_kind(kind, declared, text, where)
            return Reference(text, "path")
        if head in self.all_ids:
            raise PunaError(
                f"stage {head!r} does not come before this one", where=where, fix="put it further up"
            )
        if assets.is_asset(text):
            return Reference(text, "asset")
        if _HUB_ID.fullmatch(text) and declared.kind in _ON_HUB:
            return Reference(text, "hub")
        close = nearest(text, [*self.earlier, *assets.names()])
        stages = ", ".join(self.earlier) or "none"
        raise PunaError(
            f"{text!r} is nothing that is known here",
            where=where,
            expected=f"a {declared.kind}: an earlier stage ({stages}), a path, an asset, or a hub id",
            fix=f"did you mean {close!r}?" if close else None,
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


def _short_name(reference: Reference) -> str:
    """The name of an unnamed one among several: its stage, file or asset, as metrics may be named."""
    name = reference.stage or Path(reference.text).stem
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name)


def _accepted(kind: Kind) -> tuple[Kind, ...]:
    return _ACCEPTS.get(kind, (kind,))


def _check_kind(kind: Kind, declared: Input, text: str, where: str) -> None:
    if kind not in _accepted(declared.kind):
        raise PunaError(f"{text!r} is a {kind}", where=where, expected=f"a {declared.kind}")


def _kind_of_path(path: Path) -> Kind | None:
    """The kind of what lies at ``path``, if its files tell."""
    if (path / "corpus.json").is_file():
        return "corpus"
    is_model = (path / "config.json").is_file() or (path / "adapter_config.json").is_file()
    return "model" if is_model or path.suffix == ".gguf" else None
