"""The stage ``label``: a decoder learns to say labels of texts or words; no torch here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic

from puna.core.stage import Context, Cost, Input, Outcome, Parameters, stage
from puna.model.unmasking import check_pattern
from puna.train.plan import BYTES, Method, forward_operations, memory, trained_parameters, training_operations
from puna.train.settings import Lora

Pattern = Annotated[str, pydantic.AfterValidator(check_pattern)]
"""Masks of groups of layers, low layers first."""


class LabelTraining(Parameters):
    """How a labeller is trained: its head, its adapter, how long and at which rate."""

    pooling: Literal["last", "mean", "max"] = "last"
    """Of texts: which of the tokens' states the label is read from."""
    bias: bool = False
    """Give the head a bias, as transformers' class for words has."""
    dropout: float = pydantic.Field(0.0, ge=0, lt=1)
    """Share of the states' elements that are dropped before the head, in training."""
    epochs: int | None = pydantic.Field(None, ge=1)
    """Passes over the corpus; one, if max_steps does not say otherwise."""
    max_steps: int | None = pydantic.Field(None, ge=1)
    """Optimiser steps, over as many passes as that takes."""
    batch_tokens: int = pydantic.Field(512, ge=2)
    """Tokens of an optimiser step at most."""
    micro_batch_tokens: int = pydantic.Field(512, ge=2)
    """Positions of one forward pass at most, padding included."""
    max_length: int = pydantic.Field(64, ge=2)
    """Tokens of a text at most; short texts share a row, and do not see one another."""
    learning_rate: float = pydantic.Field(5e-5, gt=0)
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How it falls after the warm-up."""
    warmup_ratio: float = pydantic.Field(0.0, ge=0, lt=1)
    """Share of the steps in which it rises."""
    weight_decay: float = pydantic.Field(0.01, ge=0)
    """AdamW's decay, of matrices only."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's two averages."""
    max_grad_norm: float = pydantic.Field(1.0, ge=0)
    """Gradients are clipped to this global norm; 0 does not clip."""
    lora: Lora | None = None
    """A low-rank adapter; the head is trained in full beside it. Null trains all weights."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """What the model computes in; null takes the run's."""
    seed: int | None = None
    """null takes the run's seed."""

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> LabelTraining:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("epochs and max_steps are both given: a run has one limit")
        for name in ("batch_tokens", "micro_batch_tokens"):
            if getattr(self, name) < self.max_length:
                raise ValueError(
                    f"{name} {getattr(self, name)} has no room for a row of max_length {self.max_length}"
                )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("betas must be at least 0 and below 1")
        return self


class Label(LabelTraining):
    """Parameters of the stage ``label``."""

    unmask: Pattern = "0"
    """Which layers see later tokens: a digit for each group of layers, low layers first, 1 without the causal
    mask. "0" is a causal model, "1" unmasked everywhere, "0011" in the upper half."""
    logging_steps: int = pydantic.Field(10, ge=1)
    """Steps to a line of metrics.jsonl."""
    save_adapter: bool = True
    """Write the adapter on its own too, when there is one."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the model is saved in; an adapter is merged in float32 first."""


def training_cost(parameters: LabelTraining, shapes: Any, times: int = 1) -> Cost:
    """Tokens, weights, operations and memory of so many trainings; the head for words is left out of them."""
    spec, corpus = shapes.spec, shapes.tokens_of("corpus")
    tokens = float(corpus * (parameters.epochs or 1))
    if parameters.max_steps is not None:
        tokens = float(parameters.max_steps * parameters.batch_tokens)
    if spec is None:
        return Cost(tokens=times * tokens)
    lora = parameters.lora
    method = (
        Method()
        if lora is None
        else Method(lora.r, lora.dropout, lora.target, lora.full, lora.dora, lora.base)
    )
    head = spec.vocab_size * spec.hidden_size
    flops = tokens * (training_operations(spec, method, parameters.max_length) - 4.0 * head)
    held = shapes.tokens_of("held_out") if "held_out" in shapes.corpora else 0.0
    flops += 2 * held * (forward_operations(spec, parameters.max_length) - 2.0 * head)
    dtype = parameters.dtype or shapes.dtype
    logits = min(parameters.micro_batch_tokens, 2048) * spec.vocab_size * (BYTES[dtype] + 4)
    needed = memory(spec, method, dtype, parameters.micro_batch_tokens) - logits
    return Cost(
        tokens=times * tokens,
        trainable=trained_parameters(spec, method),
        flops=times * flops,
        memory=max(needed, float(spec.parameter_count() * BYTES[dtype])),
        spec=spec,
    )


@stage(
    "label",
    parameters=Label,
    inputs={
        "model": Input("model"),
        "corpus": Input("corpus"),
        "held_out": Input("corpus", many=True, optional=True),
    },
    outputs={"model": "model", "adapter": "model"},
    plan=training_cost,
    resumes="checkpoints",
)
def label(context: Context, parameters: Label) -> Outcome:
    """Train a model to label texts or words, with or without its causal mask (S14, S75).

    The corpus is of labelled_texts or labelled_words. The model that is left opens as transformers'
    LlamaForSequenceClassification or LlamaForTokenClassification where these compute it; else it has
    puna.json. Time grows with the tokens; memory is that of training without a head for words.
    """
    from puna.train.labelling import run

    return run(context, parameters)
