"""Stages of S76, SARATHI: ``chunked_prefill``, ``step_costs`` and ``schedule``."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pydantic

from puna.core.errors import PunaError
from puna.core.stage import Context, Cost, Input, Outcome, Parameters, stage

if TYPE_CHECKING:
    from puna.decode.step_costs import Share

Kernels = Literal["auto", "native", "plain"]
_SECONDS_PER_TOKEN_OF_WEIGHT = 1e-11  # of reading a weight and computing with it, two cores, for plans only


class ChunkedPrefill(Parameters):
    """Parameters of the stage ``chunked_prefill``."""

    chunk_sizes: tuple[int, ...] = (1, 7, 64)
    """Sizes of the chunks that are compared with one pass."""
    length: int = pydantic.Field(160, ge=2)
    """Tokens of the text that is read in chunks."""
    prompts: int = pydantic.Field(8, ge=2)
    """Texts that are continued, alone and mixed."""
    prompt_tokens: int = pydantic.Field(120, ge=2)
    """Length of the longest prompt; the others are shorter, down to a quarter."""
    new_tokens: int = pydantic.Field(16, ge=1)
    """Tokens of each continuation."""
    max_batch_tokens: int = pydantic.Field(64, ge=1)
    """Tokens of a step of the mixture."""
    chunk_tokens: int = pydantic.Field(48, ge=1)
    """Tokens of prompts beside decoding texts in a step of the mixture."""
    kernels: Kernels = "auto"
    """What runs the model."""

    @pydantic.field_validator("chunk_sizes")
    @classmethod
    def _sizes(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or min(value) < 1:
            raise ValueError("chunk sizes are positive numbers, and there must be one")
        return value


def plan_chunked_prefill(parameters: ChunkedPrefill, shapes: Any) -> Cost:
    """Steps of reading in chunks, and of writing each text alone and all together."""
    steps = sum(-(-parameters.length // size) for size in parameters.chunk_sizes) + 1
    steps += (parameters.prompts + 1) * parameters.new_tokens
    tokens = parameters.length * (len(parameters.chunk_sizes) + 1)
    tokens += 2 * parameters.prompts * (parameters.prompt_tokens + parameters.new_tokens)
    weights = max(spec.parameter_count() for spec in shapes.models.values())
    seconds = (0.3 * tokens + 10 * steps) * weights * _SECONDS_PER_TOKEN_OF_WEIGHT
    return Cost(tokens=tokens, flops=2.0 * tokens * weights, memory=8.0 * weights, seconds=seconds)


@stage(
    "chunked_prefill",
    parameters=ChunkedPrefill,
    inputs={"model": Input("model"), "corpus": Input("corpus")},
    plan=plan_chunked_prefill,
)
def chunked_prefill(context: Context, parameters: ChunkedPrefill) -> Outcome:
    """Compare reading in chunks with one pass, and texts in a mixture with each alone."""
    from puna.decode.chunk_check import chunk_difference, mixture_difference
    from puna.model.steppers import make_stepper
    from puna.text.pretrained import load

    model = load(context.inputs["model"], dtype=context.dtype, device=context.device)
    ids = _tokens_of(context.inputs["corpus"], model, max(parameters.length, 4 * parameters.prompt_tokens))
    stepper = make_stepper(model, cache_tokens=2 * parameters.length, kernels=parameters.kernels)
    differences = chunk_difference(stepper, ids[: parameters.length], parameters.chunk_sizes)
    prompts = []
    for number in range(parameters.prompts):
        length = max(2, parameters.prompt_tokens * (4 - number % 4) // 4)
        start = (number * 37) % (len(ids) - length)
        prompts.append(ids[start : start + length])
    mixture = mixture_difference(
        model,
        prompts,
        new_tokens=parameters.new_tokens,
        max_batch_tokens=parameters.max_batch_tokens,
        chunk_tokens=parameters.chunk_tokens,
        kernels=parameters.kernels,
    )
    metrics = {f"difference.chunk_{size}": value for size, value in differences.items()}
    metrics |= {
        "difference": max(differences.values()),
        "same_texts": mixture.same / mixture.texts,
        "texts": mixture.texts,
        "preemptions": mixture.preemptions,
    }
    context.report["tables"] = [
        {
            "title": f"Chunks against one pass ({stepper.name} kernels)",
            "columns": ["chunk", "largest difference over the largest logit"],
            "rows": [[size, f"{value:.2e}"] for size, value in differences.items()],
        }
    ]
    return Outcome(metrics=metrics)


class StepCostsParameters(Parameters):
    """Parameters of the stage ``step_costs``."""

    decodes: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Numbers of decoding texts in the steps that are compared."""
    rows: int = pydantic.Field(128, ge=2)
    """Rows of the mixed step: the decoding texts and a chunk."""
    context: int = pydantic.Field(128, ge=32)
    """Tokens behind which the texts decode."""
    long_context: int = pydantic.Field(1024, ge=64)
    """Tokens behind which steps are timed to tell what attention costs."""
    table: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    """Numbers of rows whose steps are timed for the simulator."""
    rounds: int = pydantic.Field(100, ge=1)
    """Times that the steps with and without decoding texts are taken, in turn."""
    repeats: int = pydantic.Field(15, ge=1)
    """Times that each step of the table is taken; the median counts."""
    kernels: Kernels = "auto"
    """What runs the model."""

    @pydantic.model_validator(mode="after")
    def _room_for_a_chunk(self) -> StepCostsParameters:
        if not self.decodes or not 1 <= min(self.decodes) <= max(self.decodes) < self.rows:
            raise ValueError(f"decodes are numbers from 1 to {self.rows - 1}, below rows")
        return self


