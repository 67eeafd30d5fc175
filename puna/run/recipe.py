"""Recipes: YAML in, validated stages with checked inputs out; every error names file, line and key."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import pydantic

from puna.core.errors import PunaError, nearest, unknown_name
from puna.core.stage import Parameters, PlanOnly, Stage, get_stage, models_of, validate
from puna.run import expression, source
from puna.run.references import InputBuilder, Inputs, Reference
from puna.run.source import KeyPath, Source

SYSTEMS = Path(__file__).parent.parent / "systems"
RECIPES = SYSTEMS.parent / "recipes"
"""Recipes that come with puna and are no published system: what builds a small sibling, and the like."""
ScaleName = Literal["demo", "paper"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]

_RUN_KEYS = ("seed", "device", "dtype")
_STAGE_ID = re.compile(r"[a-z][a-z0-9_]*")


class Claim(Parameters):
    """A claim of a recipe: a figure out of the metrics, and the bar it must pass."""

    name: str = pydantic.Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Short name, unique in the recipe."""
    says: str
    """The claim in one sentence."""
    value: str
    """Arithmetic over metrics: stage["metric"], + - * / **, min, max, abs, mean."""
    at_most: float | None = None
    """Passes if the figure is not above this."""
    at_least: float | None = None
    """Passes if the figure is not below this."""
    equals: float | None = None
    """Passes if the figure is this, give or take ``tolerance``."""
    tolerance: float = pydantic.Field(0.0, ge=0)
    """How far from ``equals`` the figure may be."""
    report: bool = False
    """No bar: the figure is reported whichever way it falls."""
    baseline: str | None = None
    """What the figure is compared with."""
    seeds: int = pydantic.Field(1, ge=1, le=20)
    """Runs, each with its own seed, whose mean figure is judged; for claims that depend on training."""

    @pydantic.model_validator(mode="after")
    def _one_bar(self) -> Self:
        bars = [name for name in ("at_most", "at_least", "equals") if getattr(self, name) is not None]
        if len(bars) + self.report != 1:
            raise ValueError("a claim needs exactly one of at_most, at_least, equals, or report: true")
        if self.tolerance and self.equals is None:
            raise ValueError("tolerance belongs to equals")
        return self


class Scale(Parameters):
    """What a scale changes in the recipe."""

    set: dict[str, Any] = pydantic.Field(default_factory=dict)
    """Dotted settings applied over the stages: ``stage.key: value``, or ``seed``, ``device``, ``dtype``."""
    shape: str | None = None
    """Shape ``puna plan`` takes for a model that is not on this machine (a name in shapes.yaml)."""


class Header(Parameters):
    """A recipe as it is written."""

    name: str = pydantic.Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the recipe and of its run folder."""
    system: str | None = None
    """Number of the system among the published ones, such as S01."""
    title: str
    """Title of the paper, or of what this does."""
    paper: str | None = None
    """Where the method was published, such as arXiv:2412.07633."""
    does: str | None = None
    """What it does for a user, in one line."""
    idea: tuple[str, ...] = ()
    """The idea, in about three lines."""
    licences: tuple[str, ...] = ()
    """Notes on the licences of data and weights it uses."""
    deviations: tuple[str, ...] = ()
    """Where it departs from the paper, and why."""
    seed: int = pydantic.Field(0, ge=0)
    """Every random draw derives from it."""
    device: str = pydantic.Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    """Where tensors live; "auto" takes a GPU if there is one."""
    dtype: Dtype = "auto"
    """What computations run in; "auto" is bfloat16, or float32 on a CPU that has no unit for bfloat16."""
    scale: ScaleName | None = None
    """Written into a resolved recipe: the scale its settings were resolved for."""
    stages: dict[str, dict[str, Any]] = pydantic.Field(min_length=1)
    """The stages in the order they run. Each: ``use`` (its verb), ``in`` (its inputs), and its parameters."""
    scales: dict[ScaleName, Scale] = pydantic.Field(default_factory=dict)
    """Settings for the laptop (demo) and for the paper's own size (paper)."""
    claims: tuple[Claim, ...] = ()
    """What the recipe must show."""


@dataclass(frozen=True)
class StageEntry:
    """One stage of a recipe, validated."""

    id: str
    stage: Stage
    parameters: Parameters
    inputs: Inputs

    def references(self) -> Iterator[tuple[str, Reference]]:
        """Every reference under the name of its input, ``input.name`` where the input takes several."""
        for name, value in self.inputs.items():
            if isinstance(value, Reference):
                yield name, value
            else:
                for inner, reference in value.items():
                    yield f"{name}.{inner}", reference

    def settings(self) -> dict[str, Any]:
        """All parameters, defaults too, as JSON-like values."""
        return self.parameters.model_dump(mode="json", by_alias=True)

    def deciding_settings(self) -> dict[str, Any]:
        """The parameters that the stage's result depends on: those that only plans go by are left out."""
        fields = type(self.parameters).model_fields.items()
        aside = {name for name, field in fields if any(isinstance(mark, PlanOnly) for mark in field.metadata)}
        return self.parameters.model_dump(mode="json", by_alias=True, exclude=aside)

    def resolved(self) -> dict[str, Any]:
        """The stage as a resolved recipe has it."""
        inputs: dict[str, Any] = {}
        for name, value in self.inputs.items():
            if isinstance(value, Reference):
                inputs[name] = value.resolved()
            else:
                inputs[name] = {key: reference.resolved() for key, reference in value.items()}
        return {"use": self.stage.name, **({"in": inputs} if inputs else {}), **self.settings()}


