"""Parameters of the stage ``train``: what is mixed how, how the rate moves, what is added. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic

from puna.core.stage import Parameters
from puna.data.caps import Cap
from puna.model.search_space import SearchSpace
from puna.model.spec import LlamaSpec
from puna.train.schedule import Part, Shape

Weights = dict[str, Annotated[float, pydantic.Field(ge=0)]]
Length = (
    Annotated[int, pydantic.Field(ge=1)]
    | Annotated[float, pydantic.Field(gt=0, le=1)]
    | Literal["phase", "rest"]
)
WITH_REFERENCE = ("dpo", "length_normalised_dpo", "ipo")
"""Objectives that compare with the model as it is before training."""
WITH_TEACHER = ("distill", "distill_sft")
"""Objectives that learn from another model."""
_SHAPES: tuple[Shape, ...] = ("warmup", "constant", "linear", "cosine", "decay", "inverse_sqrt", "step")
_FALLING: tuple[Shape, ...] = ("linear", "cosine", "decay")


class ScheduleSegment(Parameters):
    """One segment of a learning-rate schedule: its shape with its length in steps (``100``), as a share of
    the run (``0.1``), to the end of the mixture's ``phase``, or ``rest``. Factors are those of
    ``learning_rate``."""

    warmup: Length | None = None
    """Rises in equal steps."""
    constant: Length | None = None
    """Stays."""
    linear: Length | None = None
    """A straight line."""
    cosine: Length | None = None
    """Half a cosine."""
    decay: Length | None = None
    """Falls as 1 - sqrt."""
    inverse_sqrt: Length | None = None
    """Falls as the inverse square root of the steps."""
    step: Length | None = None
    """Falls by a factor now and then."""
    start: float | None = pydantic.Field(None, ge=0)
    """Factor it begins at; null goes on from the segment before, a run's first at 1, its warm-up at 0."""
    to: float | None = pydantic.Field(None, ge=0)
    """Factor it ends at; null is 1 for a warm-up, 0 for linear, cosine and decay."""
    timescale: int = pydantic.Field(10_000, ge=1)
    """inverse_sqrt: steps in which the rate falls to 0.71."""
    step_size: int = pydantic.Field(1000, ge=1)
    """step: steps between two drops."""
    gamma: float = pydantic.Field(0.5, gt=0, le=1)
    """step: the factor of a drop."""

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> ScheduleSegment:
        shapes = list(self._lengths())
        if len(shapes) != 1:
            raise ValueError(f"a segment of a schedule has one shape: one of {', '.join(_SHAPES)}")
        read_by = {"to": ("warmup", *_FALLING), "timescale": ("inverse_sqrt",)}
        read_by |= {"step_size": ("step",), "gamma": ("step",)}
        for name, names in read_by.items():
            changed = getattr(self, name) != ScheduleSegment.model_fields[name].default
            if changed and shapes[0] not in names:
                raise ValueError(
                    f"{name} means nothing in a segment {shapes[0]!r}, only in {', '.join(names)}"
                )
        return self

    def _lengths(self) -> dict[Shape, Length]:
        """Each shape that is given, with its length."""
        every: dict[Shape, Length | None] = {
            "warmup": self.warmup,
            "constant": self.constant,
            "linear": self.linear,
            "cosine": self.cosine,
            "decay": self.decay,
            "inverse_sqrt": self.inverse_sqrt,
            "step": self.step,
        }
        return {shape: length for shape, length in every.items() if length is not None}

    def part(self) -> Part:
        """The segment for :func:`puna.train.schedule.compose`."""
        ((shape, length),) = self._lengths().items()
        return Part(shape, length, self.start, self.to, self.timescale, self.step_size, self.gamma)


def check_segments(segments: tuple[ScheduleSegment, ...], *, phases: bool) -> None:
    """Refuse segments that no run could be covered by, or that go by ``phases`` that are not there."""
    if not segments:
        raise ValueError("a schedule has at least one segment")
    lengths = [segment.part().length for segment in segments]
    if "phase" in lengths and not phases:
        raise ValueError("a segment ends with a phase, and mixture has no phases")
    if "rest" in lengths[:-1]:
        raise ValueError("only the last segment of a schedule can take the rest")
    shares = sum(length for length in lengths if isinstance(length, float))
    if shares > 1 + 1e-9:
        raise ValueError(f"the segments of the schedule are {shares:g} of the run")


