"""What is merged and how: mergekit's YAML read unchanged, and the value of each setting at each tensor.

A setting is a number, a list (a gradient over the layers, interpolated), or a list of ``{filter, value}`` of
which the first whose filter stands in the tensor's name applies. The more particular place wins: a model of
a slice, the slice, the whole. A key that is not known is an error with the nearest name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from puna.core.errors import PunaError, unknown_name
from puna.edit.merging import methods as merge_methods  # noqa: F401 - registers the methods
from puna.edit.merging.stack import Method, Option, get_method

_TOP = (
    "merge_method",
    "base_model",
    "models",
    "slices",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "modules",
)
_SLICE = ("sources", "base_model", "parameters")
_SOURCE = ("model", "layer_range", "parameters")
_MODEL = ("model", "parameters")
_TOKENIZER = ("source", "pad_to_multiple_of", "tokens")
_DTYPES = ("float32", "bfloat16", "float16")
_NEEDLESS = {"int8_mask"}  # of mergekit: how it lays out its masks, which changes no result


@dataclass(frozen=True)
class ModelRef:
    """A model as a file names it: a path, asset or hub id, and an adapter over it after a plus sign."""

    path: str
    adapter: str | None = None

    @classmethod
    def read(cls, value: Any, where: str) -> ModelRef:
        """Of ``base`` or ``base+adapter``."""
        if not isinstance(value, str) or not value:
            raise PunaError("not a model", where=where, found=value, expected="a path or hub id as text")
        path, _, adapter = value.partition("+")
        return cls(path, adapter or None)

    def __str__(self) -> str:
        return f"{self.path}+{self.adapter}" if self.adapter else self.path


@dataclass(frozen=True)
class Source:
    """A model in a slice, the layers of it that are taken (None: all), and its settings."""

    model: ModelRef
    layers: tuple[int, int] | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """Layers of the merged model and the models that they are made of."""

    sources: tuple[Source, ...]
    base: ModelRef | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MergeConfig:
    """A whole merge; ``text`` is what it was read from, and ``where`` what errors call it."""

    method: Method
    slices: tuple[Slice, ...]
    base: ModelRef | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    tokenizer_source: str | None = None
    pad_to_multiple_of: int | None = None
    chat_template: str | None = None
    where: str = "merge"
    text: str = ""

    def models(self) -> list[ModelRef]:
        """Every model that takes part, each once, the base first."""
        named = [self.base, *(part.base for part in self.slices)]
        named += [source.model for part in self.slices for source in part.sources]
        return list(dict.fromkeys(model for model in named if model is not None))


def read_config(path: str | Path) -> MergeConfig:
    """Read a file of mergekit's form; paths of models are relative to the working directory, as there."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        data = yaml.safe_load(text)
    except FileNotFoundError:
        raise PunaError("file not found", where=path) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise PunaError("not readable as YAML", where=path, found=error) from None
    return replace(parse_config(data, where=str(path)), text=text)


def parse_config(data: Any, *, where: str) -> MergeConfig:
    """A merge out of the mapping that such a file holds."""
    _check_keys(data, _TOP, where)
    if "merge_method" not in data:
        raise PunaError("key 'merge_method' is missing", where=where)
    if "modules" in data:
        raise PunaError(
            "models of several modules are not merged here",
            where=f"{where}: modules",
            expected="models or slices: a decoder is one module",
        )
    method = get_method(str(data["merge_method"]), where=f"{where}: merge_method")
    base = ModelRef.read(data["base_model"], f"{where}: base_model") if data.get("base_model") else None
    slices = _slices(data, base, method, where)
    tokenizer = data.get("tokenizer") or {}
    _check_keys(tokenizer, _TOKENIZER, f"{where}: tokenizer")
    if tokenizer and data.get("tokenizer_source"):
        raise PunaError("tokenizer and tokenizer_source are both given: say one", where=where)
    if tokenizer.get("tokens"):
        raise PunaError(
            "sources of single tokens are not read",
            where=f"{where}: tokenizer.tokens",
            expected="source and pad_to_multiple_of alone",
            fix="leave them out: missing rows are the base's, else the mean of the others'",
        )
    source = data.get("tokenizer_source") or tokenizer.get("source")
    return MergeConfig(
        method,
        slices,
        base,
        _parameters(data, method, where),
        _dtype(data, where),
        None if source is None else str(source),
        _multiple(tokenizer.get("pad_to_multiple_of"), where),
        data.get("chat_template"),
        where,
        yaml.safe_dump(dict(data), sort_keys=False),
    )


