"""What each variant costs to serve: seconds on this machine, weights, bytes of keys and values.

System S31, Puzzle (2411.19146): cost is measured, not counted. As many copies of one half as the parent has
layers make a decoder of their own, laid out by the engine's stepper; its prefill and its decoding step less
those of a decoder without halves, over the copies, are the half's. All decoders are timed in turn, to and
fro, and the median of the rounds counts. Halves of one shape cost the same in every layer and are measured
once.

Seconds of a variant are those of a whole job: ``batch`` prompts of ``prompt`` tokens are read, then
``answer`` steps give each a token. The sum over a child's halves, and over what all children share
(embedding, last norm, head), is its job's time: right for halves that were measured one by one, and for no
other coupling.

A median whose quartiles lie too far apart is not trusted: the analytic count stands in, operations of prefill
and steps (:mod:`puna.model.sizes`) at the rate that the trusted ones have.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from puna.core.progress import Track
from puna.edit.sub_blocks.variants import Half, alone, changed
from puna.model.sizes import cache_bytes, step_operations
from puna.model.spec import BlockSpec, LlamaSpec

if TYPE_CHECKING:
    from puna.decode.step_costs import StepBench
    from puna.model.llama import Llama

_EMPTY = BlockSpec(attention="none", feed_forward="none")
_VOCABULARY = 16  # of decoders that are timed for their layers
Measure = Literal["timed", "operations"]


@dataclass(frozen=True)
class Workload:
    """What is served: ``batch`` texts at once, each a prompt and an answer of so many tokens."""

    batch: int
    prompt: int
    answer: int

    @property
    def tokens(self) -> int:
        """Tokens of all texts, prompts and answers."""
        return self.batch * (self.prompt + self.answer)


@dataclass(frozen=True)
class Cost:
    """Of a variant, or of what all children share: seconds of the job, weights, bytes of a token's keys."""

    seconds: float
    parameters: int
    cache_bytes: int
    timed: bool


@dataclass(frozen=True)
class Times:
    """Medians of a prompt's prefill and of a decoding step, in seconds, and how far quartiles lie apart."""

    prefill: float
    step: float
    spread: float