def plan_step_costs(parameters: StepCostsParameters, shapes: Any) -> Cost:
    """Steps that are timed."""
    rounds, repeats = parameters.rounds + 1, parameters.repeats + 1
    tokens = rounds * 2 * parameters.rows * len(parameters.decodes) + repeats * sum(parameters.table)
    steps = rounds * 3 * len(parameters.decodes) + repeats * (4 + len(parameters.table))
    weights = max(spec.parameter_count() for spec in shapes.models.values())
    seconds = (0.3 * tokens + 10 * steps) * weights * _SECONDS_PER_TOKEN_OF_WEIGHT
    return Cost(tokens=tokens, flops=2.0 * tokens * weights, memory=8.0 * weights, seconds=seconds)


@stage(
    "step_costs",
    parameters=StepCostsParameters,
    inputs={"model": Input("model"), "corpus": Input("corpus")},
    outputs={"costs": "file"},
    plan=plan_step_costs,
    version=2,
)
def step_costs(context: Context, parameters: StepCostsParameters) -> Outcome:
    """Time steps by their rows, and what a decoding row adds to the step of a prompt's chunk."""
    from puna.core.files import write_json
    from puna.decode.step_costs import measure_costs, measure_piggyback
    from puna.model.steppers import make_stepper
    from puna.text.pretrained import load

    model = load(context.inputs["model"], dtype=context.dtype, device=context.device)
    ids = _tokens_of(context.inputs["corpus"], model, parameters.rows)
    texts = max(*parameters.decodes, 16)
    room = texts * (parameters.context + 64) + 5 * (parameters.long_context + 96)
    room += max(parameters.rows, *parameters.table)
    stepper = make_stepper(model, cache_tokens=room, kernels=parameters.kernels)
    metrics: dict[str, float] = {}
    shares = []
    for decodes in parameters.decodes:
        found = measure_piggyback(
            stepper,
            ids,
            decodes=decodes,
            rows=parameters.rows,
            context=parameters.context,
            repeats=parameters.rounds,
        )
        for name, share in (("marginal_share", found.share), ("marginal_share.layers", found.layers)):
            key = f"{name}.decodes_{decodes}"
            metrics |= {key: share.median, f"{key}.low": share.low, f"{key}.high": share.high}
        times = {"decode_only": found.decode_only, "chunk_only": found.chunk_only, "mixed": found.mixed}
        metrics |= {f"seconds.{name}.decodes_{decodes}": seconds for name, seconds in times.items()}
        milliseconds = (f"{1000 * seconds:.1f}" for seconds in times.values())
        shares.append([decodes, *milliseconds, *map(_interval, (found.share, found.layers))])
    costs = measure_costs(
        stepper, ids, rows=parameters.table, long_context=parameters.long_context, repeats=parameters.repeats
    )
    path = context.out / "costs.json"
    write_json(path, {"table": costs.table, "pair": costs.pair, "key": costs.key})
    metrics |= {"seconds.pair": costs.pair, "seconds.key": costs.key}
    metrics |= {f"seconds.rows_{rows}": seconds for rows, seconds in costs.table}
    context.report["tables"] = [
        {
            "title": f"Milliseconds of steps of {parameters.rows} rows ({stepper.name} kernels)",
            "columns": [
                *("decoding texts", "alone", "the chunk alone", "both in one"),
                *("a row's share", "the same without logits"),
            ],
            "rows": shares,
        },
        {
            "title": f"Seconds of a step ({stepper.name} kernels)",
            "columns": ["rows", "seconds", "rows a second"],
            "rows": [[rows, f"{seconds:.4f}", f"{rows / seconds:.0f}"] for rows, seconds in costs.table],
        },
    ]
    return Outcome(outputs={"costs": path}, metrics=metrics)


