"""The stage ``curate``: a pool is made or gone on with, and what passes becomes a corpus."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from puna.core.errors import PunaError, unknown_name
from puna.core.stage import Context, Outcome
from puna.data.curate.account import account, corpus_of
from puna.data.curate.curation import Curation
from puna.data.curate.operator import all_operators
from puna.data.curate.pages import WarcSettings
from puna.data.curate.readers import CorpusSettings
from puna.data.curate.report import report_of
from puna.data.curate.settings import CurateParameters


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
    corpus = corpus_of(pool, context.out / "corpus", counts, parameters.order)
    metrics = report_of(pool, counts, context.report)
    os.replace(work, place)
    return Outcome({"corpus": corpus.path, "pool": place}, metrics)


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
