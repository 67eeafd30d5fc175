"""Pipelines: lists of steps as data. Presets are such lists in files that come with puna.

A step names an operator under its kind, with its settings, or is a gate::

    - {map: c4.lines, settings: {min_words: 3}}
    - score: gopher.words
    - gate: {name: words, signal: gopher.words.word_count, minimum: 50, maximum: 100000}
    - {global: dedup.minhash, settings: {threshold: 0.7}}
    - include: gopher

An operator that is used twice is told apart by ``as``, the name under which its signals are stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml

from puna.core.errors import PunaError, nearest, unknown_name
from puna.core.files import fingerprint
from puna.core.stage import Parameters, validate
from puna.data.curate.gates import Condition, Gate, characters_of
from puna.data.curate.operator import Kind, Operator, all_operators, get_operator

PRESETS = Path(__file__).parent / "presets"
_KINDS = ("extract", "map", "score", "global")
_KEYS = (*_KINDS, "gate", "include")


@dataclass(frozen=True)
class Step:
    """An operator with its settings, or a gate; ``label`` is unique in its pipeline."""

    label: str
    operator: Operator | None = None
    settings: Parameters | None = None
    gate: Gate | None = None

    @property
    def kind(self) -> str:
        """extract, map, score, global or gate."""
        return "gate" if self.operator is None else self.operator.kind

    @property
    def needs_all(self) -> bool:
        """Whether it can only be worked out when all documents have come to it."""
        return self.kind == "global" or (self.gate is not None and self.gate.needs_all)

    def as_json(self) -> dict[str, Any]:
        """The step as plain values: what its results depend on."""
        if self.gate is not None:
            return {"gate": self.gate.model_dump(mode="json", exclude_defaults=True)}
        assert self.operator is not None and self.settings is not None
        return {
            self.operator.kind: self.operator.name,
            "as": self.label,
            "settings": self.settings.model_dump(mode="json"),
            "version": self.operator.version,
        }

    def signals(self) -> dict[str, bool]:
        """Full names of the signals it stores, and whether each is of spans."""
        if self.operator is None:
            return {}
        numbers = {f"{self.label}.{name}": False for name in self.operator.signals}
        return numbers | {f"{self.label}.{name}": True for name in self.operator.spans}

    def columns(self) -> dict[str, bool]:
        """Like :meth:`signals`, with the documents' characters that are stored beside spans."""
        beside = {characters_of(self.label): False} if self.operator and self.operator.spans else {}
        return self.signals() | beside


@dataclass(frozen=True)
class Phase:
    """Steps that a shard goes through alone, after ``entry``, which needed all shards (None at first).

    ``closing`` is the step that needs all shards and comes next, if it is an operator: shards are
    sketched for it at the end of the phase.
    """

    index: int
    entry: Step | None
    steps: tuple[Step, ...]
    closing: Step | None = None


@dataclass(frozen=True)
class Pipeline:
    """A named list of steps, checked: every gate reads a signal that an earlier step stores."""

    name: str
    steps: tuple[Step, ...]
    source: str = ""
    notes: tuple[str, ...] = field(default=())

    def phases(self) -> list[Phase]:
        """The steps cut before each one that needs all shards."""
        runs: list[tuple[Step | None, list[Step]]] = [(None, [])]
        for step in self.steps:
            if step.needs_all:
                runs.append((step, []))
            else:
                runs[-1][1].append(step)
        closing = [entry for entry, _ in runs[1:]] + [None]
        return [Phase(i, run[0], tuple(run[1]), closing[i]) for i, run in enumerate(runs)]

    def signals(self) -> dict[str, bool]:
        """Full names of all stored signals, and whether each is of spans."""
        return {name: spans for step in self.steps for name, spans in step.signals().items()}

    def gates(self) -> list[Gate]:
        """Its gates in order."""
        return [step.gate for step in self.steps if step.gate is not None]

    def as_json(self) -> dict[str, Any]:
        """The pipeline as plain values."""
        return {"name": self.name, "source": self.source, "steps": [step.as_json() for step in self.steps]}

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with its steps."""
        return fingerprint([step.as_json() for step in self.steps])


def preset_names() -> list[str]:
    """Names of the presets that come with puna."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def preset_about(name: str) -> dict[str, Any]:
    """What a preset's file says of it (``source``, ``does``, ``notes``), and its ``steps`` as they stand."""
    return dict(_read(name))


def load_pipeline(
    name: str,
    *,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    gates: Mapping[str, Mapping[str, Any]] | None = None,
) -> Pipeline:
    """A preset by name, or a pipeline from a YAML file.

    ``settings`` by a step's name and ``gates`` by a gate's name replace single values of it.
    """
    return make_pipeline(_read(name), where=name, settings=settings, gates=gates)


def make_pipeline(
    value: Any,
    *,
    where: object = "pipeline",
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    gates: Mapping[str, Mapping[str, Any]] | None = None,
) -> Pipeline:
    """A pipeline from plain values: a mapping with ``steps``, or the list of steps alone."""
    described = value if isinstance(value, Mapping) else {"steps": value}
    _known_keys(described, ("name", "source", "does", "notes", "steps"), where)
    changes = _Changes(dict(settings or {}), dict(gates or {}))
    steps = tuple(changes.applied(_steps(described.get("steps"), where, ()), where))
    _check(steps, where)
    notes = described.get("notes") or []
    return Pipeline(
        str(described.get("name", where)), steps, str(described.get("source", "")), tuple(map(str, notes))
    )


