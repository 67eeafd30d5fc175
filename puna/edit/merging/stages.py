"""The stages of merging: ``merge``, ``delta``, ``merge_statistics``, ``merge_sweep``, ``dare_checks``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic

from puna.core.errors import PunaError, unknown_name
from puna.core.stage import Context, Cost, Input, Outcome, Parameters, PlanOnly, stage

if TYPE_CHECKING:
    from puna.edit.merging.config import MergeConfig
    from puna.edit.merging.plan import Plan

Dtype = Literal["float32", "bfloat16", "float16"]
Setting = Any
_BASE = "base"


class Mixed(Parameters):
    """A method of merging and its settings."""

    method: str = "task_arithmetic"
    """One of linear, slerp, task_arithmetic, ties, ties_global, dare_linear, dare_ties, breadcrumbs,
    breadcrumbs_ties, della, della_linear, model_stock, fisher, regmean, passthrough."""
    settings: dict[str, Setting] = pydantic.Field(default_factory=dict)
    """Settings of the method for all models: a number, a list of numbers over the layers, or a list of
    {filter, value} by tensors' names."""
    each: dict[str, dict[str, Setting]] = pydantic.Field(default_factory=dict)
    """The same for single models, by their names among the inputs."""


class Variant(Mixed):
    """One merge of a sweep."""

    models: tuple[str, ...] = ()
    """Names of the models that it merges; none means all."""


class Merge(Mixed):
    """Parameters of the stage ``merge``."""

    config: str | None = None
    """A file of mergekit's form, which names method and models itself; then there are no inputs."""
    tokenizer_source: str | None = None
    """Whose tokenizer the merged model has: base, union, or a model's name; null wants all to be the same."""
    chat_template: str | None = None
    """auto is the one that most models have; or a template in Jinja; null the tokenizer's own."""
    save_dtype: Dtype | None = None
    """What the weights are written in; null is what the config says, else float32."""

    @pydantic.model_validator(mode="after")
    def _one_way(self) -> Merge:
        given = [
            name for name in ("settings", "each", "tokenizer_source", "chat_template") if getattr(self, name)
        ]
        if self.config is not None and given:
            raise ValueError(f"{given[0]} and config are both given: the file says it all")
        return self


def _config(mixed: Mixed, inputs: dict[str, Any], names: Iterable[str], **more: Any) -> MergeConfig:
    """The merge of some models among the inputs, as a file of mergekit's form would say it."""
    from puna.edit.merging.config import parse_config
    from puna.edit.merging.stack import get_method

    names = list(names)
    for name in mixed.each:
        if name not in names:
            raise unknown_name("model", name, names, where="each")
    method = get_method(mixed.method, where="method")
    takes_base = method.over == "deltas" or method.name == "slerp"
    data: dict[str, Any] = {
        "merge_method": mixed.method,
        # A mean of weights is one of the models alone: whoever wants the base in it names it among them.
        **({"base_model": _BASE} if inputs.get("base") and takes_base else {}),
        "models": [{"model": name, "parameters": mixed.each.get(name, {})} for name in names],
        "parameters": mixed.settings,
        **{key: value for key, value in more.items() if value is not None},
    }
    return parse_config(data, where="merge")


def _plan(context: Context, config: MergeConfig) -> Plan:
    """The merge of the stage's inputs, which the config calls by their names."""
    from puna.edit.merging.config import ModelRef
    from puna.edit.merging.plan import make_plan
    from puna.edit.merging.statistics import Measured

    named = dict(context.inputs.get("models") or {})
    places = {ModelRef(name): str(path) for name, path in named.items()}
    if context.inputs.get("base"):
        places[ModelRef(_BASE)] = str(context.inputs["base"])
    kind, measured = config.method.statistics, context.inputs.get("statistics") or {}
    missing = [name for name in named if kind and measured and name not in measured]
    if missing:
        raise PunaError("nothing was measured of a model", where="in.statistics", found=missing[0])
    statistics = {ModelRef(name): Measured.open(path, kind) for name, path in measured.items() if kind}
    return make_plan(
        config,
        seed=context.seed,
        labels={model: model.path for model in places},
        statistics=statistics,
        where=places,
    )


