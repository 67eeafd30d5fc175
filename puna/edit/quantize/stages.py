"""The stages of quantisation: ``quantize``, and of the low-bit study (S18) ``low_bit_table`` and
``low_bit_checks``.
"""

from __future__ import annotations

from typing import Any, Literal

import pydantic

from puna.core.stage import Context, Cost, Input, Outcome, Parameters, stage
from puna.edit.quantize.settings import Quantization
from puna.train import plan

_BYTES = {"dense": 4, "packed": 1, "gguf": 1}
_ROUNDING_OPERATIONS = 60  # for each weight and each column it is updated by, measured on SmolLM2


class Calibrated(Parameters):
    """Text to calibrate on, which stages of quantisation have in common."""

    calibration_rows: int = pydantic.Field(32, ge=1)
    """Rows of calibration text, drawn by the run's seed."""
    calibration_tokens: int = pydantic.Field(512, ge=16)
    """Tokens of a row."""


class Quantize(Calibrated):
    """Parameters of the stage ``quantize``."""

    quantization: Quantization | str
    """Grid, rounding, transform and mix, or the name of a setting of the low-bit study, such as
    gptq-4-g128.
    """
    format: Literal["packed", "gguf", "dense"] = "packed"
    """packed: integers in the layout of compressed-tensors; gguf: blocks that hold the grid; dense: float
    weights.
    """
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What weights that are not packed are saved in, if format is dense."""

    @pydantic.field_validator("quantization")
    @classmethod
    def _known(cls, value: Quantization | str) -> Quantization | str:
        if isinstance(value, str):
            from puna.edit.quantize.methods import SETTINGS

            if value not in SETTINGS:
                raise ValueError(f"no setting of the low-bit study is called {value!r}")
            if SETTINGS[value].training is not None:
                raise ValueError(f"{value!r} trains after rounding, which the stage low_bit_table does")
        return value


def _seconds(parameters: Calibrated, shapes: Any) -> float:
    """Of one calibrated quantisation: passes in the run's dtype, the rest in float32."""
    passes, rest = _operations(parameters, shapes.spec)
    return float(shapes.device.seconds(passes, shapes.dtype) + shapes.device.seconds(rest, "float32"))


def _operations(parameters: Calibrated, spec: Any) -> tuple[float, float]:
    """Two passes over the calibration text; its second moments and the updates of rounding."""
    tokens = parameters.calibration_rows * parameters.calibration_tokens
    passes = 2 * tokens * plan.forward_operations(spec, parameters.calibration_tokens)
    moments = rounding = 0.0
    for block in spec.blocks:
        for outputs, inputs in plan.projections(spec, block).values():
            moments += tokens * inputs * inputs
            rounding += outputs * inputs * inputs + _ROUNDING_OPERATIONS * outputs * inputs
    return float(passes), float(moments + rounding)


def _plan_quantize(parameters: Quantize, shapes: Any) -> Cost:
    """The weights in float32, the hidden states of the calibration text, and one block's second moments."""
    spec = shapes.spec
    if spec is None:
        return Cost()
    chosen = parameters.quantization
    if isinstance(chosen, str):
        from puna.edit.quantize.methods import SETTINGS

        chosen = SETTINGS[chosen].quantization
    weights = spec.parameter_count()
    moved = shapes.device.read_seconds((4 + _BYTES[parameters.format]) * weights)
    if not chosen.calibrated:
        return Cost(memory=5 * weights, seconds=moved, spec=spec)
    tokens = parameters.calibration_rows * parameters.calibration_tokens
    widest = max((max(block.width, spec.hidden_size) for block in spec.blocks), default=0)
    return Cost(
        tokens=tokens,
        flops=sum(_operations(parameters, spec)),
        memory=4 * weights + 2 * 4 * tokens * spec.hidden_size + 4 * 4 * widest**2,
        seconds=_seconds(parameters, shapes) + moved,
        spec=spec,
    )


@stage(
    "quantize",
    parameters=Quantize,
    inputs={"model": Input("model"), "corpus": Input("corpus", optional=True)},
    outputs={"model": "model"},
    plan=_plan_quantize,
)
def quantize(context: Context, parameters: Quantize) -> Outcome:
    """Put the matrices of all layers on a grid of few bits, calibrated on a corpus where the method asks for
    it.

    Time grows with the weights times their width, and with the calibration text; one block is worked on at a
    time.
    """
    from puna.edit.quantize.jobs import run_quantize

    return run_quantize(context, parameters)


