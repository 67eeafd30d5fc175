"""Any stage alone, without a recipe: ``puna stage VERB --in name=path --out folder key=value``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from puna.core.errors import PunaError
from puna.core.files import fingerprint
from puna.core.stage import get_stage
from puna.run import fingerprints, inputs, machine, processes
from puna.run.execute import check_place, execute, finish_interrupted, follow
from puna.run.lock import locked
from puna.run.recipe import Recipe, StageEntry, load
from puna.run.record import StageRecord
from puna.run.references import INPUT_NAME, Reference, default_names


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
    its parameters, dotted where they are nested. The folder holds the outputs and ``stage.json``. A
    second run is kept out of it, and under ``torchrun`` all processes join in a distributed stage.
    """
    name = get_stage(verb).name.replace("-", "_")
    overrides = {f"{name}.in.{key}": value for key, value in given.items()}
    overrides |= {f"{name}.{key}": value for key, value in (settings or {}).items()}
    bare = {"name": "alone", "title": verb, "stages": {name: {"use": verb}}}
    recipe = load(bare, None, overrides, seed=seed, device=device, dtype=dtype)
    entry = recipe.stages[name]
    final = Path(out)
    where = machine.choose_device(recipe.header.device)
    kind = machine.choose_dtype(recipe.header.dtype, where)
    given_to = partial(inputs.given_to, entry, {})
    with processes.joined(where) as others:
        if not processes.is_first():
            return follow(entry, final, given_to, recipe.header, where, kind, others)
        with locked(final, final.absolute().with_name(f".{final.absolute().name}.lock")):
            ready = partial(others.tell, entry.id, "join") if entry.stage.distributed else None
            record = _lead(recipe, entry, final, where, kind, force=force, ready=ready)
        others.tell(entry.id, "done")
    return record


def _lead(
    recipe: Recipe,
    entry: StageEntry,
    final: Path,
    device: str,
    dtype: str,
    *,
    force: bool,
    ready: Callable[[], None] | None,
) -> StageRecord:
    """Run the stage unless it has been run, as the first process and with the folder for itself."""
    check_place(final)
    finish_interrupted(entry.stage, final)
    prints, _ = inputs.fingerprints_of(entry, {})
    parts = fingerprints.parts_of(entry, prints, seed=recipe.header.seed, device=device, dtype=dtype)
    old = StageRecord.open(final)
    if old is not None and old.fingerprint == fingerprint(parts) and not old.damage() and not force:
        return old
    described = inputs.written_down(entry, prints)
    given = inputs.given_to(entry, {})
    return execute(entry, final, given, parts, described=described, afresh=force, ready=ready)


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


def named(items: Sequence[str]) -> list[str] | dict[str, str]:
    """References from the command line, some of them with a name: ``name=reference``.

    Those without a name get the one they would have in a recipe; without any name it is a list.
    """
    pairs = [_name_and_reference(item) for item in items]
    without = [reference for name, reference in pairs if name is None]
    if len(without) == len(pairs):
        return without
    given = iter(default_names([Reference(text, "path") for text in without]))
    found: dict[str, str] = {}
    for name, reference in pairs:
        label = next(given) if name is None else name
        if label in found:
            raise PunaError(f"two are called {label!r}", where=reference, fix="name them: name=path")
        found[label] = reference
    return found


def _name_and_reference(item: str) -> tuple[str | None, str]:
    name, equals, reference = item.partition("=")
    if not equals or not INPUT_NAME.fullmatch(name) or Path(item).expanduser().exists():
        return None, item
    return name, reference
