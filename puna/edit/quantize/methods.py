"""The eleven methods of the low-bit study as settings of grid, rounding, transform and mix, at all its bit
widths.

System S18 (How Good Are Low-bit Quantized LLaMA3 Models?, 2404.14047). Each method says where it is from and
what is simplified here; the parts say the rest. 8 bits are symmetric, so that they have a packed form that is
exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from puna.core.errors import unknown_name
from puna.edit.quantize.settings import (
    Awq,
    Binary,
    BitsByGroup,
    DualBinary,
    Gptq,
    Ldlq,
    Nf4,
    Quantization,
    Rotate,
    SalientColumns,
    SalientWeights,
    Smooth,
    Uniform,
)

GROUP = 128
Training = Literal["dual", "lora", "pooled_lora"]


@dataclass(frozen=True)
class Method:
    """A method of the study: its paper, and in what it is simpler here."""

    title: str
    paper: str
    simplified: str


METHODS = {
    "rtn": Method("RTN", "2404.14047", "nothing: zero is always among the levels"),
    "gptq": Method("GPTQ", "2210.17323", "nothing: act-order, with groups fitted beforehand"),
    "awq": Method("AWQ", "2306.00978", "the error searched on is that of each matrix's own outputs"),
    "slim": Method("SliM-LLM", "2405.14917", "groups are mixed by squared error, not by divergence"),
    "quip": Method(
        "QuIP", "2307.13304", "rotations are random Kronecker products; no greedy passes after LDLQ"
    ),
    "db": Method(
        "DB-LLM", "2402.11960", "the distillation weighs tokens by the teacher's entropy over its mean"
    ),
    "pb": Method("PB-LLM", "2310.00034", "GPTQ with fixed salient weights; no training"),
    "billm": Method("BiLLM", "2402.04291", "errors are made good inside blocks too; 16 breaks are tried"),
    "smooth": Method(
        "SmoothQuant", "2211.10438", "the same power everywhere; products are float, of rounded numbers"
    ),
    "qlora": Method("QLoRA", "2305.14314", "AdamW is not paged; a small budget of documents"),
    "ir": Method("IR-QLoRA", "2402.05445", "51 shifts are tried, not 201, and 0; the same budget"),
}


@dataclass(frozen=True)
class Setting:
    """One row of the table: a method at a width; ``training`` is what follows the rounding."""

    method: str
    label: str
    quantization: Quantization
    training: Training | None = None


def _uniform(bits: int, group: int | None = GROUP) -> Uniform:
    return Uniform(bits=bits, group=group, symmetric=bits == 8)


def _grouped() -> Iterator[tuple[str, Setting]]:
    """RTN, GPTQ and AWQ with 8, 4, 3, 2 bits by rows and 4, 3, 2 by groups."""
    widths: list[tuple[int, int | None]] = [(bits, None) for bits in (8, 4, 3, 2)]
    widths += [(bits, GROUP) for bits in (4, 3, 2)]
    for bits, group in widths:
        end, label = f"{bits}" + ("-g128" if group else ""), f"W{bits}" + (" g128" if group else "")
        grid = _uniform(bits, group)
        yield f"rtn-{end}", Setting("rtn", label, Quantization(grid=grid))
        yield (
            f"gptq-{end}",
            Setting("gptq", label, Quantization(grid=grid, rounding=Gptq(by_activation=True))),
        )
        yield f"awq-{end}", Setting("awq", label, Quantization(grid=grid, transform=Awq()))


def _others() -> Iterator[tuple[str, Setting]]:
    for bits in (4, 3, 2):
        slim = Quantization(grid=_uniform(bits), rounding=Gptq(), mix=BitsByGroup())
        yield f"slim-{bits}-g128", Setting("slim", f"W{bits} g128", slim)
    for bits in (4, 3, 2):
        grid = Uniform(bits=bits, group=None, deviations=2.4)
        quip = Quantization(grid=grid, rounding=Ldlq(), transform=Rotate())
        yield f"quip-{bits}", Setting("quip", f"W{bits}", quip)
    yield "db-2", Setting("db", "W2 g64", Quantization(grid=DualBinary()), "dual")
    for share, name in ((1 / 7, "2.0"), (0.1, "1.7")):
        pb = Quantization(grid=Binary(), rounding=Gptq(), mix=SalientWeights(share=share))
        yield f"pb-{name}", Setting("pb", f"W{name}", pb)
    billm = Quantization(grid=Binary(), rounding=Gptq(), mix=SalientColumns())
    yield "billm-1.1", Setting("billm", "W1.1", billm)
    for bits, power in ((8, 0.8), (6, 0.8), (4, 0.8)):
        grid = Uniform(bits=bits, group=None, symmetric=True)
        smooth = Quantization(grid=grid, transform=Smooth(power=power), activation_bits=bits)
        yield f"smooth-{bits}", Setting("smooth", f"W{bits}A{bits}", smooth)
    yield "nf4", Setting("qlora", "NF4, untuned", Quantization(grid=Nf4()))
    yield "qlora-4", Setting("qlora", "NF4 + LoRA", Quantization(grid=Nf4()), "lora")
    yield "ir-nf4", Setting("ir", "shifted NF4, untuned", Quantization(grid=Nf4(shift=True, points=25)))
    pooled = Quantization(grid=Nf4(shift=True, points=25))
    yield "ir-qlora-4", Setting("ir", "shifted NF4 + pooled LoRA", pooled, "pooled_lora")


SETTINGS: dict[str, Setting] = {**dict(_grouped()), **dict(_others())}


def setting(name: str) -> Setting:
    """A setting by its name, such as gptq-3-g128."""
    if name not in SETTINGS:
        raise unknown_name("quantisation", name, SETTINGS)
    return SETTINGS[name]
