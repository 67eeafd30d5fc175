"""Merging models on disk, one tensor at a time: what each is made of, the arithmetic, the writing.

Everything is planned and checked before the first weight is read. Then tensor after tensor is read in parts
of some 130,000 weights, merged in float32 by its method and written at once; what stays in memory is some
parts of each model, and for methods that solve for a matrix (RegMean) the matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.core.errors import PunaError
from puna.core.files import folder_aside, write_text
from puna.core.progress import Track
from puna.edit.merging.config import MergeConfig, ModelRef, Slice, settings_at
from puna.edit.merging.delta import DeltaSet, check_same_shapes
from puna.edit.merging.methods import model_thresholds
from puna.edit.merging.stack import WHOLE_BASE, Settings, Stack
from puna.edit.merging.statistics import Measured
from puna.edit.merging.vocabulary import Vocabulary, settle_vocabulary
from puna.model.hf import write_configs
from puna.model.llama import Llama
from puna.model.spec import BlockSpec, LlamaSpec
from puna.model.tensor_writer import TensorWriter
from puna.model.weights import expected_shapes
from puna.text import pretrained
from puna.text.stored_weights import Weights, count_of, parts_of
from puna.text.template import find_template

_LAYER = "model.layers."


@dataclass(frozen=True)
class Job:
    """One tensor of the merged model: what each model calls it, and its settings."""

    name: str
    shape: tuple[int, ...]
    base: ModelRef | None
    names: Mapping[ModelRef, str]
    settings: Settings


@dataclass
class Plan:
    """A merge that was checked: the merged model's spec, and how each of its tensors is made."""

    config: MergeConfig
    spec: LlamaSpec
    jobs: list[Job]
    models: Mapping[ModelRef, Weights]
    vocabulary: Vocabulary
    statistics: Mapping[ModelRef, Measured]
    seed: int
    labels: Mapping[ModelRef, str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the merged model."""
        return {job.name: job.shape for job in self.jobs}

    def merged(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor's parts in turn, flat, float32, with its name."""
        deltas = _Deltas(self)
        thresholds = self._thresholds(deltas) if self.config.method.trims_model else {}
        with Track("merging", sum(count_of(job.shape) for job in self.jobs), "weights") as track:
            for job in self.jobs:
                for part in self._parts(job, deltas, thresholds):
                    yield job.name, part.reshape(-1)
                    track.advance(part.numel())

    def _parts(self, job: Job, deltas: _Deltas, thresholds: Mapping[ModelRef, float]) -> Iterator[Tensor]:
        method = self.config.method
        inputs = self._inputs(job)
        whole = method.taken_whole(job.settings)
        if whole is not None:
            read = deltas.base(job) if whole == WHOLE_BASE else deltas.child(job, inputs[whole])
            return (read(start, stop) for start, stop in parts_of(job.shape))
        measured = [self.statistics[model].reader(job.names[model]) for model in inputs if self.statistics]
        if method.over == "weights":
            readers = [deltas.child(job, model) for model in inputs]
        else:
            readers = [deltas.delta(job, model) for model in inputs]
        stack = Stack(
            job.name,
            job.shape,
            deltas.base(job) if method.over == "deltas" else None,
            readers,
            [self.labels[model] for model in inputs],
            self.seed,
            [thresholds[model] for model in inputs if thresholds],
            [reader for reader in measured if reader is not None],
        )
        return method.merge(stack, job.settings)

    def _inputs(self, job: Job) -> list[ModelRef]:
        """The models whose deltas are merged, or whose weights are: then with the base, and it first."""
        others = [model for model in job.names if model != job.base]
        if self.config.method.over == "deltas":
            return others
        if self.config.method.name == "slerp":
            assert job.base is not None  # checked with the config
            return [job.base, *others]
        return list(job.names)

    def _thresholds(self, deltas: _Deltas) -> dict[ModelRef, float]:
        """Of a method that trims a model as one: from which magnitude each model's elements are kept."""
        inputs = list(dict.fromkeys(model for job in self.jobs for model in self._inputs(job)))
        found = {}
        for model in inputs:
            jobs = {job.name: job for job in self.jobs if model in self._inputs(job)}
            densities = {job.settings["density"][self._inputs(job).index(model)] for job in jobs.values()}
            if len(densities) > 1:
                raise PunaError(
                    "a model that is trimmed as a whole has one density",
                    where=f"{self.config.where}: {model}",
                    found=sorted(densities),
                    fix="give one number, or take the method that trims each tensor: ties",
                )
            view = _JobDeltas(jobs, model, deltas)
            found[model] = model_thresholds([view], list(jobs), [densities.pop()])[0]
        return found

    def write(self, folder: str | Path, dtype: torch.dtype, *, shard_bytes: float = 5e9) -> Path:
        """Write the merged model with its tokenizer as a folder that transformers opens.

        The merge's config lies beside it, in mergekit's form and under mergekit's name.
        """
        target, shell = Path(folder), self.shell()
        with folder_aside(target) as aside:
            write_configs(shell.spec, dtype, aside)
            with TensorWriter(aside, self.shapes, dtype, shard_bytes=shard_bytes) as writer:
                for name, part in self.merged():
                    writer.add(name, part)
            if shell.tokenizer is not None:
                source = shell.template.source if shell.template is not None else None
                shell.tokenizer.save(aside, template=source)
            write_text(aside / "mergekit_config.yml", self.config.text)
        return target

    def shell(self) -> Llama:
        """A decoder of the merged model's spec, tokenizer and template, whose weights have no storage."""
        shell = Llama(self.spec, device="meta")
        shell.tokenizer = self.vocabulary.tokenizer
        shell.template = find_template(shell.tokenizer) if shell.tokenizer is not None else None
        pretrained.settle_tokens(shell)
        return shell


class _Deltas:
    """Readers of parts of a job's tensors, by what each model calls them."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._sets: dict[tuple[ModelRef, ModelRef], DeltaSet] = {}

    def child(self, job: Job, model: ModelRef) -> Callable[[int, int], Tensor]:
        """The model's own weights."""
        weights, name = self._weights(job, model), job.names[model]
        return lambda start, stop: weights.part(name, start, stop)

    def base(self, job: Job) -> Callable[[int, int], Tensor]:
        """The base's weights."""
        assert job.base is not None  # checked with the config
        weights, name = self._weights(job, job.base), job.names[job.base]
        if isinstance(weights, Weights):
            return lambda start, stop: weights.seen_part(name, start, stop)
        return lambda start, stop: weights.part(name, start, stop)

    def delta(self, job: Job, model: ModelRef) -> Callable[[int, int], Tensor]:
        """The model minus the base; by the :class:`DeltaSet` of the two where both have the tensor's name."""
        assert job.base is not None  # checked with the config
        name = job.names[model]
        base, other = self._plan.models[job.base], self._plan.models[model]
        # Models of other depth or vocabulary have tensors in common that are no DeltaSet's.
        if name == job.names[job.base] and base.shapes == other.shapes and not self._plan.vocabulary.rows:
            found = self._sets.setdefault((job.base, model), DeltaSet.between(base, other))
            return lambda start, stop: found.part(name, start, stop)
        mine, theirs = self.child(job, model), self.base(job)
        return lambda start, stop: mine(start, stop).sub_(theirs(start, stop))

    def _weights(self, job: Job, model: ModelRef) -> Any:
        return self._plan.vocabulary.view(job.name, model, self._plan.models[model])


@dataclass
class _JobDeltas:
    """One model's deltas by the names of the merged model's tensors."""

    jobs: Mapping[str, Job]
    model: ModelRef
    deltas: _Deltas

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: job.shape for name, job in self.jobs.items()}

    def part(self, name: str, start: int, stop: int) -> Tensor:
        return self.deltas.delta(self.jobs[name], self.model)(start, stop)