class LowBitTable(Calibrated):
    """Parameters of the stage ``low_bit_table``."""

    settings: tuple[str, ...] | Literal["all"] = "all"
    """Names of settings of the study, such as rtn-3-g128; all: the eleven methods at all their widths."""
    evaluation_bytes: int = pydantic.Field(20_000, ge=100)
    """Bytes of text of each evaluation corpus."""
    task_items: int = pydantic.Field(50, ge=5)
    """Items of the task, out of the first evaluation corpus."""
    decoded_tokens: int = pydantic.Field(48, ge=1)
    """Tokens of a timed text."""
    training_rows: int = pydantic.Field(24, ge=1)
    """Rows of the calibration corpus that methods with a training learn from."""
    training_tokens: int = pydantic.Field(256, ge=16)
    """Tokens of such a row."""
    training_steps: int = pydantic.Field(12, ge=2)
    """Steps of such a training, of two rows each."""
    learning_rate: float = pydantic.Field(2e-4, gt=0)
    """Of such a training, constant after the first step."""
    lora_rank: int = pydantic.Field(16, ge=1)
    """Rank of the LoRA that follows NF4."""

    @pydantic.field_validator("settings")
    @classmethod
    def _all_known(cls, value: tuple[str, ...] | str) -> tuple[str, ...] | str:
        from puna.edit.quantize.methods import SETTINGS

        unknown = [] if isinstance(value, str) else [name for name in value if name not in SETTINGS]
        if unknown:
            raise ValueError(f"no setting of the study is called {unknown[0]!r}")
        return value


def _plan_table(parameters: LowBitTable, shapes: Any) -> Cost:
    """All settings one after another: the copies of the model, and reading the evaluation text with each."""
    from puna.edit.quantize.methods import SETTINGS

    spec = shapes.spec
    if spec is None:
        return Cost()
    names = tuple(SETTINGS) if parameters.settings == "all" else tuple(parameters.settings)
    count = 1 + len(names)
    calibrated = sum(SETTINGS[name].quantization.calibrated for name in names)
    read = max(len(shapes.corpora) - 1, 1) * parameters.evaluation_bytes / 3 + 144 * parameters.task_items
    reading = count * read * plan.forward_operations(spec, 512)
    rounding = calibrated * sum(_operations(parameters, spec))
    trained = sum(SETTINGS[name].training is not None for name in names) * 2 * parameters.training_steps
    learning = 4 * trained * parameters.training_tokens * plan.forward_operations(spec, 512)
    flops = reading + rounding + learning
    weights = 4 * spec.parameter_count()
    memory = 3 * weights + 8 * parameters.calibration_rows * parameters.calibration_tokens * spec.hidden_size
    seconds = calibrated * _seconds(parameters, shapes) + shapes.device.seconds(learning, "float32")
    seconds += shapes.device.seconds(reading, shapes.dtype)
    seconds += 2 * count * parameters.decoded_tokens * shapes.device.read_seconds(weights)
    return Cost(tokens=count * read, flops=flops, memory=memory, seconds=seconds)


@stage(
    "low_bit_table",
    parameters=LowBitTable,
    inputs={"model": Input("model"), "corpus": Input("corpus"), "texts": Input("corpus", many=True)},
    outputs={"table": "file"},
    plan=_plan_table,
    resumes="rows",
)
def low_bit_table(context: Context, parameters: LowBitTable) -> Outcome:
    """Measure one model under many quantisations: bits per byte, a task, true bytes, seconds, tokens a
    second.

    Time grows with the number of settings; a row that was measured is not measured again.
    """
    from puna.edit.quantize.jobs import run_table

    return run_table(context, parameters)


class LowBitChecks(Calibrated):
    """Parameters of the stage ``low_bit_checks``."""

    layers: tuple[int, ...] = (0,)
    """Layers whose matrices the checks of errors and entropies look at."""
    shares: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.4)
    """Shares of salient weights, rising, from 0."""
    shift_points: int = pydantic.Field(10, ge=1)
    """Shifts tried on either side of a block's median."""

    @pydantic.field_validator("shares")
    @classmethod
    def _rising(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len(value) < 2 or value[0] != 0 or list(value) != sorted(set(value)) or value[-1] > 1:
            raise ValueError("shares rise from 0, at most to 1")
        return value


def _plan_checks(parameters: LowBitChecks, shapes: Any) -> Cost:
    """A handful of quantisations of a few layers."""
    spec = shapes.spec
    if spec is None:
        return Cost()
    share = len(parameters.layers) / max(len(spec.blocks), 1)
    flops = 12 * share * sum(_operations(parameters, spec))
    memory = 3 * 4 * spec.parameter_count()
    return Cost(flops=flops, memory=memory, seconds=12 * share * _seconds(parameters, shapes))


@stage(
    "low_bit_checks",
    parameters=LowBitChecks,
    inputs={"model": Input("model"), "corpus": Input("corpus")},
    plan=_plan_checks,
)
def low_bit_checks(context: Context, parameters: LowBitChecks) -> Outcome:
    """Check on a real model what must hold exactly of the low-bit methods, and their order by output
    errors.
    """
    from puna.edit.quantize.jobs import run_checks

    return run_checks(context, parameters)