def _interval(share: Share) -> str:
    return f"{share.median:.2f} ({share.low:.2f} to {share.high:.2f})"


class GivenCosts(Parameters):
    """Step costs of a machine that is not at hand."""

    table: tuple[tuple[int, float], ...]
    """Pairs of rows and seconds, rising."""
    pair: float = pydantic.Field(0.0, ge=0)
    """Seconds of a query-key pair."""
    key: float = pydantic.Field(0.0, ge=0)
    """Seconds of a stored key that a text looks at in a step."""


class Schedule(Parameters):
    """Parameters of the stage ``schedule``."""

    costs: GivenCosts | None = None
    """Step costs, where no file of measured ones is given."""
    requests: int = pydantic.Field(128, ge=2)
    """Requests that come."""
    prompt: int = pydantic.Field(960, ge=1)
    """Mean length of a prompt in tokens."""
    output: int = pydantic.Field(60, ge=2)
    """Mean tokens written."""
    spread: float = pydantic.Field(0.3, ge=0, le=2)
    """Deviation of the logarithm of both lengths."""
    rate: float = pydantic.Field(0.0, ge=0)
    """Requests a second, a Poisson process; 0: all are there from the beginning."""
    max_running: int = pydantic.Field(16, ge=2)
    """Requests that run at once, in each batch of a pipeline."""
    max_batch_tokens: int = pydantic.Field(512, ge=1)
    """Tokens of a step at most."""
    chunk_tokens: int = pydantic.Field(256, ge=1)
    """Tokens of prompts beside decoding texts."""
    stages: int = pydantic.Field(4, ge=2)
    """Stages of the pipeline that is simulated beside one machine."""


def plan_schedule(parameters: Schedule, shapes: Any) -> Cost:
    """A simulation: seconds."""
    steps = parameters.requests * (parameters.output + parameters.prompt / parameters.chunk_tokens)
    return Cost(seconds=1 + 4e-5 * steps * 3, memory=1e8)