def _slices(data: Mapping[str, Any], base: ModelRef | None, method: Method, where: str) -> tuple[Slice, ...]:
    given = [key for key in ("models", "slices") if data.get(key)]
    if len(given) != 1:
        raise PunaError("exactly one of models and slices is needed", where=where, found=given or "neither")
    key = given[0]
    if not isinstance(data[key], list):
        raise PunaError("not a list", where=f"{where}: {key}", found=type(data[key]).__name__)
    if key == "models":
        sources = [
            _source(entry, _MODEL, method, f"{where}: models.{n}") for n, entry in enumerate(data[key])
        ]
        if base is not None and all(source.model != base for source in sources):
            sources.append(Source(base))
        slices = [Slice(tuple(sources))]
    else:
        slices = [_slice(entry, method, f"{where}: slices.{n}") for n, entry in enumerate(data[key])]
    for number, part in enumerate(slices):
        _check_sources(part, part.base or base, method, f"{where}: {key}" + f".{number}" * (key == "slices"))
    return tuple(slices)


def _slice(entry: Any, method: Method, where: str) -> Slice:
    _check_keys(entry, _SLICE, where)
    if not isinstance(entry.get("sources"), list) or not entry["sources"]:
        raise PunaError("a slice needs a list of sources", where=where, found=entry.get("sources"))
    sources = [
        _source(one, _SOURCE, method, f"{where}.sources.{n}") for n, one in enumerate(entry["sources"])
    ]
    for number, source in enumerate(sources):
        if source.layers is None:
            raise PunaError("key 'layer_range' is missing", where=f"{where}.sources.{number}")
    lengths = {source.layers[1] - source.layers[0] for source in sources if source.layers}
    if len(lengths) > 1:
        raise PunaError("sources of one slice have as many layers each", where=where, found=sorted(lengths))
    base = ModelRef.read(entry["base_model"], f"{where}.base_model") if entry.get("base_model") else None
    return Slice(tuple(sources), base, _parameters(entry, method, where))


def _source(entry: Any, keys: tuple[str, ...], method: Method, where: str) -> Source:
    _check_keys(entry, keys, where)
    if "model" not in entry:
        raise PunaError("key 'model' is missing", where=where)
    layers = entry.get("layer_range")
    if layers is not None:
        good = isinstance(layers, list) and len(layers) == 2 and all(type(end) is int for end in layers)
        if not good or not 0 <= layers[0] < layers[1]:
            raise PunaError(
                "not a range of layers",
                where=f"{where}.layer_range",
                found=layers,
                expected="[first, one past the last], counted from 0",
            )
        layers = (layers[0], layers[1])
    return Source(ModelRef.read(entry["model"], f"{where}.model"), layers, _parameters(entry, method, where))


def _check_sources(part: Slice, base: ModelRef | None, method: Method, where: str) -> None:
    """Refuse a number of models that the method does not take, a model twice, or a missing base."""
    models = [source.model for source in part.sources]
    twice = [str(model) for model in models if models.count(model) > 1]
    if twice:
        raise PunaError("a model is named twice", where=where, found=twice[0])
    needs_base = method.over == "deltas" or method.name == "slerp"
    if needs_base and base is None:
        raise PunaError(f"method {method.name!r} needs a base", where=where, fix="name it: base_model: ...")
    if needs_base and base not in models:
        raise PunaError("the base is not among the sources", where=where, found=[str(m) for m in models])
    others = [model for model in models if method.over == "weights" or model != base]
    most = method.most
    if len(others) < method.least or (most is not None and len(others) > most):
        bound = f"{method.least} or more" if most is None else f"{method.least} to {most}"
        bound = str(most) if most == method.least else bound
        kind = "models beside the base" if method.over == "deltas" else "models"
        raise PunaError(
            f"method {method.name!r} merges {bound} {kind}", where=where, found=[str(m) for m in others]
        )