def _read(name: str) -> Any:
    path = PRESETS / f"{name}.yaml"
    if not path.is_file():
        path = Path(name)
        if path.suffix not in (".yaml", ".yml"):
            raise unknown_name("preset", name, preset_names())
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PunaError("file not found", where=path) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PunaError("not valid YAML", where=path, found=error) from None


def _steps(value: Any, where: object, inside: tuple[str, ...]) -> list[tuple[str, dict[str, Any]]]:
    """Each step as its key and its mapping, with the included pipelines' steps in place."""
    if not isinstance(value, list) or not value:
        found = "none" if value in (None, []) else type(value).__name__
        raise PunaError("a pipeline is a list of steps", where=where, found=found)
    steps: list[tuple[str, dict[str, Any]]] = []
    for number, given in enumerate(value, start=1):
        place = f"{where}: step {number}"
        if not isinstance(given, Mapping):
            raise PunaError("a step is a mapping", where=place, found=repr(given))
        keys = [key for key in given if key in _KEYS]
        if len(keys) != 1:
            close = nearest(str(next(iter(given), "")), _KEYS)
            raise PunaError(
                "a step has one of the keys of steps",
                where=place,
                found=", ".join(map(str, given)),
                expected=f"one of {', '.join(_KEYS)}",
                fix=f"did you mean {close!r}?" if close and not keys else None,
            )
        if keys[0] == "include":
            name = str(given["include"])
            _known_keys(given, ("include",), place)
            if name in inside:
                raise PunaError("pipelines include one another", where=place, found=" -> ".join(inside))
            included = _read(name)
            steps += _steps(included.get("steps"), name, (*inside, name))
        else:
            steps.append((keys[0], {"where": place, **given}))
    return steps


@dataclass
class _Changes:
    """Values that replace those of single steps; one that names no step is an error."""

    settings: dict[str, Mapping[str, Any]]
    gates: dict[str, Mapping[str, Any]]

    def applied(self, steps: Sequence[tuple[str, dict[str, Any]]], where: object) -> list[Step]:
        made = [
            self._gate(given) if key == "gate" else self._operator(cast(Kind, key), given)
            for key, given in steps
        ]
        labels = [step.label for step in made]
        known = {step.label for step in made if step.gate is None}
        for name in self.settings:
            if name not in known:
                raise unknown_name("step", name, known, where=f"{where}: settings")
        for name in self.gates:
            if name not in labels or name in known:
                raise unknown_name("gate", name, set(labels) - known, where=f"{where}: gates")
        for label in labels:
            if labels.count(label) > 1:
                fix = "tell one apart: {as: ..., ...}"
                raise PunaError("two steps have the same name", where=where, found=label, fix=fix)
        return made

    def _gate(self, given: dict[str, Any]) -> Step:
        _known_keys(given, ("gate", "where"), given["where"])
        value = given["gate"]
        if not isinstance(value, Mapping):
            raise PunaError("a gate is a mapping", where=given["where"], found=repr(value))
        # YAML reads the key null as nothing.
        named = {"null" if key is None else key: entry for key, entry in value.items()}
        changed = {**named, **self.gates.get(str(value.get("name")), {})}
        gate = validate(Gate, changed, where=f"{given['where']}: gate {value.get('name', '')}".rstrip())
        return Step(gate.name, gate=gate)

    def _operator(self, kind: Kind, given: dict[str, Any]) -> Step:
        where = given["where"]
        _known_keys(given, (kind, "settings", "as", "where"), where)
        operator = get_operator(kind, str(given[kind]), where=where)
        label = str(given.get("as", operator.name))
        values = {**(given.get("settings") or {}), **self.settings.get(label, {})}
        return Step(label, operator, validate(operator.settings, values, where=f"{where}: {label}"))


def _check(steps: Sequence[Step], where: object) -> None:
    """Raise unless every gate reads what an earlier step stores, reduced if it is of spans."""
    stored: dict[str, bool] = {}
    edited = False
    for step in steps:
        if step.kind == "extract" and edited:
            raise PunaError("pages are extracted before anything else", where=where, found=step.label)
        edited = edited or step.kind != "extract"
        if step.gate is not None:
            for condition in (step.gate, step.gate.when):
                if condition is not None:
                    _check_condition(condition, stored, f"{where}: gate {step.label}")
        stored |= step.signals()


def _check_condition(condition: Condition, stored: Mapping[str, bool], where: str) -> None:
    if condition.signal not in stored:
        makers = [each for each in all_operators() if condition.signal in each.signal_names()]
        if makers:
            raise PunaError(
                "no step before the gate stores this signal",
                where=where,
                found=condition.signal,
                fix=f"put {{{makers[0].kind}: {makers[0].name}}} before it",
            )
        raise unknown_name("signal", condition.signal, stored, where=where)
    if stored[condition.signal] and condition.reduce is None:
        raise PunaError(
            "a signal of parts of documents becomes one number first",
            where=where,
            found=condition.signal,
            fix="say how: {reduce: mean, ...}",
        )
    if not stored[condition.signal] and condition.reduce is not None:
        raise PunaError("this signal is one number already", where=where, found=condition.signal)


def _known_keys(value: Mapping[str, Any], known: Sequence[str], where: object) -> None:
    for key in value:
        if key not in known:
            raise unknown_name("key", str(key), [name for name in known if name != "where"], where=where)
