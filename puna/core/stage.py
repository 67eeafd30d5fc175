"""Stages: one registered function each, with validated parameters, declared inputs and outputs.

A room keeps its stages in a light module ``stages.py`` (no torch at import); the registry imports
those modules when the first stage is asked for, so ``import puna`` stays fast.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pydantic

from puna.core.errors import PunaError, nearest, unknown_name

Kind = Literal["model", "corpus", "tokenizer", "mapping", "state", "file"]
ROOMS_WITH_STAGES = ("text", "data", "train", "decode", "evaluate", "edit", "run")


class Parameters(pydantic.BaseModel):
    """Base of every stage's parameters: frozen; an unknown key is an error, and so are nan and infinity."""

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class PlanOnly:
    """Marks a parameter that only plans go by, ``Annotated[int, PlanOnly()]``: results do not depend on it.

    It is written down with the others and is no part of the stage's fingerprint. For parameters of the
    stage itself, not for those inside another.
    """


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
    """A stage's predicted cost. ``trainable`` counts parameters; ``memory`` is its peak in bytes.

    ``tokens`` are those it works through, or, for a stage that makes a corpus, those it makes.
    ``memory`` is that of weights, gradients, optimiser, activations and data; the planner adds what
    the process itself takes. ``seconds`` of 0 means: ``flops`` at the device's achieved rate.
    ``spec`` is the decoder of the model it writes, if that differs from the one it was given, and
    ``corpora`` says how many tokens each of several output corpora holds; ``kind`` is the kind of
    rows of all of them.
    """

    tokens: float = 0.0
    trainable: int = 0
    flops: float = 0.0
    memory: float = 0.0
    seconds: float = 0.0
    spec: Any = None
    corpora: Mapping[str, float] = field(default_factory=dict)
    kind: str | None = None


StageFunction = Callable[[Context, Any], Outcome]


@dataclass(frozen=True)
class Stage:
    """A registered stage.

    ``plan(parameters, shapes)`` predicts its cost. ``reads(parameters)`` names the files and folders
    outside the run that its parameters point at: their content is part of its fingerprint. Of the
    processes that ``torchrun`` started the first one alone runs a stage, unless it is ``distributed``.
    ``resumes`` is the folder below its own in which it keeps what it goes on from after a kill: never
    thrown away unasked while the stage is unfinished, and removed when it has finished.
    """

    name: str
    function: StageFunction
    parameters: type[Parameters]
    inputs: dict[str, Input]
    outputs: dict[str, Kind]
    version: int
    plan: Callable[..., Cost] | None
    reads: Callable[[Any], Iterable[str | Path]] | None
    distributed: bool
    resumes: str | None
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
    reads: Callable[[Any], Iterable[str | Path]] | None = None,
    distributed: bool = False,
    resumes: str | None = None,
) -> Callable[[StageFunction], StageFunction]:
    """Register a function as the stage ``name``; raise ``version`` when its results change."""

    def register(function: StageFunction) -> StageFunction:
        if name in _STAGES:
            raise ValueError(f"two stages are named {name!r}")
        summary = (function.__doc__ or "").strip().splitlines()[0]
        _STAGES[name] = Stage(
            name,
            function,
            parameters,
            inputs or {},
            outputs or {},
            version,
            plan,
            reads,
            distributed,
            resumes,
            summary,
        )
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


def validate(
    model: type[Parameters],
    values: Mapping[str, Any],
    *,
    where: object | Callable[[tuple[str | int, ...]], object],
) -> Any:
    """Build ``model`` from ``values``; the first problem becomes one :class:`PunaError`.

    ``where`` is the place to name, or a function from a key's path to its place.
    """
    try:
        return model(**values)
    except pydantic.ValidationError as error:
        errors = error.errors()
        # A misspelt key is also a missing one; the spelling is what to tell. Of a value that may be of
        # several kinds, the kind that it fits deepest is meant.
        deepest = max(errors, key=lambda problem: len(problem["loc"]))
        first = next((problem for problem in errors if problem["type"] == "extra_forbidden"), deepest)
        path = _path_to(first["loc"], values, absent=first["type"] == "missing")
        key = ".".join(str(part) for part in path)
        place = where(path) if callable(where) else where
        if first["type"] == "extra_forbidden":
            names = _keys_beside(model, first["loc"])
            close = nearest(str(first["loc"][-1]), names)
            raise PunaError(
                f"unknown key {key!r}",
                where=place,
                expected=f"one of {', '.join(names)}",
                fix=f"did you mean {close!r}?" if close else None,
            ) from None
        if first["type"] == "missing":
            raise PunaError(f"key {key!r} is missing", where=place) from None
        message = first["msg"].removeprefix("Value error, ")
        found = repr(first.get("input")) if path else None
        raise PunaError(f"key {key!r}: {message}" if path else message, where=place, found=found) from None


def _path_to(location: tuple[str | int, ...], values: Any, *, absent: bool) -> tuple[str | int, ...]:
    """pydantic's location without the parts that name members of unions, which do not stand in the data."""
    path: list[str | int] = []
    for part in location:
        inside = isinstance(values, Mapping) and part in values
        inside = inside or (
            isinstance(values, (list, tuple)) and isinstance(part, int) and part < len(values)
        )
        if inside:
            values = values[part]
            path.append(part)
    if absent:
        path.append(location[-1])
    return tuple(path)


def _tags(model: type[pydantic.BaseModel]) -> list[str]:
    """The names by which a union may tell this model from its others: the values of its fixed fields."""
    return [info.default for info in model.model_fields.values() if get_origin(info.annotation) is Literal]


def models_of(annotation: Any) -> list[type[pydantic.BaseModel]]:
    """The pydantic models that a field's annotation names, inside unions and containers too."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in models_of(argument)]


def _keys_beside(model: type[pydantic.BaseModel], location: tuple[str | int, ...]) -> list[str]:
    """Keys that the model at the end of ``location`` takes."""
    models: list[type[pydantic.BaseModel]] = [model]
    for part in location[:-1]:
        fields = [m.model_fields[str(part)] for m in models if str(part) in m.model_fields]
        named = [m for m in models if part == m.__name__ or part in _tags(m)]
        models = [inner for info in fields for inner in models_of(info.annotation)] or named or models
    return sorted({name for found in models for name in found.model_fields})