def _parameters(data: Mapping[str, Any], method: Method, where: str) -> Mapping[str, Any]:
    given = data.get("parameters") or {}
    known = (*method.options, *_NEEDLESS)
    _check_keys(given, known, f"{where}: parameters", what=f"setting of method {method.name!r}")
    return {name: value for name, value in given.items() if name not in _NEEDLESS}


def _dtype(data: Mapping[str, Any], where: str) -> str | None:
    """What the weights are written in: all arithmetic is float32 whatever ``dtype`` says."""
    for key in ("out_dtype", "dtype"):
        if data.get(key) is not None:
            if data[key] not in _DTYPES:
                raise unknown_name("dtype", str(data[key]), _DTYPES, where=f"{where}: {key}")
            return str(data[key])
    return None


def _multiple(value: Any, where: str) -> int | None:
    if value is None or (type(value) is int and value > 0):
        return value
    raise PunaError("not a number of rows", where=f"{where}: tokenizer.pad_to_multiple_of", found=value)


def _check_keys(data: Any, known: Iterable[str], where: str, what: str = "key") -> None:
    if not isinstance(data, Mapping):
        raise PunaError("not a mapping", where=where, found=data)
    for key in data:
        if key not in known:
            raise unknown_name(what, str(key), known, where=where)


# ---- the value of a setting at a tensor ------------------------------------------------------------


def settings_at(
    config: MergeConfig, part: Slice, name: str, names: Mapping[ModelRef, str], depth: float
) -> dict[str, Any]:
    """Every setting of the method at the tensor ``name``: of the models in ``names`` a list, in their order.

    ``names`` has what each model calls the tensor, which is what filters look at. ``depth`` is the layer's
    place in its slice, 0 to 1, by which gradients are read; embeddings, the last norm and the head have 0.
    """
    found: dict[str, Any] = {}
    for key, option in config.method.options.items():
        shared = [part.parameters, config.parameters]
        if not option.each:
            found[key] = _resolve(key, option, shared, name, depth, config.where)
            continue
        found[key] = []
        for model, own in names.items():
            mine = [source.parameters for source in part.sources if source.model == model]
            where = f"{config.where}: {model}"
            found[key].append(_resolve(key, option, [*mine, *shared], own, depth, where))
    return found


def _resolve(
    key: str, option: Option, places: Iterable[Mapping[str, Any]], name: str, depth: float, where: str
) -> Any:
    for place in places:
        if key in place:
            value = _at(place[key], option, name, depth, f"{where}: {key}")
            if value is not None:
                return value
    if option.default is None:
        raise PunaError(f"setting {key!r} is missing", where=where, found=f"no value for {name}")
    return option.default


def _at(setting: Any, option: Option, name: str, depth: float, where: str) -> Any:
    """A setting's value at a tensor, or None if none of its filters stands in the name."""
    conditions = [setting] if isinstance(setting, Mapping) else setting
    if not isinstance(conditions, list):
        return option.check(setting, where)
    if any(isinstance(entry, Mapping) for entry in conditions):
        for entry in conditions:
            _check_keys(entry, ("filter", "value"), where)
            wanted = entry.get("filter")
            if wanted in (None, "*") or str(wanted) in name:
                return _at(entry.get("value"), option, name, depth, where)
        return None
    if not conditions:
        return None
    values = [option.check(value, where) for value in conditions]
    place = depth * (len(values) - 1)
    first = int(place)
    if any(isinstance(value, (bool, str)) for value in values):
        return values[first]
    second, share = min(first + 1, len(values) - 1), place - first
    return (1 - share) * values[first] + share * values[second]