def _names(context: Context) -> list[str]:
    names = list(context.inputs.get("models") or {})
    if not names:
        raise PunaError("there is no model to merge", where="in.models", fix="give some, or a config")
    if _BASE in names:
        raise PunaError("a model cannot be called base here", where="in.models", fix="give it as in.base")
    return names


def _plan_merge(parameters: Merge, shapes: Any) -> Cost:
    """Each model is read and the result written once; some parts of a tensor are held."""
    spec = shapes.spec
    if spec is None:
        return Cost()
    size = 4.0 * spec.parameter_count()
    return Cost(memory=1e8, seconds=shapes.device.read_seconds((len(shapes.models) + 1) * size), spec=spec)


def _read_by_merge(parameters: Merge) -> list[str | Path]:
    """The config and the models that it names, as far as they lie in the file system."""
    if parameters.config is None:
        return []
    from puna.edit.merging.config import read_config

    models = [
        part for model in read_config(parameters.config).models() for part in (model.path, model.adapter)
    ]
    return [parameters.config, *(place for place in models if place and Path(place).exists())]


@stage(
    "merge",
    parameters=Merge,
    inputs={
        "base": Input("model", optional=True),
        "models": Input("model", many=True, optional=True),
        "statistics": Input("file", many=True, optional=True),
    },
    outputs={"model": "model"},
    plan=_plan_merge,
    reads=_read_by_merge,
)
def merge(context: Context, parameters: Merge) -> Outcome:
    """Merge models into one, tensor by tensor in float32: TIES, DARE, SLERP and others.

    A model may be an adapter over its base. Time grows with models times weights; memory holds some
    millions of weights, and for regmean what belongs to one matrix.
    """
    from puna.edit.merging.config import read_config
    from puna.edit.merging.plan import make_plan
    from puna.text.pretrained import DTYPES

    if parameters.config is not None:
        if context.inputs.get("models") or context.inputs.get("base"):
            raise PunaError("a config names its models itself", where="in", fix="leave out the inputs")
        plan = make_plan(read_config(parameters.config), seed=context.seed)
    else:
        more = {"tokenizer_source": parameters.tokenizer_source, "chat_template": parameters.chat_template}
        plan = _plan(context, _config(parameters, dict(context.inputs), _names(context), **more))
    dtype = DTYPES[parameters.save_dtype or plan.config.dtype or "float32"]
    written = plan.write(context.out / "model", dtype)
    figures = {"parameters": float(plan.spec.parameter_count()), "models": float(len(plan.models))}
    return Outcome({"model": written}, figures)


class Delta(Parameters):
    """Parameters of the stage ``delta``."""

    save_dtype: Dtype | None = "float32"
    """What the delta is written in; null measures it alone."""


def _plan_delta(parameters: Delta, shapes: Any) -> Cost:
    """Both models are read four times for the quantiles, and once to write."""
    spec = shapes.spec
    size = 0.0 if spec is None else 8.0 * spec.parameter_count()
    return Cost(memory=1e8, seconds=shapes.device.read_seconds(9 * size))


@stage(
    "delta",
    parameters=Delta,
    inputs={"base": Input("model"), "model": Input("model")},
    outputs={"delta": "file"},
    plan=_plan_delta,
)
def delta(context: Context, parameters: Delta) -> Outcome:
    """Take the difference of a model from its base, and tell how large it is.

    Time grows linearly with the weights; memory holds some millions of them.
    """
    from puna.edit.merging.delta import DeltaSet
    from puna.edit.merging.study import delta_metrics
    from puna.text.pretrained import DTYPES
    from puna.text.stored_weights import Weights

    base = Weights.open(context.inputs["base"])
    taken = DeltaSet.between(base, Weights.open(context.inputs["model"]))
    outputs = {}
    if parameters.save_dtype is not None:
        outputs["delta"] = taken.write(context.out / "delta", dtype=DTYPES[parameters.save_dtype])
    return Outcome(outputs, delta_metrics(taken))


