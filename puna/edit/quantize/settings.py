"""What a quantisation is: grid x rounding x transform x mix, as frozen data.

Needs no torch, so that plans and recipes can be checked without it.
"""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic

from puna.core.stage import Parameters


class Uniform(Parameters):
    """Levels at equal distances, 2^bits of them."""

    kind: Literal["uniform"] = "uniform"
    bits: int = pydantic.Field(4, ge=1, le=8)
    group: int | None = pydantic.Field(128, ge=1)
    """Inputs that share a step; null: all inputs of an output."""
    symmetric: bool = False
    """The zero point is the middle level, and none is stored."""
    deviations: float | None = pydantic.Field(None, gt=0)
    """Half the range in root mean squares of the whole matrix, which then has one step; null: by the
    extremes.
    """


class Nf4(Parameters):
    """The 16 levels of NF4, times the largest magnitude in a block of 64, itself held in 8 bits."""

    kind: Literal["nf4"] = "nf4"
    shift: bool = False
    """Move each block to where its 16 codes carry most entropy (IR-QLoRA); the move is held in 8 bits."""
    points: int = pydantic.Field(100, ge=1)
    """Moves tried on either side of the block's median."""


class Binary(Parameters):
    """Two levels, +a and -a, a the mean magnitude of the group."""

    kind: Literal["binary"] = "binary"
    group: int | None = pydantic.Field(None, ge=1)
    """Inputs that share the magnitude."""


class DualBinary(Parameters):
    """Two binary digits with a number each: 0, a1, a2 and a1 + a2, begun at a1 = 2s, a2 = -s."""

    kind: Literal["dual_binary"] = "dual_binary"
    group: int | None = pydantic.Field(64, ge=1)
    """Inputs that share both numbers."""


class ResidualBinary(Parameters):
    """A sign times its mean magnitude, and what is left in the same way: four levels."""

    kind: Literal["residual_binary"] = "residual_binary"
    group: int | None = pydantic.Field(None, ge=1)
    """Inputs that share the two magnitudes."""


Grid = Annotated[Uniform | Nf4 | Binary | DualBinary | ResidualBinary, pydantic.Field(discriminator="kind")]


class Nearest(Parameters):
    """Each weight to its nearest level."""

    kind: Literal["nearest"] = "nearest"


class Gptq(Parameters):
    """Column by column; what rounding one leaves is made good by the columns that follow (2210.17323)."""

    kind: Literal["gptq"] = "gptq"
    damping: float = pydantic.Field(0.01, gt=0)
    """Added to the diagonal of the Hessian, in means of the diagonal."""
    by_activation: bool = False
    """Inputs of the largest second moment first, groups fitted beforehand (act-order with static groups)."""


class Ldlq(Parameters):
    """The same error seen backwards: each column is rounded with feedback of those before it (2307.13304)."""

    kind: Literal["ldlq"] = "ldlq"
    damping: float = pydantic.Field(0.01, gt=0)
    """What the diagonal of the Hessian gets, in means of the diagonal."""


Rounding = Annotated[Nearest | Gptq | Ldlq, pydantic.Field(discriminator="kind")]


class Awq(Parameters):
    """Inputs with large activations get larger weights, by a power searched for (2306.00978)."""

    kind: Literal["awq"] = "awq"
    points: int = pydantic.Field(20, ge=1)
    """Powers tried, from 0 to 1."""
    clip: bool = True
    """Search the range of each group too, except of queries and keys."""


class Smooth(Parameters):
    """Large activations are moved into the weights, by a fixed power (2211.10438)."""

    kind: Literal["smooth"] = "smooth"
    power: float = pydantic.Field(0.5, ge=0, le=1)
    """0 leaves activations alone, 1 makes them all equal."""


class Rotate(Parameters):
    """Weights between two random rotations while they are rounded (2307.13304); undone in what is kept."""

    kind: Literal["rotate"] = "rotate"
    rescale: bool = True
    """Balance the scales of inputs between weights and activations before."""


Transform = Annotated[Awq | Smooth | Rotate, pydantic.Field(discriminator="kind")]


class BitsByGroup(Parameters):
    """As many groups with a bit more as with a bit less, a number that is searched for (2405.14917)."""

    kind: Literal["bits_by_group"] = "bits_by_group"
    fit_salient: bool = True
    """Steps that keep the most salient weights of a group apart from the others in their error."""


class SalientWeights(Parameters):
    """A share of the weights, one by one, gets 8 bits (2310.00034)."""

    kind: Literal["salient_weights"] = "salient_weights"
    share: float = pydantic.Field(0.1, ge=0, le=1)
    by: Literal["magnitude", "hessian"] = "hessian"
    """What makes a weight salient."""


class SalientColumns(Parameters):
    """Salient columns get a residual binary grid, the others are split by magnitude in two parts
    (2402.04291).
    """

    kind: Literal["salient_columns"] = "salient_columns"
    block: int = pydantic.Field(128, ge=2)
    """Columns among which the salient ones are chosen."""
    most: int = pydantic.Field(30, ge=1)
    """How many of them there may be."""
    breaks: int = pydantic.Field(16, ge=2)
    """Magnitudes tried for the split."""


Mix = Annotated[BitsByGroup | SalientWeights | SalientColumns, pydantic.Field(discriminator="kind")]


class Quantization(Parameters):
    """One way to quantise the matrices of all layers; embeddings, norms, biases and head stay as they are."""

    grid: Grid = pydantic.Field(default_factory=Uniform)
    rounding: Rounding = pydantic.Field(default_factory=Nearest)
    transform: Transform | None = None
    mix: Mix | None = None
    activation_bits: int | None = pydantic.Field(None, ge=2, le=16)
    """Bits of what enters each matrix, token by token, symmetric; null: not rounded."""
    skip_layers: tuple[int, ...] = ()
    """Layers that are left as they are."""

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Quantization:
        grid, mix, transform = self.grid, self.mix, self.transform
        uniform = grid if isinstance(grid, Uniform) else None
        if isinstance(mix, BitsByGroup) and not (uniform and uniform.group and 2 <= uniform.bits <= 7):
            raise ValueError("bits_by_group mixes uniform grids of 2 to 7 bits by groups")
        if isinstance(mix, SalientColumns) and not isinstance(grid, Binary):
            raise ValueError("salient_columns splits what a binary grid rounds")
        if mix is not None and not uniform and not isinstance(grid, Binary):
            raise ValueError(f"no mix goes with the grid {grid.kind}")
        if isinstance(transform, (Awq, Smooth)) and not uniform:
            raise ValueError(f"the transform {transform.kind} is made for uniform grids")
        if uniform and uniform.deviations and (mix is not None or isinstance(transform, Awq)):
            raise ValueError("mixes and awq need a grid that goes by extremes: deviations null")
        if isinstance(transform, Rotate) and mix is not None:
            raise ValueError("no mix goes with rotations: they leave no weight salient")
        if isinstance(grid, Nf4) and grid.shift and isinstance(transform, Rotate):
            raise ValueError("a shifted grid goes by the entropy of plain weights, not of rotated ones")
        return self

    @property
    def calibrated(self) -> bool:
        """Whether activations are looked at."""
        salient = isinstance(self.mix, (BitsByGroup, SalientColumns))
        salient |= isinstance(self.mix, SalientWeights) and self.mix.by == "hessian"
        return not isinstance(self.rounding, Nearest) or self.transform is not None or salient
