"""Proving a recipe: run it at demo scale, with further seeds where a claim asks for them, and judge."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from puna.run import claims, processes
from puna.run.claims import Judgement
from puna.run.lock import locked
from puna.run.recipe import Recipe, load
from puna.run.record import Metrics, Run
from puna.run.runner import Runner, default_folder, write_cards_and_report

LOCK = ".proof.lock"
"""In a run's folder: held for the length of a proof, further seeds included."""


def prove(
    recipe: str | Path,
    out: str | Path | None = None,
    *,
    seeds: int | None = None,
    set: Mapping[str, Any] | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> tuple[list[Judgement], Path]:
    """Run ``recipe`` at demo scale, resuming what is there, and judge its claims.

    Claims with ``seeds`` are judged on the mean of that many runs; ``seeds`` overrides how many.
    A further seed runs only the stages that those claims draw on, in ``<folder>-seed<n>``. One process at
    a time proves in a folder; another gets a :class:`~puna.run.lock.BusyError`. Returns
    the judgements and the run's folder, which holds claims.json and a report that shows them.
    """
    first = load(recipe, None, set, device=device, dtype=dtype)
    folder = default_folder(recipe, first, out)
    with locked(folder, folder / LOCK) if processes.is_first() else contextlib.nullcontext():
        runs: dict[int, Mapping[str, Metrics]] = {first.header.seed: Runner(first, folder).run().metrics}
        for seed, needed in _further_seeds(first, seeds).items():
            again = load(recipe, None, set, seed=seed, device=device, dtype=dtype)
            place = folder.with_name(f"{folder.name}-seed{seed}")
            runs[seed] = Runner(again, place, only=needed).run().metrics
        judgements = claims.judge(first, runs, seeds)
        if processes.is_first():
            claims.write(judgements, first, folder)
            write_cards_and_report(Run.open(folder))
    return judgements, folder


def _further_seeds(recipe: Recipe, seeds: int | None) -> dict[int, list[str]]:
    """Seeds besides the first, each with the stages that the claims it is for draw on."""
    wanted: dict[int, list[str]] = {}
    for claim in recipe.header.claims:
        count = claim.seeds if claim.seeds == 1 or seeds is None else seeds
        for offset in range(1, count):
            stages = wanted.setdefault(recipe.header.seed + offset, [])
            stages += [stage for stage in recipe.claims[claim.name].stages if stage not in stages]
    return dict(sorted(wanted.items()))