class Children(Parameters):
    """Sub-networks of a model by their sizes: some of its layers, the first channels of each feed-forward."""

    layers: tuple[Annotated[int, pydantic.Field(ge=1)], ...] = pydantic.Field(min_length=1)
    """Numbers of layers that a child may have, that of the whole model among them."""
    widths: tuple[Annotated[float, pydantic.Field(gt=0, le=1)], ...] = pydantic.Field(
        (1.0, 0.5), min_length=1
    )
    """Shares of its channels that each feed-forward may have, 1 among them."""
    leaving: Literal["last", "spread"] | tuple[Annotated[int, pydantic.Field(ge=0)], ...] = "spread"
    """Which layers a shallower child is without: the last; those that lie evenly between the ends; or layers
    by number, counted from 0, the first to leave first."""

    def space(self, spec: LlamaSpec) -> SearchSpace:
        """The children of a decoder of ``spec``; sizes that it does not have are an error."""
        return SearchSpace.of(spec, self.layers, self.widths, self.leaving)


class Phase(Parameters):
    """A part of the run with weights of its own."""

    weights: Weights = pydantic.Field(min_length=1)
    """Shares of tokens by source, in any unit; a source that is left out rests."""
    tokens: int | None = pydantic.Field(None, ge=1)
    """Tokens of the phase; the run is as long as its phases."""
    share: float | None = pydantic.Field(None, gt=0, le=1)
    """The same as a share of max_tokens."""

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Phase:
        if (self.tokens is None) == (self.share is None):
            raise ValueError("a phase says either tokens or share")
        _check_weights(self.weights)
        return self


class Feedback(Parameters):
    """Weights that follow the perplexity of held-out text: a source that got worse gains share."""

    every_steps: int = pydantic.Field(ge=1)
    """Optimiser steps between two changes of the weights."""
    strength: float = pydantic.Field(0.5, gt=0)
    """How far one change goes."""
    importance: Weights = pydantic.Field(default_factory=dict)
    """Times the strength, by source; 1 where nothing is said. A source of 0 keeps its weight, and the others
    share the rest."""

    @pydantic.model_validator(mode="after")
    def _stays_positive(self) -> Feedback:
        if self.strength * max([1.0, *self.importance.values()]) >= 1:
            raise ValueError("strength times importance must stay below 1: a weight would become negative")
        return self


