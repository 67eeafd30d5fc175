"""Quantised checkpoints in the layout of compressed-tensors, which transformers and vLLM open.

Two of its formats: ``pack-quantized``, levels packed into 32-bit words with a step (and a zero point) for
each group, and ``int-quantized``, 8-bit integers with a step for each output, whose activations are rounded
to 8 bits token by token by whoever runs it. Packed here; the package itself is not needed. Levels are stored
less half of their number, as signed integers, and moved back when packed.

All matrices of one checkpoint share bits, group and symmetry; embeddings, norms, biases and head stay plain.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from puna.core.errors import PunaError
from puna.model.uniform_grid import UniformGrid

METHOD = "compressed-tensors"
PACKED, INTEGERS = "pack-quantized", "int-quantized"
PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
_WORD = 32
_MASK = 2**32 - 1


def pack_columns(levels: Tensor, bits: int) -> Tensor:
    """Levels [rows, columns] in int32 words [rows, words], bit behind bit, the first level lowest.

    32 levels take ``bits`` words; where 32 is no multiple of ``bits``, a level may stand in two words.
    """
    columns = levels.shape[1]
    padded = functional.pad(levels, (0, -columns % _WORD)).view(len(levels), -1, _WORD)
    words = torch.zeros(*padded.shape[:2], bits + 1, dtype=torch.int64)  # the last one takes no bit
    for place in range(_WORD):
        word, shift = divmod(place * bits, _WORD)
        level = padded[:, :, place].long() << shift
        words[:, :, word] |= level & _MASK
        words[:, :, word + 1] |= level >> _WORD
    packed = words[:, :, :bits].flatten(1)[:, : -(-columns * bits // _WORD)]
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32).contiguous()


def unpack_columns(words: Tensor, bits: int, columns: int) -> Tensor:
    """The way back from :func:`pack_columns`: uint8 [rows, columns]."""
    wide = functional.pad(words.long() & _MASK, (0, -words.shape[1] % bits)).view(len(words), -1, bits)
    wide = functional.pad(wide, (0, 1))
    levels = torch.empty(*wide.shape[:2], _WORD, dtype=torch.uint8)
    for place in range(_WORD):
        word, shift = divmod(place * bits, _WORD)
        both = wide[:, :, word] | wide[:, :, word + 1] << _WORD
        levels[:, :, place] = (both >> shift & (2**bits - 1)).to(torch.uint8)
    return levels.flatten(1)[:, :columns]


def common_grid(grids: Mapping[str, UniformGrid], where: object) -> tuple[UniformGrid, bool]:
    """A grid that stands for all in bits, group and symmetry, and whether all go by rows.

    Raises :class:`PunaError` if they differ.
    """
    by_row = all(grid.by_row for grid in grids.values())
    kinds = {
        (grid.bits, None if by_row else grid.group, grid.symmetric, grid.activation_bits)
        for grid in grids.values()
    }
    if len(kinds) != 1:
        raise PunaError(
            "all matrices of a packed checkpoint lie on grids of one kind",
            where=where,
            found=", ".join(f"{bits} bits by {group or 'rows'}" for bits, group, *_ in sorted(kinds, key=str))
            or "none that was quantised to a uniform grid",
            fix="write it dense: format=dense",
        )
    return next(iter(grids.values())), by_row


def quantisation_config(grid: UniformGrid, by_row: bool) -> dict[str, Any]:
    """The ``quantization_config`` of config.json. ``by_row``: one step for each output."""
    activations = None
    if grid.activation_bits is not None:
        activations = {
            "num_bits": grid.activation_bits,
            "type": "int",
            "symmetric": True,
            "strategy": "token",
            "dynamic": True,
        }
    weights = {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "channel" if by_row else "group",
        "group_size": None if by_row else grid.group,
        "dynamic": False,
    }
    form = PACKED if activations is None else INTEGERS
    scheme = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
        "format": form,
    }
    return {
        "quant_method": METHOD,
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": scheme},
        "kv_cache_scheme": None,
    }


def packed_tensors(name: str, weight: Tensor, grid: UniformGrid, where: object) -> dict[str, Tensor]:
    """What stands in the file for one matrix; raises for weights that have left their grid."""
    levels = grid.levels(weight)
    outputs, inputs = weight.shape
    by_row = grid.by_row
    if levels is None or not (by_row or inputs % grid.group == 0):
        raise PunaError(
            f"tensor {name!r} cannot be packed",
            where=where,
            found="weights off their grid"
            if levels is None
            else f"{inputs} inputs in groups of {grid.group}",
            expected="weights as quantisation left them" if levels is None else "whole groups",
            fix="write it dense: format=dense" if levels is None else "choose a group that divides the width",
        )
    module = name.removesuffix(".weight")
    if grid.activation_bits is not None:
        if grid.bits != 8 or grid.activation_bits != 8 or not grid.symmetric or not by_row:
            raise PunaError(
                "weights and activations have a packed form at 8 bits, symmetric, by rows",
                where=where,
                found=f"{grid.bits} bits of weights, {grid.activation_bits} of activations",
                fix="write it dense: format=dense",
            )
        return {name: (levels.int() - 128).to(torch.int8), f"{module}.weight_scale": grid.step}
    found = {
        f"{module}.weight_packed": pack_columns(levels, grid.bits),
        f"{module}.weight_scale": grid.step,
        f"{module}.weight_shape": torch.tensor([outputs, inputs], dtype=torch.int64),
    }
    if not grid.symmetric:
        zero = pack_columns(grid.zero.T.contiguous(), grid.bits)  # packed along the outputs
        found[f"{module}.weight_zero_point"] = zero.T.contiguous()
    return found


class PackedScheme:
    """How a checkpoint's matrices are packed, out of its config; refuses what this layout does not cover."""

    def __init__(self, config: Mapping[str, Any], where: object) -> None:
        self.where = where
        try:
            (scheme,) = config["config_groups"].values()
            weights, activations = scheme["weights"], scheme.get("input_activations")
            self.form = str(config["format"])
            self.bits, self.symmetric = int(weights["num_bits"]), bool(weights["symmetric"])
            size = weights.get("group_size")
            self.group = None if weights["strategy"] == "channel" else int(size)
            self.activation_bits = None if activations is None else int(activations["num_bits"])
            fit = weights["type"] == "int" and weights["strategy"] in ("channel", "group")
            fit &= self.form in (PACKED, INTEGERS) and 1 <= self.bits <= 8 and not weights.get("actorder")
            fit &= config.get("quant_method") == METHOD
        except (KeyError, TypeError, ValueError, AttributeError):
            fit = False
        if not fit:
            raise PunaError(
                "this quantised checkpoint is not read",
                where=where,
                found=f"quantization_config of {config.get('quant_method')!r}, {config.get('format')!r}",
                expected=f"{METHOD}, one scheme of {PACKED} or {INTEGERS} weights",
                fix="use an unquantised checkpoint",
            )

    def read(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, UniformGrid]:
        """Weights float32 [outputs, inputs] and their grid, of the parts of one matrix by their last
        names.
        """
        step = parts["weight_scale"]
        if not torch.equal(step.half().to(step.dtype), step):
            raise PunaError("steps of a packed checkpoint fit half precision", where=self.where)
        half = 2 ** (self.bits - 1)
        if self.form == INTEGERS:
            levels = (parts["weight"].int() + half).to(torch.uint8)
        else:
            inputs = int(parts["weight_shape"][1])
            if parts["weight_packed"].shape[1] != -(-inputs * self.bits // _WORD):
                raise PunaError(
                    "levels are packed in another way",
                    where=self.where,
                    found=f"{parts['weight_packed'].shape[1]} words for {inputs} inputs of {self.bits} bits",
                    expected=f"{-(-inputs * self.bits // _WORD)} words, bit behind bit",
                    fix="write it with a newer version of the program that made it",
                )
            levels = unpack_columns(parts["weight_packed"], self.bits, inputs)
        zero = torch.full(step.shape, half, dtype=torch.uint8)
        if "weight_zero_point" in parts:
            packed = parts["weight_zero_point"].T.contiguous()
            zero = unpack_columns(packed, self.bits, len(step)).T.contiguous()
        group = self.group or levels.shape[1]
        grid = UniformGrid(self.bits, group, self.symmetric, step.half(), zero, self.activation_bits)
        return grid.decode(levels), grid


def quantisation_of(config: Mapping[str, Any], folder: Path) -> PackedScheme | None:
    """The scheme of a checkpoint's config, None for plain weights."""
    stated = config.get("quantization_config")
    return None if not isinstance(stated, Mapping) else PackedScheme(stated, folder / "config.json")
