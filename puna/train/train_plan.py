"""What the stage ``train`` costs: tokens, operations, memory and time, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from puna.core.seeds import numpy_generator
from puna.core.stage import Cost
from puna.model.units import sliced_spec
from puna.train.plan import (
    BYTES,
    DROPOUT_TRAFFIC,
    Method,
    dropped_elements,
    exit_operations,
    forward_operations,
    kind_of_device,
    magnitude_operations,
    memory,
    recomputed_operations,
    trained_parameters,
    training_operations,
)
from puna.train.settings import WITH_REFERENCE
from puna.train.sharded_plan import sharded_memory

if TYPE_CHECKING:
    from puna.train.stages import Train

SHARE_OF_MEMORY = 0.8
"""Of a device's memory, what a training may take before it recomputes activations."""


def method_of(parameters: Train) -> Method:
    """What is trained, for the planner."""
    lora, light = parameters.lora, parameters.adapter
    if light is not None:
        return Method(light=light.kind, prompt=(light.prompt_length, light.prompt_layers))
    if parameters.twins is not None:
        held = ("merger.bias",) if parameters.twins.hold_share else ()
        return Method(frozen=held, only=parameters.twins.names)
    if lora is None:
        return Method(frozen=parameters.frozen)
    return Method(lora.r, lora.dropout, lora.target, lora.full, lora.dora, lora.base)


def plan_train(parameters: Train, shapes: Any) -> Cost:
    """Tokens, weights trained, operations, peak memory and time from the shapes of model and corpus.

    Memory is that of one process, time that of all, which share the tokens of each step out.
    """
    available = {
        name.partition(".")[2]: tokens for name, tokens in shapes.corpora.items() if name.startswith("corpus")
    }
    steps, tokens = _length(parameters, shapes.tokens_of("corpus"), available)
    spec, method = shapes.spec, method_of(parameters)
    if spec is None:
        return Cost(tokens=tokens)
    dtype = parameters.dtype or shapes.dtype
    evaluations = _evaluations(parameters, steps)
    names = [name for name in shapes.corpora if name.startswith("held_out")]
    limit = math.inf if parameters.eval_tokens is None else parameters.eval_tokens
    held_out = sum(min(shapes.corpora[name], limit) for name in names)
    looked_at = evaluations * held_out
    if parameters.objective in WITH_REFERENCE:  # one pass before training
        looked_at += min(tokens, shapes.tokens_of("corpus")) + held_out
    if parameters.order == "sorted" and parameters.sort_by == "loss":
        looked_at += sum(available.values())
    flops = (
        tokens * training_operations(spec, method, parameters.max_length) * _share_computed(parameters, spec)
    )
    flops += tokens / parameters.micro_batch_tokens * magnitude_operations(spec, method)
    flops += tokens * exits_learnt(parameters) * exit_operations(spec, method)
    flops += looked_at * forward_operations(spec, parameters.max_length)
    taught, beside = _teacher_cost(parameters, shapes, tokens, dtype)
    flops += taught
    device = kind_of_device(shapes.device)
    recomputed = layers_to_recompute(
        parameters, spec, dtype, shapes.processes, device, SHARE_OF_MEMORY * shapes.device.memory - beside
    )
    flops += tokens * recomputed_operations(spec, recomputed, parameters.max_length)
    traffic = tokens * dropped_elements(spec, method) * DROPOUT_TRAFFIC[device]
    return Cost(
        tokens=tokens,
        trainable=trained_parameters(spec, method),
        flops=flops,
        memory=memory_of(parameters, spec, dtype, shapes.processes, device, recomputed) + beside,
        seconds=(shapes.device.seconds(flops, dtype) + shapes.device.read_seconds(traffic))
        / shapes.processes,
    )


