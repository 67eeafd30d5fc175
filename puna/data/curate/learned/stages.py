"""Stages that learn models from corpora, with which operators score documents: ``quality_classifier``,
``importance_model`` and ``ngram_model``."""

from __future__ import annotations

from typing import Any

from puna.core.stage import Context, Cost, Input, Outcome, stage
from puna.data.curate.learned.settings import (
    ImportanceParameters,
    NgramParameters,
    QualityClassifierParameters,
)

_TOKENS_PER_SECOND = 30_000  # for plans only


def _learned_cost(parameters: Any, shapes: Any) -> Cost:
    """The texts are read and learned from some times over."""
    times = getattr(parameters, "epochs", 1)
    return Cost(tokens=shapes.tokens, seconds=times * shapes.tokens / _TOKENS_PER_SECOND)


def _drawn(context: Context, side: str, rows: int) -> list[str]:
    """At most so many texts of a side's corpora, drawn by the seed; none where it was not given."""
    from puna.core.seeds import numpy_generator
    from puna.data.corpus import Corpus
    from puna.data.curate.learned.quality_classifier import drawn, texts_of_corpora

    corpora = (Corpus.open(path) for path in (context.inputs.get(side) or {}).values())
    return drawn(texts_of_corpora(corpora), rows, numpy_generator(context.seed, side))


@stage(
    "quality_classifier",
    parameters=QualityClassifierParameters,
    inputs={"wanted": Input("corpus", many=True), "other": Input("corpus", many=True)},
    outputs={"model": "file"},
    plan=_learned_cost,
)
def quality_classifier(context: Context, parameters: QualityClassifierParameters) -> Outcome:
    """Train a fastText classifier that tells wanted texts from others, for ``quality.fasttext``.

    Time grows linearly with the texts; memory holds the texts of both sides and 4 bytes for each bucket
    and dimension.
    """
    from puna.data.corpus import Corpus
    from puna.data.curate.learned.quality_classifier import train

    wanted, other = (
        [Corpus.open(path) for path in context.inputs[side].values()] for side in ("wanted", "other")
    )
    context.out.mkdir(parents=True, exist_ok=True)
    model, metrics = train(wanted, other, parameters, context.out, seed=context.seed)
    path = context.out / "model.safetensors"
    model.save(path)
    return Outcome({"model": path}, metrics)


@stage(
    "importance_model",
    parameters=ImportanceParameters,
    inputs={"target": Input("corpus", many=True), "source": Input("corpus", many=True)},
    outputs={"model": "file"},
    plan=_learned_cost,
)
def importance_model(context: Context, parameters: ImportanceParameters) -> Outcome:
    """Estimate the distributions of words of a target domain and a source, for ``dsir.importance``.

    Time grows linearly with the texts; memory holds those drawn and a count for each bucket.
    """
    from puna.data.curate.learned.importance import ImportanceModel

    target, source = (_drawn(context, side, parameters.rows) for side in ("target", "source"))
    model, metrics = ImportanceModel.measured(target, source, parameters)
    path = context.out / "model.safetensors"
    model.save(path)
    return Outcome({"model": path}, metrics)


@stage(
    "ngram_model",
    parameters=NgramParameters,
    inputs={"reference": Input("corpus", many=True), "other": Input("corpus", many=True, optional=True)},
    outputs={"model": "file"},
    plan=_learned_cost,
)
def ngram_model(context: Context, parameters: NgramParameters) -> Outcome:
    """Estimate an n-gram model of a clean reference, for ``kenlm.perplexity``; tell it from ``other`` text.

    Time grows linearly with the texts; memory holds every different n-gram, some 200 bytes each.
    """
    from puna.data.curate.learned.ngram_model import measured

    context.out.mkdir(parents=True, exist_ok=True)
    path = context.out / "model.arpa"
    reference, other = (_drawn(context, side, parameters.rows) for side in ("reference", "other"))
    metrics = measured(reference, other, parameters, path)
    return Outcome({"model": path}, metrics)