@dataclass(frozen=True)
class Recipe:
    """A recipe resolved for one scale and its overrides."""

    header: Header
    origin: str
    scale: ScaleName
    stages: dict[str, StageEntry]
    claims: dict[str, expression.Expression]

    @property
    def name(self) -> str:
        """The recipe's name."""
        return self.header.name

    def resolved(self) -> dict[str, Any]:
        """The recipe with everything spelt out: it can be run as it is."""
        said_below = {"stages", "scales", "claims", "scale"}
        about = self.header.model_dump(mode="json", exclude=said_below, exclude_none=True)
        about = {key: value for key, value in about.items() if value != []}
        shape = self.shape
        return {
            **about,
            "scale": self.scale,
            "stages": {entry.id: entry.resolved() for entry in self.stages.values()},
            **({"scales": {self.scale: {"shape": shape}}} if shape else {}),
            **({"claims": [_plain(claim) for claim in self.header.claims]} if self.header.claims else {}),
        }

    @property
    def shape(self) -> str | None:
        """The shape this scale takes for models that are not at hand."""
        scale = self.header.scales.get(self.scale)
        return scale.shape if scale else None

    def needed_for(self, ids: Iterable[str]) -> set[str]:
        """These stages and every stage they draw on."""
        needed: set[str] = set()
        waiting = list(ids)
        while waiting:
            current = waiting.pop()
            if current not in needed:
                needed.add(current)
                waiting += [ref.stage for _, ref in self.stages[current].references() if ref.stage]
        return needed


def _plain(claim: Claim) -> dict[str, Any]:
    return claim.model_dump(mode="json", exclude_none=True, exclude_defaults=True)


def system_names() -> list[str]:
    """Names of the systems that come with puna."""
    return sorted(file.stem for file in SYSTEMS.glob("*.yaml"))


def recipe_names() -> list[str]:
    """Names of all recipes that come with puna: the systems, and those that are none."""
    return sorted([*system_names(), *(file.stem for file in RECIPES.glob("*.yaml"))])


def find(recipe: str | Path) -> Path:
    """The file of a recipe: a path, or the name of one that comes with puna."""
    path = Path(recipe).expanduser()
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    if (path / "run.yaml").is_file():
        return path / "run.yaml"
    if str(recipe) in system_names():
        return SYSTEMS / f"{recipe}.yaml"
    if str(recipe) in recipe_names():
        return RECIPES / f"{recipe}.yaml"
    close = nearest(str(recipe), recipe_names())
    raise PunaError(
        f"no recipe is called {str(recipe)!r}",
        expected=f"a YAML file, a run folder, or one that comes with puna: {', '.join(recipe_names())}",
        fix=f"did you mean {close!r}?" if close else "puna systems lists them",
    )


def load_header(recipe: str | Path) -> Header:
    """What a recipe says of itself, without resolving its stages."""
    written = _read(recipe)
    header: Header = validate(Header, written.value, where=written.where)
    return header


