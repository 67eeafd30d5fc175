"""The stage ``curate``: a pool is made or gone on with, and what passes becomes a corpus."""

from __future__ import annotations

import os
from pathlib import Path

from puna.core.errors import PunaError
from puna.core.stage import Context, Outcome
from puna.data.curate.account import account, corpus_of
from puna.data.curate.curation import Curation
from puna.data.curate.readers import CorpusSettings
from puna.data.curate.report import report_of
from puna.data.curate.settings import CurateParameters


def run(context: Context, parameters: CurateParameters) -> Outcome:
    """Do the work of the stage; ``work`` below the stage's folder is what a killed run goes on from."""
    given, earlier = context.inputs.get("corpus"), context.inputs.get("pool")
    sources = list(parameters.sources)
    if given is not None:
        sources.append(CorpusSettings(path=str(given), name="corpus"))
    if earlier is not None and sources:
        fix = "leave the sources out, or the pool"
        raise PunaError("a pool has its documents already", where="inputs: pool", fix=fix)
    changed = parameters.model_copy(update={"sources": sources})
    work, place = context.out / "work" / "pool", context.out / "pool"
    pool = Curation(changed, work, Path(earlier) if earlier is not None else None).run()
    counts = account(pool)
    corpus = corpus_of(pool, context.out / "corpus", counts, parameters.order)
    metrics = report_of(pool, counts, context.report)
    os.replace(work, place)
    return Outcome({"corpus": corpus.path, "pool": place}, metrics)