class MergeStatistics(Parameters):
    """Parameters of the stage ``merge_statistics``."""

    kind: Literal["fisher", "gram"] = "fisher"
    """fisher are squared gradients, for the method fisher; gram the products of inputs, for regmean."""
    rows: int = pydantic.Field(64, ge=1)
    """Rows of the corpus, from its beginning."""
    max_length: int = pydantic.Field(512, ge=2)
    """Tokens of a row at most."""


def _plan_statistics(parameters: MergeStatistics, shapes: Any) -> Cost:
    """Forward passes, for fisher with backward ones, and one float32 of each weight beside the weights."""
    spec = shapes.spec
    if spec is None:
        return Cost()
    count = spec.parameter_count()
    tokens = min(shapes.tokens_of("corpus"), parameters.rows * parameters.max_length)
    passes = 3 if parameters.kind == "fisher" else 1
    return Cost(tokens=tokens, flops=2.0 * passes * count * tokens, memory=4.0 * count * (passes + 1))


@stage(
    "merge_statistics",
    parameters=MergeStatistics,
    inputs={"model": Input("model"), "corpus": Input("corpus")},
    outputs={"statistics": "file"},
    plan=_plan_statistics,
)
def merge_statistics(context: Context, parameters: MergeStatistics) -> Outcome:
    """Measure of a model what Fisher merging or RegMean weigh it by, on what it was trained for.

    Time is that of training on the rows (fisher) or of reading them (gram); memory holds one float32 for
    each weight (fisher), or for each pair of inputs of a projection (gram).
    """
    from puna.edit.merging import statistics as measures
    from puna.edit.merging.study import Questions
    from puna.text import pretrained

    model = pretrained.load_merged(context.inputs["model"], dtype="float32").eval()
    asked = Questions.read(context.inputs["corpus"], model, parameters.rows, parameters.max_length)
    tensors = measures.measure(model, asked.rows, parameters.kind)
    written = measures.write(tensors, parameters.kind, context.out / f"{parameters.kind}.safetensors")
    figures = {"tensors": float(len(tensors)), "rows": float(len(asked.rows))}
    figures["mean"] = sum(float(found.mean()) for found in tensors.values()) / len(tensors)
    return Outcome({"statistics": written}, figures)


class Sweep(Parameters):
    """Parameters of the stage ``merge_sweep``."""

    variants: dict[str, Variant] = pydantic.Field(min_length=1)
    """Merges by name."""
    rows: int = pydantic.Field(64, ge=1)
    """Rows of each corpus, from its beginning."""
    expected_tokens: Annotated[int, PlanOnly()] = 4000
    """How many tokens those rows hold in all: what a plan goes by."""

    @pydantic.field_validator("variants")
    @classmethod
    def _plain_names(cls, value: dict[str, Variant]) -> dict[str, Variant]:
        if _BASE in value:
            raise ValueError("base is the name of the model that all are compared with")
        return value


def _plan_sweep(parameters: Sweep, shapes: Any) -> Cost:
    """Every variant, every model and the base read the rows; one model is held, with its parts."""
    spec = shapes.spec
    if spec is None:
        return Cost()
    scored = len(parameters.variants) + len(shapes.models)
    tokens = float(scored * parameters.expected_tokens)
    return Cost(
        tokens=tokens, flops=2.0 * spec.parameter_count() * tokens, memory=8.0 * spec.parameter_count()
    )