def operations(spec: LlamaSpec, block: BlockSpec, workload: Workload) -> float:
    """Operations of the job in one layer of this spec: the analytic cost of a half that stands alone."""
    one = spec.replace(blocks=(block,), vocab_size=1, bos_id=None, eos_ids=(), pad_id=None)
    head = step_operations(
        spec.replace(blocks=(_EMPTY,), vocab_size=1, bos_id=None, eos_ids=(), pad_id=None), 1
    )
    middle = workload.prompt + workload.answer // 2
    prefill = workload.prompt * (step_operations(one, (workload.prompt + 1) // 2) - head)
    return workload.batch * (prefill + workload.answer * (step_operations(one, middle) - head))


class Costs:
    """The costs of every shape of a half, and of what all children share, for one workload."""

    def __init__(self, spec: LlamaSpec, halves: Mapping[BlockSpec, Cost], shared: Cost) -> None:
        self.spec, self.halves, self.shared = spec, dict(halves), shared

    def of(self, layer: int, half: Half, variant: str) -> Cost:
        """The cost of a variant in a layer."""
        shape = alone(changed(self.spec.blocks[layer], half, variant), half)
        return Cost(0.0, 0, 0, timed=False) if shape == _EMPTY else self.halves[shape]


def shapes_of(spec: LlamaSpec, variants: Sequence[tuple[int, Half, str]]) -> list[BlockSpec]:
    """The different halves among variants, each as a layer without its other half."""
    found = (alone(changed(spec.blocks[layer], half, name), half) for layer, half, name in variants)
    return [shape for shape in dict.fromkeys(found) if shape != _EMPTY]


def measured(
    parent: Llama,
    shapes: Sequence[BlockSpec],
    workloads: Sequence[Workload],
    *,
    repeats: int,
    quantize: Literal["int8", "int4"] | None = None,
) -> list[tuple[dict[BlockSpec, Times], Times]]:
    """For each workload the times of the shapes, and those of what all share with the head in each step.

    The model's type says in what the stepper computes. Time is ``repeats`` rounds of all decoders.
    """
    from puna.core.seeds import torch_generator
    from puna.model.llama import Llama as Decoder
    from puna.model.steppers import make_stepper

    spec, copies = parent.spec, len(parent.spec.blocks)
    room = sum(2 * work.batch * (work.prompt + work.answer) + 2 * work.prompt for work in workloads)

    def benches(block: BlockSpec, rows: int) -> list[StepBench]:
        from puna.decode.step_costs import StepBench

        layers = spec.replace(blocks=(block,) * copies, vocab_size=rows, bos_id=None, eos_ids=(), pad_id=None)
        drawn = Decoder(layers, dtype=parent.dtype, generator=torch_generator(0, "costs")).eval()
        stepper = make_stepper(drawn, quantize=quantize, cache_tokens=room)
        ids = [place % rows for place in range(64)]
        return [StepBench(stepper, ids, work.batch, work.prompt + work.answer // 2) for work in workloads]

    made = {shape: benches(shape, _VOCABULARY) for shape in (*shapes, _EMPTY)}
    whole = benches(_EMPTY, spec.vocab_size)
    taken = _rounds(made, whole, workloads, repeats)
    found = []
    for place in range(len(workloads)):
        empty = taken[_EMPTY][place]
        halves = {shape: _net(taken[shape][place], empty, copies) for shape in shapes}
        found.append((halves, _median(taken[None][place])))
    return found


_Taken = dict[BlockSpec | None, list[list[tuple[float, float]]]]


def _rounds(
    made: Mapping[BlockSpec, Sequence[StepBench]],
    whole: Sequence[StepBench],
    workloads: Sequence[Workload],
    repeats: int,
) -> _Taken:
    """Seconds of prefill and step by shape (None: with the head), workload and round, all in turn."""
    taken: _Taken = {shape: [[] for _ in workloads] for shape in (*made, None)}
    order: list[tuple[BlockSpec | None, Sequence[StepBench]]] = [*made.items(), (None, whole)]
    with Track("timing sub-blocks", repeats + 1, "rounds") as track:
        for turn in range(repeats + 1):
            for shape, benches in order if turn % 2 else order[::-1]:
                for place, (bench, work) in enumerate(zip(benches, workloads, strict=True)):
                    prefill = bench.layers(0, work.prompt)
                    step = bench.step(work.batch, 0)
                    if turn:  # the first is not counted
                        taken[shape][place].append((prefill, step.layers if shape else step.whole))
            track.advance()
    return taken


def _median(times: Sequence[tuple[float, float]]) -> Times:
    prefills, steps = zip(*times, strict=True)
    return Times(
        statistics.median(prefills), statistics.median(steps), max(_spread(prefills), _spread(steps))
    )


def _net(times: Sequence[tuple[float, float]], empty: Sequence[tuple[float, float]], copies: int) -> Times:
    """The times of one half: less those of the decoder without, over the copies."""
    whole, without = _median(times), _median(empty)
    return Times(
        max(0.0, whole.prefill - without.prefill) / copies,
        max(0.0, whole.step - without.step) / copies,
        whole.spread,
    )


def _spread(values: Sequence[float]) -> float:
    """The distance of the quartiles over the median."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle if middle else 0.0


def seconds_of(times: Times, workload: Workload) -> float:
    """Seconds of the whole job."""
    return workload.batch * times.prefill + workload.answer * times.step


def counted(spec: LlamaSpec, shapes: Sequence[BlockSpec], workload: Workload) -> Costs:
    """Costs by operations alone, as if the machine did 1e11 a second."""
    return joined(spec, dict.fromkeys(shapes), None, workload, most_spread=0.0)


_RATE = 1e11  # operations a second, where nothing was timed: relative costs are what counts


def joined(
    spec: LlamaSpec,
    times: Mapping[BlockSpec, Times | None],
    shared: Times | None,
    workload: Workload,
    *,
    most_spread: float,
) -> Costs:
    """The costs: medians that are trusted, and operations at their rate for all others."""
    trusted = {
        shape: seconds_of(found, workload)
        for shape, found in times.items()
        if found is not None and found.spread <= most_spread and seconds_of(found, workload) > 0
    }
    counts = {shape: operations(spec, shape, workload) for shape in times}
    rates = [seconds / counts[shape] for shape, seconds in trusted.items()]
    rate = statistics.median(rates) if rates else 1 / _RATE
    halves = {}
    for shape in times:
        one = spec.replace(blocks=(shape,))
        halves[shape] = Cost(
            trusted.get(shape, rate * counts[shape]),
            shape.parameter_count(spec.hidden_size, spec.attention_bias, spec.mlp_bias),
            cache_bytes(one),
            shape in trusted,
        )
    head = 2.0 * spec.vocab_size * spec.hidden_size * workload.batch * workload.answer
    rest = rate * head if shared is None else seconds_of(shared, workload)
    weights = spec.replace(blocks=(_EMPTY,)).parameter_count()
    return Costs(spec, halves, Cost(rest, weights, 0, shared is not None))


def written(costs: Costs, workload: Workload, places: Sequence[tuple[int, Half, str]]) -> dict[str, object]:
    """JSON of the costs of these variants."""
    rows = [
        {"layer": layer, "half": half, "variant": name, **dataclasses.asdict(costs.of(layer, half, name))}
        for layer, half, name in places
    ]
    return {
        "workload": dataclasses.asdict(workload),
        "shared": dataclasses.asdict(costs.shared),
        "variants": rows,
    }
