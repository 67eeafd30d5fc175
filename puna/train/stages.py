"""The stage ``train``: pre-training, fine-tuning, distillation, preferences; in full or with LoRA. And
``label``, ``adapter_checks``, ``answer_checks``, ``mixture_checks``, ``mup_start``, ``mup_check`` and
``course``, each out of its module."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal

import pydantic

from puna.core.stage import Context, Input, Outcome, Parameters, stage
from puna.model.mup import Mup
from puna.train import (  # noqa: F401  register their stages
    answer_stages,
    course_stages,
    labelling_stages,
    light_stages,
    mixture_stages,
    mup_stages,
)
from puna.train.settings import (
    Children,
    Compatible,
    LightAdapter,
    Lora,
    Mixture,
    ScheduleSegment,
    Twins,
    check_mup,
    check_segments,
    check_teacher,
    check_what_is_trained,
)
from puna.train.train_plan import plan_train


class Train(Parameters):
    """Parameters of the stage ``train``."""

    objective: Literal[
        "clm",
        "sft",
        "distill",
        "distill_sft",
        "dpo",
        "length_normalised_dpo",
        "ipo",
        "orpo",
        "simpo",
        "cpo",
    ] = "clm"
    """clm learns every token of documents; sft the turns of the roles ``train_on`` of conversations; distill
    and distill_sft the distributions that the input ``teacher`` has there; the others which of two answers
    is preferred, dpo, length_normalised_dpo and ipo beside a reference: the model as it is before
    training."""
    divergence: Literal["forward", "reverse"] = "forward"
    """Of distillation: forward is KL(teacher || student), reverse KL(student || teacher)."""
    temperature: float = pydantic.Field(1.0, gt=0)
    """Of distillation: divides the logits of both sides."""
    top_k: int | None = pydantic.Field(None, ge=1)
    """Of distillation: compare over the teacher's likeliest tokens alone, so many; null: over all tokens."""
    hidden_cosine: float = pydantic.Field(0.0, ge=0)
    """Of distillation with a live teacher of as many layers: weight of the sum over the layers of 1 - cosine
    of the student's and the teacher's hidden states behind each (S31)."""
    store_teacher: bool = False
    """Of distillation with top_k: the teacher reads the corpus once, and its tokens are kept in the stage's
    folder; it takes no memory in training and no time in further epochs. The same of ``older``."""
    compatible: Compatible | None = None
    """Of distillation: at some tokens learn from an earlier version, the input ``older``, in place of
    ``teacher`` (S58); null: nowhere."""
    beta: float | None = pydantic.Field(None, gt=0)
    """Of preferences: scale of the rewards, of ipo the paper's tau, of orpo its lambda; null is 10 for
    length_normalised_dpo, 2 for simpo, 0.1 for the others."""
    label_smoothing: float = pydantic.Field(0.0, ge=0, lt=0.5)
    """dpo, cpo: share of the pairs taken to be labelled the wrong way round."""
    target_margin: float = pydantic.Field(1.0, ge=0)
    """simpo: the paper's gamma, the margin of rewards that is aimed at."""
    likelihood_weight: float = pydantic.Field(1.0, ge=0)
    """cpo: weight of the chosen answer's mean token loss."""
    exits: tuple[int, ...] = ()
    """clm, sft: layers, counted from 1, behind which the model learns to end too (S24); the loss is the mean
    over these and the last. Empty: the last alone."""
    exit_loss: Literal["mean", "measured"] = "mean"
    """Of exits: measured learns from the last layer alone, and says of held-out text how the exits fare."""
    children: Children | None = None
    """clm, sft: sub-networks, of which one, drawn by the seed, learns in every second step (S29); null: the
    whole model alone."""
    child_steps: int = pydantic.Field(1, ge=1)
    """Of children: steps with a child behind each step with the whole model."""
    epochs: int | None = pydantic.Field(None, ge=1)
    """Passes over the corpus; one, if neither this nor another limit is given."""
    max_steps: int | None = pydantic.Field(None, ge=1)
    """Optimiser steps, over as many passes as that takes."""
    max_tokens: int | None = pydantic.Field(None, ge=1)
    """Stop with the step that reaches this many tokens."""
    batch_tokens: int = pydantic.Field(8192, ge=2)
    """Tokens of an optimiser step at most, over all processes."""
    micro_batch_tokens: int = pydantic.Field(2048, ge=2)
    """Positions of one forward pass at most, padding included; memory grows with it."""
    max_length: int = pydantic.Field(1024, ge=2)
    """Tokens of a row; a pair of answers, each with its prompt, is in one row."""
    packing: Literal["wrap", "fit", "off"] | None = None
    """wrap fills rows and cuts documents (clm, distill), fit keeps them whole, off gives each its own row;
    null is wrap for these two and fit for all others."""
    mixture: Mixture | None = None
    """Shares of tokens by source, phases, caps; null takes every row of all corpora once an epoch."""
    order: Literal["shuffled", "sorted"] = "shuffled"
    """sorted feeds every source from its first row to its last, as ``sort_by`` says."""
    sort_by: Literal["length", "loss"] = "length"
    """sorted: by the length of the documents, or by their loss under the model that is trained."""
    descending: bool = False
    """sorted: from the longest, or the highest loss."""
    markers: tuple[str, ...] = ()
    """clm: special tokens whose strings in the documents stand for them, such as those of ``infill``."""
    train_on: tuple[str, ...] = pydantic.Field(("assistant",), min_length=1)
    """Roles whose turns are learnt (sft)."""
    last_turn_only: bool = False
    """Of those turns only the last of each conversation is learnt."""
    learning_rate: float = pydantic.Field(2e-4, gt=0)
    """Peak learning rate."""
    embedding_learning_rate_factor: float = pydantic.Field(1.0, gt=0)
    """Times the learning rate for input embeddings and head."""
    schedule: (
        Literal["constant", "cosine", "linear", "inverse_sqrt", "step", "wsd"] | tuple[ScheduleSegment, ...]
    ) = "cosine"
    """How the learning rate moves after the warm-up; or segments, such as [{warmup: 10}, {linear: rest}]."""
    warmup_ratio: float = pydantic.Field(0.0, ge=0, lt=1)
    """Share of the steps in which the learning rate rises."""
    warmup_steps: int | None = pydantic.Field(None, ge=0)
    """The same as a number of steps, instead of the ratio."""
    min_learning_rate_ratio: float = pydantic.Field(0.0, ge=0, le=1)
    """Where cosine, linear and wsd end, as a share of the peak."""
    timescale: int = pydantic.Field(10_000, ge=1)
    """inverse_sqrt: steps after the warm-up in which the rate falls to 0.71 of its peak."""
    step_size: int = pydantic.Field(1000, ge=1)
    """step: steps between two drops."""
    gamma: float = pydantic.Field(0.5, gt=0, le=1)
    """step: the factor of a drop."""
    decay_ratio: float = pydantic.Field(0.1, gt=0, le=1)
    """wsd: share of all steps in which the rate falls, at the end."""
    weight_decay: float = pydantic.Field(0.0, ge=0)
    """AdamW's decay, of matrices only."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's two averages."""
    max_grad_norm: float = pydantic.Field(1.0, ge=0)
    """Gradients are clipped to this global norm; 0 does not clip."""
    mup: Mup | None = None
    """Rates and decay by matrix as muP has them (S46), for a model that began with ``mup_start``; null gives
    all matrices the same."""
    lora: Lora | None = None
    """A low-rank adapter; null trains all weights."""
    adapter: LightAdapter | None = None
    """Prompts for attention, scales and biases instead of lora; prompts are the output ``adapter``, all
    else is in the output ``model``, over which they lie."""
    frozen: tuple[str, ...] = ()
    """Without lora: modules that stay as they are, such as [lm_head]; a tied head is the embedding."""
    twins: Twins | None = None
    """clm, sft: of a model out of the stage expand train the twins alone (S02); null: all weights."""
    keep_zeros: bool = False
    """Weights of projections that are exactly zero, pruned without becoming smaller, stay so; an adapter
    changes the others alone (S23), and is written in a form of its own that peft does not open."""
    adapter_steps: int | None = pydantic.Field(None, ge=1)
    """Steps between adapters that are left as the output ``adapters``, the last too, to choose from."""
    model_steps: int | None = pydantic.Field(None, ge=1)
    """Steps between whole models that are left as the output ``models``, for the stage trajectory."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """What the model computes in; null takes the run's. Masters and sums are float32 in either case."""
    recompute: int | None = pydantic.Field(None, ge=0)
    """Layers, from the first, that keep their input alone and compute the rest again in the backward pass;
    null: as few as the memory needs. Takes time and changes no bit."""
    sharding: Literal["none", "full"] = "none"
    """Of several processes under torchrun: none gives each all weights, full a part of them (FSDP2)."""
    seed: int | None = None
    """null takes the run's seed."""
    logging_steps: int = pydantic.Field(1, ge=1)
    """Steps to a line of metrics.jsonl."""
    eval_steps: int | None = pydantic.Field(None, ge=1)
    """Steps between evaluations on ``held_out``; null evaluates before the first and after the last step."""
    eval_tokens: int | None = pydantic.Field(20_000, ge=2)
    """Tokens of each held-out corpus at most, from its beginning; null takes all."""
    watched_layers: int | None = pydantic.Field(None, ge=1)
    """Measure with each evaluation how far so many first and last layers have moved (S15); null: not."""
    save_steps: int | None = pydantic.Field(None, ge=1)
    """Steps between checkpoints; null makes one every five minutes. There is always one at the end."""
    stop_after: int | None = pydantic.Field(None, ge=1)
    """End the run after this step of those planned; schedule and order of the data stay as planned."""
    state_after: Literal["end"] | Annotated[int, pydantic.Field(ge=1)] | None = None
    """Leave the state of training after this step, or the last, as the output ``state``: weights, moments,
    generators and position, for another stage to go on from."""
    restore: Literal["all", "weights"] = "all"
    """What of the input ``state`` is taken over; weights leaves out the optimiser's moments, which start at
    zero, and keeps weights, generators and position."""
    report_to: Literal["none", "tensorboard"] = "none"
    """tensorboard writes its files beside metrics.jsonl."""
    save_adapter: bool = True
    """Write the adapter on its own too, when there is one."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """What the model is saved in; an adapter is merged in float32 first."""

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Train:
        # A default that is written out, as a resolved recipe does, says nothing.
        given = {name for name, field in Train.model_fields.items() if getattr(self, name) != field.default}
        limits = [name for name in ("epochs", "max_steps", "max_tokens") if getattr(self, name) is not None]
        if len(limits) > 1:
            raise ValueError(f"{' and '.join(limits)} are both given: a run has one limit")
        if self.warmup_steps is not None and "warmup_ratio" in given:
            raise ValueError("warmup_ratio and warmup_steps are both given: say one")
        for name in ("batch_tokens", "micro_batch_tokens"):
            if getattr(self, name) < self.max_length:
                raise ValueError(
                    f"{name} {getattr(self, name)} has no room for a row of max_length {self.max_length}"
                )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("betas must be at least 0 and below 1")
        self._check_schedule(given)
        self._check_order(given)
        self._check_objective(given)
        check_what_is_trained(self)
        check_mup(self)
        lora = self.lora
        if self.sharding == "full" and (self.recompute or (lora and (lora.dora or lora.base == "nf4"))):
            raise ValueError("sharding 'full' does not go with recompute, lora.dora or lora.base 'nf4'")
        return self

    def _check_schedule(self, given: set[str]) -> None:
        """Refuse settings that the schedule does not read."""
        if not isinstance(self.schedule, str):
            check_segments(self.schedule, phases=bool(self.mixture and self.mixture.phases))
        for name, schedules in _READ_BY_SCHEDULES.items():
            if name in given and self.schedule not in schedules:
                kind = repr(self.schedule) if isinstance(self.schedule, str) else "of segments"
                raise ValueError(
                    f"{name} means nothing with schedule {kind}, but with {', '.join(schedules)}"
                )

    def _check_objective(self, given: set[str]) -> None:
        """Refuse settings that the objective does not read, or that it cannot learn with."""
        for name, objectives in _READ_BY_OBJECTIVES.items():
            if name in given and self.objective not in objectives:
                fitting = ", ".join(objectives)
                raise ValueError(
                    f"{name} means nothing with objective {self.objective!r}, but with {fitting}"
                )
        if self.packing == "wrap" and _usual_packing(self.objective) != "wrap":
            raise ValueError(
                "packing 'wrap' cuts conversations, so that the end of an answer would be learnt without its "
                f"question: with objective {self.objective!r} take 'fit' or 'off'"
            )
        if any(later <= earlier for earlier, later in itertools.pairwise((0, *self.exits))):
            raise ValueError("exits are numbers of layers, and rise from 1 on")
        if "exit_loss" in given and not self.exits:
            raise ValueError("exit_loss means nothing without exits")
        if self.exits and self.sharding == "full":
            raise ValueError("exits do not go with sharding 'full' yet")
        if "child_steps" in given and not self.children:
            raise ValueError("child_steps means nothing without children")
        if self.children and (self.lora or self.exits or self.sharding == "full"):
            raise ValueError("children do not go with lora, exits or sharding 'full'")
        check_teacher(self)
        pairs = self.objective in _READ_BY_OBJECTIVES["beta"]
        if pairs and (self.mixture or self.order == "sorted" or self.sharding == "full"):
            raise ValueError(
                f"objective {self.objective!r} learns from pairs, which mixture, order 'sorted' and "
                "sharding 'full' do not know yet"
            )

    def _check_order(self, given: set[str]) -> None:
        """Refuse settings of mixture and order that do not go with the others."""
        mixture, sorted_ = self.mixture, self.order == "sorted"
        for name in ("sort_by", "descending"):
            if name in given and not sorted_:
                raise ValueError(f"{name} means nothing with order 'shuffled', but with 'sorted'")
        if sorted_ and (self.packing or _usual_packing(self.objective)) == "fit":
            raise ValueError(
                "order 'sorted' needs packing 'wrap' or 'off': 'fit' puts long and short documents together"
            )
        if mixture is None:
            return
        if sorted_ and mixture.draw != "next":
            raise ValueError(f"mixture.draw {mixture.draw!r} draws at random, which order 'sorted' does not")
        mixture.check_limits(
            {"epochs": self.epochs, "max_steps": self.max_steps, "max_tokens": self.max_tokens}
        )


def _usual_packing(objective: str) -> str:
    return "wrap" if objective in ("clm", "distill") else "fit"


_READ_BY_SCHEDULES = {
    "warmup_ratio": ("constant", "cosine", "linear", "inverse_sqrt", "step", "wsd"),
    "warmup_steps": ("constant", "cosine", "linear", "inverse_sqrt", "step", "wsd"),
    "min_learning_rate_ratio": ("cosine", "linear", "wsd"),
    "timescale": ("inverse_sqrt",),
    "step_size": ("step",),
    "gamma": ("step",),
    "decay_ratio": ("wsd",),
}

_READ_BY_OBJECTIVES = {
    "markers": ("clm",),
    "exits": ("clm", "sft"),
    "children": ("clm", "sft"),
    "twins": ("clm", "sft"),
    "train_on": ("sft", "distill_sft"),
    "last_turn_only": ("sft", "distill_sft"),
    "divergence": ("distill", "distill_sft"),
    "temperature": ("distill", "distill_sft"),
    "top_k": ("distill", "distill_sft"),
    "hidden_cosine": ("distill", "distill_sft"),
    "store_teacher": ("distill", "distill_sft"),
    "compatible": ("distill", "distill_sft"),
    "beta": ("dpo", "length_normalised_dpo", "ipo", "orpo", "simpo", "cpo"),
    "label_smoothing": ("dpo", "cpo"),
    "target_margin": ("simpo",),
    "likelihood_weight": ("cpo",),
}


def pair_settings(parameters: Train) -> dict[str, float]:
    """What the preference objective reads, by the names of its settings."""
    every = {
        "beta": ("beta", parameters.beta),
        "label_smoothing": ("label_smoothing", parameters.label_smoothing),
        "target_margin": ("gamma", parameters.target_margin),
        "likelihood_weight": ("likelihood_weight", parameters.likelihood_weight),
    }
    return {
        name: value
        for key, (name, value) in every.items()
        if parameters.objective in _READ_BY_OBJECTIVES[key] and value is not None
    }


@stage(
    "train",
    parameters=Train,
    inputs={
        "model": Input("model"),
        "corpus": Input("corpus", many=True),
        "held_out": Input("corpus", many=True, optional=True),
        "teacher": Input("model", optional=True),
        "older": Input("model", optional=True),
        "adapter": Input("model", optional=True),
        "state": Input("state", optional=True),
    },
    outputs={"model": "model", "models": "model", "adapter": "model", "adapters": "model", "state": "state"},
    plan=plan_train,
    distributed=True,
    resumes="checkpoints",
)
def train(context: Context, parameters: Train) -> Outcome:
    """Train a model on corpora, in full or with LoRA; the adapter is merged into the model it leaves."""
    from puna.train.job import run

    return run(context, parameters)