@stage(
    "schedule",
    parameters=Schedule,
    inputs={"costs": Input("file", optional=True)},
    outputs={"steps": "file"},
    plan=plan_schedule,
)
def schedule(context: Context, parameters: Schedule) -> Outcome:
    """Simulate decode-maximal batches and whole prompts first, on one machine and in a pipeline."""
    from puna.core.files import write_json
    from puna.decode import schedule_simulator as simulator
    from puna.decode.scheduler import TILE, BatchSettings

    costs = _costs(context, parameters)
    settings = BatchSettings(parameters.max_batch_tokens, parameters.chunk_tokens)
    policies = {
        "decode_maximal": simulator.decode_maximal(settings),
        "prefill_first": simulator.prefill_first(settings),
    }
    arrivals = simulator.draw_arrivals(
        parameters.requests,
        parameters.prompt,
        parameters.output,
        parameters.spread,
        parameters.rate,
        context.seed,
    )
    metrics: dict[str, float] = {}
    steps: dict[str, list[float]] = {}
    rows = []
    for (name, policy), stages in itertools.product(policies.items(), (1, parameters.stages)):
        found = simulator.simulate(arrivals, costs, policy, max_running=parameters.max_running, stages=stages)
        where = name if stages == 1 else f"pipeline.{name}"
        steps[where] = found.costs
        metrics |= {
            f"{where}.variance": found.variance,
            f"{where}.longest_gap": max(found.gaps),
            f"{where}.gap_p99": found.gap(0.99),
            f"{where}.passed_over": found.skipped,
            f"{where}.throughput": found.throughput,
            f"{where}.idle": found.idle,
            f"{where}.first_token_mean": sum(found.first) / len(found.first),
        }
        rows.append([where, *(f"{metrics[f'{where}.{key}']:.4g}" for key in _SHOWN)])
    context.report["tables"] = [{"title": "Simulated batching", "columns": ["policy", *_SHOWN], "rows": rows}]
    # The dearest step that the policy may take: all rows, each text at its longest.
    longest = max(arrival.prompt + arrival.output for arrival in arrivals)
    chunk = parameters.chunk_tokens + TILE + parameters.max_running
    metrics["chunk_step"] = costs.of(chunk, chunk * longest, (parameters.max_running + 1) * longest)
    # Steps that all cost the same have no variance: the ratio is then 0, not a division by it.
    variance = max(metrics["decode_maximal.variance"], 1e-18)
    metrics["variance_ratio"] = metrics["prefill_first.variance"] / variance
    path = context.out / "steps.json"
    write_json(path, steps)
    return Outcome(outputs={"steps": path}, metrics=metrics)


_SHOWN = ("variance", "longest_gap", "gap_p99", "passed_over", "throughput", "idle", "first_token_mean")


def _costs(context: Context, parameters: Schedule) -> Any:
    from puna.core.files import read_json
    from puna.decode.schedule_simulator import StepCosts

    given = context.inputs.get("costs")
    if parameters.costs is not None and given is None:
        return StepCosts(parameters.costs.table, parameters.costs.pair, parameters.costs.key)
    if given is None or parameters.costs is not None:
        raise PunaError(
            "step costs come from one place",
            where="schedule",
            found="none" if given is None else "a file, and the parameter",
            expected="the input `costs`, or the parameter `costs`",
        )
    found = read_json(Path(given))
    try:
        table = tuple((int(rows), float(seconds)) for rows, seconds in found["table"])
        return StepCosts(table, float(found["pair"]), float(found["key"]))
    except (KeyError, TypeError, ValueError) as error:
        raise PunaError(
            "not a file of step costs", where=given, found=repr(error), expected="table, pair and key"
        ) from None


def _tokens_of(corpus: Any, model: Any, count: int) -> list[int]:
    """The first ``count`` tokens of a corpus of documents."""
    from puna.data.corpus import Corpus

    ids: list[int] = []
    for text in Corpus.open(corpus, kind="documents").texts():
        ids += model.tokenizer.encode(text)
        if len(ids) >= count:
            return ids[:count]
    raise PunaError("the corpus is too short", where=corpus, found=f"{len(ids)} tokens", expected=f"{count}")
