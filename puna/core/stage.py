"""Stages: one registered function each, with validated parameters, declared inputs and outputs.

A room keeps its stages in a light module ``stages.py`` (no torch at import); the registry imports
those modules when the first stage is asked for, so ``import puna`` stays fast.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pydantic

from puna.core.errors import PunaError, nearest, unknown_name

Kind = Literal["model", "corpus", "tokenizer", "mapping", "file"]
ROOMS_WITH_STAGES = ("text", "data", "train", "evaluate", "run")


class Parameters(pydantic.BaseModel):
    """Base of every stage's parameters: frozen, and an unknown key is an error."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


@dataclass(frozen=True)
class Input:
    """An input of a stage: its kind, whether it takes several under names, and if it may be absent."""

    kind: Kind
    many: bool = False
    optional: bool = False


@dataclass
class Context:
    """What a stage is given when it runs.

    ``inputs`` maps each declared input to a path (or asset name or hub id), or, where the input
    takes many, to a dictionary of them. Outputs are written below ``out``. ``report`` collects
    what the run's report shows besides the metrics: tables, curves and samples (JSON-like).
    """

    name: str
    out: Path
    inputs: Mapping[str, Any]
    seed: int = 0
    device: str = "cpu"
    dtype: str = "bfloat16"
    report: dict[str, Any] = field(default_factory=dict)


@dataclass
class Outcome:
    """What a stage leaves: paths of its outputs and its metrics by flat dotted names."""

    outputs: dict[str, Path] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Cost:
    """A stage's predicted cost. ``trainable`` counts parameters; ``memory`` is its peak in bytes."""

    tokens: float = 0.0
    trainable: int = 0
    flops: float = 0.0
    memory: float = 0.0
    seconds: float = 0.0


StageFunction = Callable[[Context, Any], Outcome]


@dataclass(frozen=True)
class Stage:
    """A registered stage."""

    name: str
    function: StageFunction
    parameters: type[Parameters]
    inputs: dict[str, Input]
    outputs: dict[str, Kind]
    version: int
    plan: Callable[..., Cost] | None
    summary: str


_STAGES: dict[str, Stage] = {}
_loaded = False


def stage(
    name: str,
    *,
    parameters: type[Parameters],
    inputs: dict[str, Input] | None = None,
    outputs: dict[str, Kind] | None = None,
    version: int = 1,
    plan: Callable[..., Cost] | None = None,
) -> Callable[[StageFunction], StageFunction]:
    """Register a function as the stage ``name``; raise ``version`` when its results change."""

    def register(function: StageFunction) -> StageFunction:
        if name in _STAGES:
            raise ValueError(f"two stages are named {name!r}")
        summary = (function.__doc__ or "").strip().splitlines()[0]
        _STAGES[name] = Stage(name, function, parameters, inputs or {}, outputs or {}, version, plan, summary)
        return function

    return register


def all_stages() -> dict[str, Stage]:
    """Every stage by name; imports the rooms' ``stages`` modules on the first call."""
    global _loaded
    if not _loaded:
        for room in ROOMS_WITH_STAGES:
            importlib.import_module(f"puna.{room}.stages")
        _loaded = True
    return dict(sorted(_STAGES.items()))


def get_stage(name: str, *, where: object = None) -> Stage:
    """The stage of that name; an unknown one is an error with the nearest name."""
    stages = all_stages()
    if name not in stages:
        raise unknown_name("stage", name, stages, where=where)
    return stages[name]


def validate(model: type[Parameters], values: Mapping[str, Any], *, where: object) -> Any:
    """Build ``model`` from ``values``; the first problem becomes one :class:`PunaError`."""
    try:
        return model(**values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            names = list(model.model_fields)
            close = nearest(str(first["loc"][-1]), names)
            raise PunaError(
                f"unknown key {key!r}",
                where=where,
                expected=f"one of {', '.join(names)}",
                fix=f"did you mean {close!r}?" if close else None,
            ) from None
        found = first.get("input")
        raise PunaError(f"key {key!r}: {first['msg']}", where=where, found=repr(found)) from None