def make_plan(
    config: MergeConfig,
    *,
    seed: int,
    labels: Mapping[ModelRef, str] | None = None,
    statistics: Mapping[ModelRef, Measured] | None = None,
    where: Mapping[ModelRef, str] | None = None,
) -> Plan:
    """Open the models' headers and check that they go together; ``where`` says where they lie.

    ``labels`` name each model's random draws; without them they are counted in the order of the config.
    """
    places = where or {}
    models = {
        model: Weights.open(places.get(model, model.path), None if model in places else model.adapter)
        for model in config.models()
    }
    first = config.base or config.slices[0].sources[0].model
    vocabulary = settle_vocabulary(config, models, first)
    spec = _spec_of(config, models, first, vocabulary.size)
    if config.method.statistics and not statistics:
        raise PunaError(
            f"method {config.method.name!r} needs what was measured of each model",
            where=config.where,
            fix="measure it with the stage merge_statistics and give it as the input statistics",
        )
    jobs = [
        _job(config, name, shape, spec, vocabulary, models)
        for name, shape in expected_shapes(spec, config.where).items()
    ]
    if labels is None:
        others = [model for model in config.models() if model != config.base]
        labels = {model: str(number) for number, model in enumerate(others)}
        labels = {**labels, **({config.base: "base"} if config.base else {})}
    return Plan(config, spec, jobs, models, vocabulary, statistics or {}, seed, labels)


