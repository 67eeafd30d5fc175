"""The stage ``curate``: a pool is made or gone on with, and what passes becomes a corpus."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from puna.core.errors import PunaError, unknown_name
from puna.core.stage import Context, Outcome
from puna.data.curate.account import READ, WRITE, account, corpus_of
from puna.data.curate.curation import Curation, failures
from puna.data.curate.execute import Count
from puna.data.curate.operator import all_operators
from puna.data.curate.pages import WarcSettings
from puna.data.curate.pool import Pool
from puna.data.curate.readers import CorpusSettings
from puna.data.curate.report import report_of
from puna.data.curate.settings import CurateParameters

_TOLD = 3  # gates that are named where nothing is left


def run(context: Context, parameters: CurateParameters) -> Outcome:
    """Do the work of the stage; ``work`` below the stage's folder is what a killed run goes on from."""
    given, earlier = context.inputs.get("corpus"), context.inputs.get("pool")
    sources = list(parameters.sources)
    archive = context.inputs.get("archive")
    if given is not None:
        sources.append(CorpusSettings(path=str(given), name="corpus"))
    if archive is not None:
        sources.append(WarcSettings(path=str(archive), name="archive"))
    if earlier is not None and sources:
        fix = "leave the sources out, or the pool"
        raise PunaError("a pool has its documents already", where="inputs: pool", fix=fix)
    settings = _with_models(parameters.settings, context.inputs.get("models") or {})
    changed = parameters.model_copy(update={"sources": sources, "settings": settings})
    work, place = context.out / "work" / "pool", context.out / "pool"
    pool = Curation(changed, work, Path(earlier) if earlier is not None else None).run()
    counts = account(pool)
    if not counts[WRITE].kept:
        raise _nothing_left(pool, counts)
    corpus = corpus_of(pool, context.out / "corpus", counts, parameters.order)
    metrics = report_of(pool, counts, context.report)
    os.replace(work, place)
    return Outcome({"corpus": corpus.path, "pool": place}, metrics)


def _nothing_left(pool: Pool, counts: Mapping[str, Count]) -> PunaError:
    """The error for sources of which no document is kept: what became of them."""
    lost = {READ: counts[READ].failed} | {
        label: count.dropped for label, count in counts.items() if label != READ
    }
    worst = sorted((label for label in lost if lost[label]), key=lambda label: -lost[label])
    names = {READ: "failed when they were read", WRITE: "were empty at last"}
    told = [f"{lost[label]:,} {names.get(label, f'dropped by {label!r}')}" for label in worst[:_TOLD]]
    failed = failures(pool, pool.shards())
    if failed:
        told.append(f"{len(failed):,} failed in all, the first, {failed[0][0]}: {failed[0][1]}")
    return PunaError(
        "no document is left",
        where=", ".join(str(source.get("path") or source.get("asset")) for source in pool.meta["sources"]),
        found=f"{counts[READ].came:,} came; {'; '.join(told)}",
        fix=f"puna data analyze {pool.path} shows signals and examples",
    )


def _with_models(
    settings: Mapping[str, Mapping[str, Any]], models: Mapping[str, str | Path]
) -> dict[str, dict[str, Any]]:
    """Settings of steps with the files of their models."""
    names = {operator.name.replace(".", "_"): operator.name for operator in all_operators()}
    result = {step: dict(values) for step, values in settings.items()}
    for name, path in models.items():
        if name not in names:
            raise unknown_name("operator", name, names, where="inputs: models")
        result.setdefault(names[name], {})["model"] = str(path)
    return result
