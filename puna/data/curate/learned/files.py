"""Learned models on disk: safetensors with a JSON text of what they are beside the arrays."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from puna.core.errors import PunaError
from puna.core.files import room_for, write_aside

_FORMAT = 1


def save_model(path: Path, kind: str, arrays: Mapping[str, NDArray[Any]], about: Mapping[str, Any]) -> None:
    """Write arrays and what is told about them; the file appears whole or not at all."""
    from safetensors.numpy import save_file

    told = {"puna": json.dumps({"format": _FORMAT, "kind": kind, **about}, ensure_ascii=False)}
    with room_for(path), write_aside(path) as aside:
        save_file({name: numpy.ascontiguousarray(array) for name, array in arrays.items()}, aside, told)


def load_model(path: Path, kind: str, fix: str) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The arrays of a model of that kind, and what is told about it; ``fix`` says how one is made."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise PunaError("file not found", where=path, fix=fix)
    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads((file.metadata() or {}).get("puna", "{}"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise PunaError("not a safetensors file", where=path, found=error, fix=fix) from None
    if about.get("kind") != kind:
        raise PunaError(
            "a model of another kind", where=path, found=about.get("kind"), expected=kind, fix=fix
        )
    if about["format"] != _FORMAT:
        raise PunaError("a model of another format", where=path, found=about["format"], expected=_FORMAT)
    return arrays, about


def area_under_curve(positive: NDArray[numpy.float64], negative: NDArray[numpy.float64]) -> float:
    """The probability that a positive has the higher score of the two (ties count half)."""
    scores = numpy.concatenate([positive, negative])
    _, inverse, counts = numpy.unique(scores, return_inverse=True, return_counts=True)
    ranks = (numpy.cumsum(counts) - (counts - 1) / 2)[inverse]  # [n] mean ranks, from 1
    above = ranks[: len(positive)].sum() - len(positive) * (len(positive) + 1) / 2
    return float(above / (len(positive) * len(negative)))