def load(
    recipe: str | Path | Mapping[str, Any],
    scale: str | None = None,
    settings: Mapping[str, Any] | None = None,
    *,
    seed: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> Recipe:
    """Read, override and validate a recipe.

    ``recipe`` is a file, a run folder, a system's name, or a mapping. ``settings`` are dotted overrides
    (``{"lora.learning_rate": 1e-3}``), applied over those of the scale; ``seed``, ``device`` and
    ``dtype`` go over both.
    """
    written = _read(recipe)
    header: Header = validate(Header, written.value, where=written.where)
    chosen = _choose_scale(header, scale, written)
    if chosen in header.scales:
        for key, value in header.scales[chosen].set.items():
            place = written.where(("scales", chosen, "set", key))
            _apply(written, key, value, place)
    for key, value in (settings or {}).items():
        _apply(written, key, value, f"setting {key}={value}")
    for key, value in {"seed": seed, "device": device, "dtype": dtype}.items():
        if value is not None:
            _apply(written, key, value, f"option --{key}")
    header = validate(Header, written.value, where=written.where)
    stages: dict[str, StageEntry] = {}
    for identifier in header.stages:
        stages[identifier] = _build_stage(written, identifier, header.stages, stages)
    return Recipe(header, written.name, chosen, stages, _parse_claims(header, written, stages))


def _read(recipe: str | Path | Mapping[str, Any]) -> Source:
    if isinstance(recipe, Mapping):
        # A copy made by writing and reading it: overrides must not reach the caller's mapping.
        return source.parse(source.dump(dict(recipe)), "recipe")
    written = source.read(find(recipe))
    if not isinstance(written.value, dict):
        raise PunaError(
            "a recipe is a mapping of keys", where=written.name, found=type(written.value).__name__
        )
    return written


def _choose_scale(header: Header, scale: str | None, written: Source) -> ScaleName:
    if scale is not None and scale not in ("demo", "paper"):
        raise unknown_name("scale", scale, ("demo", "paper"))
    chosen: ScaleName = "paper" if (scale or header.scale) == "paper" else "demo"
    if header.scale is not None and chosen != header.scale:
        raise PunaError(
            f"this recipe was resolved for the scale {header.scale!r}",
            where=written.where(("scale",)),
            found=f"--scale {chosen}",
            fix="take the recipe it was made from",
        )
    if header.scales and header.scale is None and chosen not in header.scales:
        raise unknown_name("scale", chosen, header.scales, where=written.where(("scales",)))
    return chosen


def _apply(written: Source, key: str, value: Any, origin: str) -> None:
    """Apply one dotted setting."""
    parts = key.split(".")
    stages = written.value["stages"]
    if len(parts) == 1:
        if key not in _RUN_KEYS:
            raise PunaError(
                f"setting {key!r} names no stage",
                where=origin,
                expected=f"stage.key, or one of {', '.join(_RUN_KEYS)}",
                fix=f"stages are {', '.join(stages)}",
            )
        written.put((key,), value, origin)
        return
    identifier = _either_spelling(parts[0], stages)
    if identifier not in stages:
        raise unknown_name("stage", parts[0], stages, where=origin)
    path: KeyPath = tuple(parts[1:])
    if parts[1] not in ("use", "in"):
        path = spell_keys(_stage_of(written, identifier).parameters, parts[1:])
    written.put(("stages", identifier, *path), value, origin)


def _either_spelling(key: str, known: Mapping[str, Any]) -> str:
    return key if key in known else key.replace("-", "_")


def spell_keys(model: type[pydantic.BaseModel], parts: list[str]) -> tuple[str, ...]:
    """Keys as a stage's parameters spell them: hyphens stand for underscores wherever a field is meant.

    Keys of plain mappings (names the user chose) are left as they are.
    """
    spelt: list[str] = []
    models = [model]
    for part in parts:
        name = part.replace("-", "_") if models else part
        fields = [m.model_fields[name] for m in models if name in m.model_fields]
        spelt.append(name if fields or models else part)
        models = [inner for info in fields for inner in models_of(info.annotation)]
    return tuple(spelt)


def _stage_of(written: Source, identifier: str) -> Stage:
    """The registered stage that the stage ``identifier`` of a recipe uses."""
    where = f"{written.where(('stages', identifier, 'use'))}, stage {identifier}"
    verb = written.value["stages"][identifier].get("use")
    if not isinstance(verb, str):
        raise PunaError("key 'use' is missing: it says which stage this is", where=where, found=verb)
    return get_stage(verb, where=where)


def _build_stage(
    written: Source, identifier: str, bodies: Mapping[str, dict[str, Any]], earlier: Mapping[str, StageEntry]
) -> StageEntry:
    path: KeyPath = ("stages", identifier)
    if (
        not _STAGE_ID.fullmatch(identifier)
        or keyword.iskeyword(identifier)
        or identifier in expression.FUNCTIONS
    ):
        raise PunaError(
            f"{identifier!r} cannot name a stage",
            where=written.where(path),
            expected="small letters, digits and underscores, a letter first, and not a word claims use",
        )
    stage = _stage_of(written, identifier)
    body = {key: value for key, value in bodies[identifier].items() if key != "use"}
    given = body.pop("in", None) or {}
    if not isinstance(given, Mapping):
        raise PunaError(
            "'in' maps inputs to what they are", where=f"{written.where((*path, 'in'))}", found=given
        )
    parameters = validate(
        stage.parameters, body, where=lambda key: f"{written.where((*path, *key))}, stage {identifier}"
    )
    before = {name: entry.stage for name, entry in earlier.items()}
    inputs = InputBuilder(written, identifier, stage, before, bodies).build(given)
    return StageEntry(identifier, stage, parameters, inputs)


def _parse_claims(
    header: Header, written: Source, stages: Mapping[str, StageEntry]
) -> dict[str, expression.Expression]:
    parsed: dict[str, expression.Expression] = {}
    for index, claim in enumerate(header.claims):
        where = f"{written.where(('claims', index, 'value'))}, claim {claim.name}"
        if claim.name in parsed:
            raise PunaError(f"two claims are called {claim.name!r}", where=where)
        parsed[claim.name] = expression.parse(claim.value, where=where)
        for name in parsed[claim.name].stages:
            if name not in stages:
                raise unknown_name("stage", name, stages, where=where)
    return parsed