def _share_computed(parameters: Train, spec: Any) -> float:
    """What steps compute over steps of the whole model alone: children compute less."""
    if parameters.children is None:
        return 1.0
    space = parameters.children.space(spec)
    generator = numpy_generator(0, "planned children")
    drawn = [sliced_spec(spec, space.kept(space.sample(generator))) for _ in range(64)]
    whole = forward_operations(spec, parameters.max_length)
    child = sum(forward_operations(each, parameters.max_length) for each in drawn) / len(drawn) / whole
    return (1 + parameters.child_steps * child) / (1 + parameters.child_steps)


def exits_learnt(parameters: Train) -> int:
    """At how many exits the head is trained."""
    return len(parameters.exits) if parameters.exit_loss == "mean" else 0


def _teacher_cost(parameters: Train, shapes: Any, tokens: float, dtype: str) -> tuple[float, float]:
    """Operations of the teachers, and the bytes they take beside the student: none once they are stored."""
    read = min(tokens, shapes.tokens_of("corpus")) if parameters.store_teacher else tokens
    flops = held = 0.0
    for spec in (shapes.models.get(name) for name in ("teacher", "older")):
        if spec is not None:
            flops += read * forward_operations(spec, parameters.max_length)
            held += 0.0 if parameters.store_teacher else float(spec.parameter_count() * BYTES[dtype])
    return flops, held


def memory_of(
    parameters: Train, spec: Any, dtype: str, processes: int, device: str, recomputed: int = 0
) -> float:
    """Peak bytes of one of so many processes; ``recomputed`` layers keep their input alone."""
    method, positions = method_of(parameters), parameters.micro_batch_tokens
    if parameters.sharding == "none" or processes == 1:
        exits = exits_learnt(parameters)
        return memory(spec, method, dtype, positions, device=device, recomputed=recomputed, exits=exits)
    return sharded_memory(
        spec,
        method,
        dtype,
        positions,
        processes,
        accumulates=parameters.batch_tokens > processes * positions,
        device=device,
    )


def layers_to_recompute(
    parameters: Train, spec: Any, dtype: str, processes: int, device: str, limit: float
) -> int:
    """How many layers keep their input alone: what is set, else as few as it takes to stay below ``limit``
    bytes, else all.
    """
    if parameters.sharding == "full" and processes > 1:
        return 0
    if parameters.recompute is not None:
        return min(parameters.recompute, len(spec.blocks))
    counts = range(len(spec.blocks) + 1)
    sizes = (memory_of(parameters, spec, dtype, processes, device, count) for count in counts)
    return next((count for count, size in zip(counts, sizes, strict=True) if size <= limit), counts[-1])


def _evaluations(parameters: Train, steps: int) -> int:
    """How often the held-out corpora are measured: at both ends, and every so many steps."""
    mixture = parameters.mixture
    feedback = mixture.feedback.every_steps if mixture and mixture.feedback else None
    every = [steps_ for steps_ in (parameters.eval_steps, feedback) if steps_]
    between = {step for distance in every for step in range(distance, steps, distance)}
    return 2 + len(between)


def _length(parameters: Train, corpus: float, available: Mapping[str, float]) -> tuple[int, float]:
    """Steps and tokens of a run over corpora of so many tokens, by name and all together, until it stops."""
    steps, tokens = _planned_length(parameters, corpus, available)
    if parameters.stop_after is None or parameters.stop_after >= steps:
        return steps, tokens
    return parameters.stop_after, tokens * parameters.stop_after / steps


def _planned_length(parameters: Train, corpus: float, available: Mapping[str, float]) -> tuple[int, float]:
    """The same of the whole course, for which the schedule is made."""
    if parameters.max_steps is not None:
        return parameters.max_steps, float(parameters.max_steps * parameters.batch_tokens)
    if parameters.max_tokens is not None:
        tokens = float(parameters.max_tokens)
    elif parameters.mixture is not None:
        tokens = parameters.mixture.planned_tokens(available, parameters.epochs)
    else:
        tokens = corpus * (parameters.epochs or 1)
    return math.ceil(tokens / parameters.batch_tokens), float(tokens)
