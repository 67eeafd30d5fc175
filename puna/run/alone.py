"""Any stage alone, without a recipe: ``puna stage VERB --in name=path --out folder key=value``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from puna.core.errors import PunaError
from puna.core.files import fingerprint
from puna.core.stage import get_stage
from puna.run import fingerprints, inputs, machine
from puna.run.execute import execute, finish_interrupted
from puna.run.recipe import load
from puna.run.record import StageRecord


def run_stage(
    verb: str,
    given: Mapping[str, Any],
    out: str | Path,
    settings: Mapping[str, Any] | None = None,
    *,
    seed: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    force: bool = False,
) -> StageRecord:
    """Run the stage ``verb`` and leave its folder at ``out``; an unchanged one is not run again.

    ``given`` maps inputs to paths, assets or hub ids, as ``in`` does in a recipe; ``settings`` are
    its parameters, dotted where they are nested. The folder holds the outputs and ``stage.json``.
    """
    name = get_stage(verb).name.replace("-", "_")
    overrides = {f"{name}.in.{key}": value for key, value in given.items()}
    overrides |= {f"{name}.{key}": value for key, value in (settings or {}).items()}
    bare = {"name": "alone", "title": verb, "stages": {name: {"use": verb}}}
    recipe = load(bare, None, overrides, seed=seed, device=device, dtype=dtype)
    entry = recipe.stages[name]
    final = Path(out)
    if final.exists() and not (final / "stage.json").is_file():
        empty = final.is_dir() and not any(final.iterdir())
        if not empty:
            raise PunaError("holds something that no stage made", where=final, fix="choose another --out")
        final.rmdir()
    finish_interrupted(final)
    prints, _ = inputs.fingerprints_of(entry, {})
    where = machine.choose_device(recipe.header.device)
    parts = fingerprints.parts_of(
        entry, prints, seed=recipe.header.seed, device=where, dtype=recipe.header.dtype
    )
    old = StageRecord.open(final)
    if old is not None and old.fingerprint == fingerprint(parts) and not old.damage() and not force:
        return old
    described = inputs.written_down(entry, prints)
    return execute(entry, final, inputs.given_to(entry, {}), parts, described=described, afresh=force)


def parse_inputs(verb: str, items: Sequence[str]) -> dict[str, Any]:
    """Inputs from the command line: ``name=reference``, ``name.key=reference``, or a reference alone.

    An input that is given several times takes several; a reference alone is the one input that the
    stage needs.
    """
    stage = get_stage(verb)
    needed = [name for name, declared in stage.inputs.items() if not declared.optional]
    found: dict[str, Any] = {}
    for item in items:
        name, equals, reference = item.partition("=")
        if not equals:
            if len(needed) != 1:
                raise PunaError(
                    "which input is this?",
                    where=f"--in {item}",
                    expected=f"name=..., of {', '.join(stage.inputs)}",
                )
            name, reference = needed[0], item
        if name in found:
            before = found[name] if isinstance(found[name], list) else [found[name]]
            found[name] = [*before, reference]
        else:
            found[name] = reference
    return found