class Mixture(Parameters):
    """What of which source a run reads: shares of tokens, not of documents."""

    by: Literal["corpus", "source"] = "corpus"
    """What a source is: a corpus, by the name it is given under, or what the rows' column source says."""
    weights: Weights | None = None
    """Shares of tokens by source, in any unit; null takes what the sources hold."""
    phases: tuple[Phase, ...] = ()
    """Weights that change in the course of the run."""
    epoch_tokens: int | None = pydantic.Field(None, ge=1)
    """Tokens of an epoch; null makes the run one epoch."""
    draw: Literal["next", "same", "anew"] = "next"
    """What an epoch holds: the next rows, the same as the first in another order, or a new draw from all."""
    repeat: int | dict[str, Annotated[int, pydantic.Field(ge=1)]] = 1
    """Passes through a source, for all or by source: through the run with draw next, else within an epoch."""
    when_short: Literal["error", "stop"] = "error"
    """What happens when a source has no row left: an error before the start, or the run ends there."""
    caps: dict[str, Cap] = pydantic.Field(default_factory=dict)
    """At most so much of a source; which rows is drawn."""
    feedback: Feedback | None = None
    """Change the weights by how held-out text of the same names fares."""

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Mixture:
        if self.weights is not None:
            _check_weights(self.weights)
        if isinstance(self.repeat, int) and self.repeat < 1:
            raise ValueError("repeat is at least 1")
        if self.draw != "next" and self.epoch_tokens is None:
            raise ValueError(f"draw {self.draw!r} means nothing without epoch_tokens")
        stops = self.when_short == "stop"
        for name, set_, others in (
            ("phases", bool(self.phases), {"weights": self.weights, "epoch_tokens": self.epoch_tokens}),
            ("feedback", self.feedback, {"phases": self.phases, "epoch_tokens": self.epoch_tokens}),
            ("when_short 'stop'", stops, {"phases": self.phases, "feedback": self.feedback}),
            ("when_short 'stop'", stops, {"epoch_tokens": self.epoch_tokens}),
        ):
            clash = next((other for other, value in others.items() if value), None)
            if set_ and clash:
                raise ValueError(f"{name} and {clash} cannot go together")
        if len({phase.tokens is None for phase in self.phases}) > 1:
            raise ValueError("all phases say tokens, or all say share")
        shares = [phase.share for phase in self.phases if phase.share is not None]
        if shares and not math.isclose(sum(shares), 1.0, abs_tol=1e-9):
            raise ValueError(f"the shares of the phases add up to {sum(shares):g}, not to 1")
        if not self.weighs and (self.repeat != 1 or stops):
            raise ValueError(
                "repeat and when_short mean nothing without weights, phases, epoch_tokens or feedback: an "
                "epoch then takes every row once"
            )
        return self

    @property
    def weighs(self) -> bool:
        """Whether rows are drawn by weights; else the mixture only caps and counts."""
        return bool(self.weights or self.phases or self.epoch_tokens or self.feedback)

    def check_limits(self, limits: Mapping[str, int | None]) -> None:
        """Refuse limits of the run (epochs, max_steps, max_tokens) that do not go with this mixture."""
        given = [name for name, value in limits.items() if value is not None]
        if self.phases and self.phases[0].tokens is not None and given:
            raise ValueError(f"{given[0]} and the tokens of the phases are both given: a run has one limit")
        if self.phases and self.phases[0].share is not None and given != ["max_tokens"]:
            raise ValueError("phases by share need max_tokens: shares of what?")
        if self.feedback and given != ["max_steps"]:
            raise ValueError("feedback needs max_steps: it changes how many tokens a step holds")
        open_end = self.weights and not (self.phases or self.feedback or self.epoch_tokens)
        if open_end and not set(given) & {"max_steps", "max_tokens"} and self.when_short != "stop":
            raise ValueError(
                "a mixture by weights needs to know how many tokens it mixes: give max_tokens, max_steps or "
                "mixture.epoch_tokens, or set mixture.when_short: stop to end with the first empty source"
            )
        if open_end and limits["epochs"] not in (None, 1):
            raise ValueError("epochs of a mixture by weights need mixture.epoch_tokens: an epoch of what?")

    def planned_tokens(self, available: Mapping[str, float], epochs: int | None) -> float:
        """Tokens of the run, where neither max_steps nor max_tokens says so, from those of the sources."""
        if self.phases and self.phases[0].tokens is not None:
            return float(sum(phase.tokens or 0 for phase in self.phases))
        if self.epoch_tokens is not None:
            return float(self.epoch_tokens * (epochs or 1))
        capped = {
            name: min(tokens, self.caps[name].tokens or math.inf) if name in self.caps else tokens
            for name, tokens in available.items()
        }
        if self.weights and capped.keys() >= self.weights.keys():
            total = sum(self.weights.values())
            passes = {name: self.passes(name) for name in self.weights}
            return min(
                capped[name] * passes[name] * total / weight
                for name, weight in self.weights.items()
                if weight
            )
        return sum(capped.values()) * (epochs or 1)

    def passes(self, source: str) -> int:
        """How many passes through a source are allowed."""
        return self.repeat if isinstance(self.repeat, int) else self.repeat.get(source, 1)


def _check_weights(weights: Mapping[str, float]) -> None:
    if not sum(weights.values()) > 0:
        raise ValueError("weights that are all 0 choose nothing")


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Lora(Parameters):
    """A low-rank adapter; everything it does not name is frozen."""

    r: int = pydantic.Field(8, ge=1)
    """Rank."""
    alpha: float = pydantic.Field(16.0, gt=0)
    """The adapter's output is multiplied by alpha / r."""
    dropout: float = pydantic.Field(0.0, ge=0, lt=1)
    """Share of the adapter's inputs that are dropped in training."""
    target: tuple[str, ...] = pydantic.Field(PROJECTIONS, min_length=1)
    """Projections that are adapted, by the end of their name."""
    rslora: bool = False
    """Multiply by alpha / sqrt(r) instead."""
    full: tuple[str, ...] = ()
    """Modules trained in full beside it, such as [embed_tokens, lm_head]; tied ones are one matrix."""
    dora: bool = False
    """Learn a magnitude for each row of an adapted matrix too (DoRA)."""
    base: Literal["as_is", "nf4"] = "as_is"
    """nf4 holds the frozen projections in 4 bits (QLoRA); the model that is left is the decoded base with the
    adapter merged in."""


class Compatible(Parameters):
    """Where a distillation learns from an earlier version of the model, the input ``older``, in place of the
    teacher, so that what that version had right stays right (S58)."""

    where: Literal["student_wrong", "older_right", "everywhere"] = "student_wrong"
    """student_wrong: at tokens that are not the student's likeliest one, as it is in that step; older_right:
    at those that the earlier version finds likeliest; everywhere: plain distillation from it."""
    cross_entropy: float = pydantic.Field(0.0, ge=0)
    """Weight of the cross-entropy of the text's own tokens beside it, for a version that was far weaker."""


