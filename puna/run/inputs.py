"""A stage's inputs: their fingerprints, what the stage is given, what is written down of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from puna.run import fingerprints
from puna.run.recipe import StageEntry
from puna.run.record import StageRecord

Records = Mapping[str, StageRecord]


def fingerprints_of(entry: StageEntry, records: Records) -> tuple[dict[str, str], list[str]]:
    """Fingerprints of the inputs by name, and the stages that must run before the others are known."""
    found: dict[str, str] = {}
    waiting: list[str] = []
    for name, reference in entry.references():
        if reference.stage is None:
            found[name] = fingerprints.of_reference(reference)
        elif reference.stage in records:
            found[name] = records[reference.stage].about_output(reference.output)["fingerprint"]
        elif reference.stage not in waiting:
            waiting.append(reference.stage)
    return found, waiting


def given_to(entry: StageEntry, records: Records) -> dict[str, Any]:
    """The inputs as the stage gets them: paths of outputs and files, names of assets and hub ids."""
    values: dict[str, Path | str] = {}
    for name, reference in entry.references():
        if reference.stage is not None:
            values[name] = records[reference.stage].output(reference.output).absolute()
        else:
            text = reference.resolved()
            values[name] = Path(text) if reference.origin == "path" else text
    return _nested(values)


def written_down(entry: StageEntry, prints: Mapping[str, str]) -> dict[str, Any]:
    """The inputs as stage.json names them."""
    values = {}
    for name, reference in entry.references():
        values[name] = {
            "reference": reference.resolved(),
            "origin": reference.origin,
            "fingerprint": prints[name],
        }
    return _nested(values)


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """``{"a.b": x}`` as ``{"a": {"b": x}}``."""
    nested: dict[str, Any] = {}
    for name, value in values.items():
        outer, _, inner = name.partition(".")
        if inner:
            nested.setdefault(outer, {})[inner] = value
        else:
            nested[outer] = value
    return nested
