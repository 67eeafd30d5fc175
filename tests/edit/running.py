"""A stage of this room, run as a recipe would run it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from puna.core.stage import Context, Outcome, get_stage, validate


def run_stage(
    name: str, out: Path, inputs: dict[str, Any], parameters: dict[str, Any]
) -> tuple[Outcome, Context]:
    """In float32 with seed 0; what it leaves, and the context with its report."""
    stage = get_stage(name)
    context = Context(name, out, inputs, seed=0, dtype="float32")
    return stage.function(context, validate(stage.parameters, parameters, where="test")), context