class LightAdapter(Parameters):
    """Attention prompts, scales, biases and norms; everything else is frozen (S09)."""

    kind: Literal["llama_adapter", "llama_adapter_v2"] = "llama_adapter_v2"
    """llama_adapter trains prompts and gates alone; v2 also a scale and a bias of each matrix, and norms."""
    prompt_length: int = pydantic.Field(10, ge=0)
    """Vectors of a layer's prompt; 0 leaves prompts out."""
    prompt_layers: int | None = pydantic.Field(None, ge=1)
    """So many of the last layers have a prompt; null: all but the first."""

    @pydantic.model_validator(mode="after")
    def _trains_something(self) -> LightAdapter:
        if self.kind == "llama_adapter" and not self.prompt_length:
            raise ValueError("an adapter of prompts alone needs a prompt_length of at least 1")
        return self


def check_teacher(train: Any) -> None:
    """Refuse parameters of the stage ``train`` that do not go with a teacher, or with one that is stored."""
    if train.store_teacher and train.top_k is None:
        raise ValueError("store_teacher keeps the teacher's likeliest tokens: say how many with top_k")
    if train.store_teacher and train.hidden_cosine:
        raise ValueError("hidden_cosine needs hidden states, which store_teacher does not keep")
    if train.compatible and train.hidden_cosine:
        raise ValueError("hidden_cosine does not go with compatible: which version's hidden states?")
    if train.objective in WITH_TEACHER and train.sharding == "full":
        raise ValueError(f"objective {train.objective!r} does not go with sharding 'full' yet")


class Twins(Parameters):
    """Of a model with expanded layers the twins and their mergers are trained, all else is frozen (S02)."""

    divergence: Literal["cosine", "mse", "none"] = "cosine"
    """How far a twin has gone from its frozen layer, added to the loss: smooth-L1 of 1 - cosine of the two
    outputs, or the mean of squared differences; none adds nothing."""
    factor: Annotated[float, pydantic.Field(gt=0)] | Literal["share"] = 1.0
    """Times the divergence; share takes the twin's share of the output, w."""
    hold_share: bool = False
    """The mergers' constants, theta or a gate's bias, stay as they are."""
    inserted: tuple[Annotated[int, pydantic.Field(ge=0)], ...] = ()
    """Whole layers that are trained too, counted from 0: those that expand stacked."""

    @property
    def names(self) -> tuple[str, ...]:
        """What stands in the names of the modules that are trained."""
        return (".twin.", ".merger.", *(f".layers.{layer}." for layer in self.inserted))


def check_what_is_trained(train: Any) -> None:
    """Refuse parameters of the stage ``train`` that say what is trained and do not go together."""
    if train.twins is not None and (train.lora or train.adapter or train.frozen or train.keep_zeros):
        raise ValueError(
            "twins does not go with lora, adapter, frozen or keep_zeros: it says what is trained"
        )
    if train.twins is not None and (train.exits or train.children or train.sharding == "full"):
        raise ValueError("twins does not go with exits, children or sharding 'full'")
    if train.twins is not None and train.twins.divergence == "none" and train.twins.factor != 1.0:
        raise ValueError("twins.factor means nothing with divergence 'none'")
    if train.adapter is not None and (train.lora or train.frozen or train.keep_zeros or train.children):
        raise ValueError("adapter does not go with lora, frozen, keep_zeros or children")
    if train.adapter is not None and (train.sharding == "full" or not train.save_adapter):
        raise ValueError("adapter does not go with sharding 'full' or save_adapter: false")
    if train.lora is None and train.adapter_steps is not None:
        raise ValueError("adapter_steps leaves adapters: it means nothing without lora")
    if train.model_steps is not None and (train.lora or train.adapter or train.sharding == "full"):
        raise ValueError("model_steps leaves whole models: not with lora, adapter or sharding 'full'")
    if train.watched_layers is not None and (train.adapter or train.lora or train.sharding == "full"):
        raise ValueError("watched_layers does not go with adapter, lora or sharding 'full'")
    if train.lora is not None and train.frozen:
        raise ValueError("frozen means nothing with lora, which trains nothing but what it names")
    if train.lora is not None and train.keep_zeros and (train.lora.dora or train.lora.full):
        raise ValueError("keep_zeros does not go with lora.dora or lora.full")
    if train.sharding == "full" and (train.frozen or train.keep_zeros or train.adapter_steps):
        raise ValueError("sharding 'full' does not go with frozen, keep_zeros or adapter_steps yet")


def check_mup(train: Any) -> None:
    """Refuse muP where not all weights are trained."""
    if train.mup is not None and (train.lora or train.adapter or train.twins):
        raise ValueError("mup says how all weights learn: it does not go with lora, adapter or twins")