def _spec_of(
    config: MergeConfig, models: Mapping[ModelRef, Weights], first: ModelRef, rows: int
) -> LlamaSpec:
    """The base's spec with the layers that the slices put together."""
    spec = models[first].spec
    for model, weights in models.items():
        if weights.spec.tied != spec.tied or weights.spec.hidden_size != spec.hidden_size:
            raise PunaError(
                "models of one family have embeddings of one width, and all tie them to the head, or none",
                where=config.where,
                found=f"{model}: width {weights.spec.hidden_size}, tied {weights.spec.tied}",
                expected=f"{first}: width {spec.hidden_size}, tied {spec.tied}",
            )
    blocks: list[BlockSpec] = []
    for number, part in enumerate(config.slices):
        for source in part.sources:
            count = len(models[source.model].spec.blocks)
            if source.layers is not None and source.layers[1] > count:
                raise PunaError(
                    "the model has no such layers",
                    where=f"{config.where}: slices.{number}",
                    found=f"{list(source.layers)} of {source.model}",
                    expected=f"up to {count}",
                )
        lead = part.sources[0]
        begin, end = lead.layers or (0, len(models[lead.model].spec.blocks))
        blocks += models[lead.model].spec.blocks[begin:end]
    return spec.replace(blocks=tuple(blocks), vocab_size=rows)


def _job(
    config: MergeConfig,
    name: str,
    shape: tuple[int, ...],
    spec: LlamaSpec,
    vocabulary: Vocabulary,
    models: Mapping[ModelRef, Weights],
) -> Job:
    part, offset, length = _slice_of(config, name, spec, models)
    names = {source.model: _own_name(name, source.layers, offset) for source in part.sources}
    for model, own in names.items():
        found = models[model].shapes.get(own)
        if found != shape and not vocabulary.remaps(name):
            _refuse_shape(config, models, part, model, own, found, shape)
    depth = 0.0
    if offset is not None:
        depth = offset / (length - 1) if length > 1 else 1.0
    base = part.base or config.base
    over_deltas = config.method.over == "deltas"
    settled = {model: own for model, own in names.items() if not (over_deltas and model == base)}
    settings = settings_at(config, part, name, settled, depth)
    return Job(name, shape, base if base in names else None, names, settings)


def _refuse_shape(
    config: MergeConfig,
    models: Mapping[ModelRef, Weights],
    part: Slice,
    model: ModelRef,
    own: str,
    found: tuple[int, ...] | None,
    shape: tuple[int, ...],
) -> None:
    base = models[part.sources[0].model]
    if model != part.sources[0].model:
        check_same_shapes(base, models[model])
    raise PunaError(
        f"tensor {own!r} does not fit the merged model",
        where=f"{config.where}: {model}",
        found=list(found) if found else "none of that name",
        expected=list(shape),
        fix="merge models that were trained from one base",
    )


def _slice_of(
    config: MergeConfig, name: str, spec: LlamaSpec, models: Mapping[ModelRef, Weights]
) -> tuple[Slice, int | None, int]:
    """The slice that makes a tensor, the layer's place in it (None outside the layers), and its length."""
    if not name.startswith(_LAYER):
        return config.slices[0] if "embed_tokens" in name else config.slices[-1], None, 0
    layer = int(name.removeprefix(_LAYER).partition(".")[0])
    for part in config.slices:
        lead = part.sources[0]
        begin, end = lead.layers or (0, len(models[lead.model].spec.blocks))
        if layer < end - begin:
            return part, layer, end - begin
        layer -= end - begin
    raise AssertionError("the spec has as many layers as the slices")  # _spec_of made it so


def _own_name(name: str, layers: tuple[int, int] | None, offset: int | None) -> str:
    """What a source calls a tensor of the merged model."""
    if offset is None:
        return name
    rest = name.removeprefix(_LAYER).partition(".")[2]
    return f"{_LAYER}{offset + (layers[0] if layers else 0)}.{rest}"