@stage(
    "merge_sweep",
    parameters=Sweep,
    inputs={
        "base": Input("model"),
        "models": Input("model", many=True),
        "corpora": Input("corpus", many=True),
        "statistics": Input("file", many=True, optional=True),
    },
    outputs={"scores": "file"},
    plan=_plan_sweep,
)
def merge_sweep(context: Context, parameters: Sweep) -> Outcome:
    """Merge the same models in several ways, in memory, and score each way on every corpus (S56).

    A corpus under a model's name is that model's skill: of it is told how much each merge that has the model
    in it keeps. Time grows with variants times rows; memory is that of one model.
    """
    from puna.core.files import write_json
    from puna.edit.merging.study import Questions, fill, kept
    from puna.text.pretrained import DTYPES

    names = _names(context)
    doubled = sorted(set(names) & set(parameters.variants))
    if doubled:
        raise PunaError("a variant has the name of a model", where="variants", found=doubled[0])
    ways = {name: Variant(settings={"weight": 1.0}, models=(name,)) for name in names}
    ways = {_BASE: Variant(settings={"weight": 0.0}), **ways, **parameters.variants}
    asked: dict[str, Questions] = {}
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for way, variant in ways.items():
        for name in variant.models:
            if name not in names:
                raise unknown_name("model", name, names, where=f"variants.{way}.models")
        plan = _plan(context, _config(variant, dict(context.inputs), variant.models or names))
        model = plan.shell().to(DTYPES[context.dtype])
        fill(model, plan)
        model.eval()
        for corpus, path in context.inputs["corpora"].items():
            if corpus in names and corpus not in (variant.models or names):
                continue  # the skill of a model that has no part in it
            if corpus not in asked:
                asked[corpus] = Questions.read(path, model, parameters.rows)
            scores.setdefault(way, {})[corpus] = asked[corpus].score(model)
        del model
    metrics = {
        f"{figure}.{way}.{corpus}": value
        for way, found in scores.items()
        for corpus, figures in found.items()
        for figure, value in figures.items()
    }
    metrics |= kept(scores, [name for name in names if name in asked])
    context.report["merges"] = scores
    write_json(context.out / "scores.json", scores)
    return Outcome({"scores": context.out / "scores.json"}, metrics)


class DareChecks(Parameters):
    """Parameters of the stage ``dare_checks``."""

    tensors: tuple[str, ...] = (
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
    )
    """Tensors whose elements are drawn."""
    drop_rate: float = pydantic.Field(0.9, gt=0, lt=1)
    """The paper's p: the share that is dropped."""
    draws: int = pydantic.Field(500, ge=2)
    """How often each element is drawn."""


@stage("dare_checks", parameters=DareChecks, inputs={"base": Input("model"), "model": Input("model")})
def dare_checks(context: Context, parameters: DareChecks) -> Outcome:
    """Check what DARE promises of one delta: the model itself at rate 0, and the delta as mean of many draws.

    Time grows with draws times elements; memory holds a part of a tensor.
    """
    from puna.edit.merging import study as merge_study
    from puna.edit.merging.delta import DeltaSet
    from puna.text.stored_weights import Weights

    model = Weights.open(context.inputs["model"])
    taken = DeltaSet.between(Weights.open(context.inputs["base"]), model)
    for name in parameters.tensors:
        if name not in taken.shapes:
            raise unknown_name("tensor", name, taken.shapes, where="tensors")
    alone = Context(
        context.name,
        context.out,
        {"base": context.inputs["base"], "models": {"model": context.inputs["model"]}},
        context.seed,
    )
    figures = {}
    for method in ("dare_linear", "dare_ties"):
        mixed = Mixed(method=method, settings={"weight": 1.0, "density": 1.0})
        plan = _plan(alone, _config(mixed, dict(alone.inputs), ["model"]))
        figures[f"identity_differ.{method}"] = float(merge_study.weights_that_differ(plan, model))
    figures |= merge_study.dare_checks(
        taken,
        parameters.tensors,
        density=1 - parameters.drop_rate,
        draws=parameters.draws,
        seed=context.seed,
    )
    return Outcome({}, figures)
