"""From corpora to packed rows: encoded, told apart by source, capped, sorted, packed."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy

from puna.core.errors import PunaError
from puna.core.files import fingerprint
from puna.core.seeds import derive
from puna.core.stage import Context
from puna.data.caps import capped
from puna.data.corpus import Corpus
from puna.text.encode import Encoded, encode_rows
from puna.text.packing import Mode, group_of, usual_mode
from puna.text.tokenizer import Tokenizer
from puna.train.curriculum import document_losses, in_order, keys_of_rows, store, stored
from puna.train.distributed import World
from puna.train.loop import measuring
from puna.train.mixture import Limits, MixedRows, check_names
from puna.train.objectives import OBJECTIVES
from puna.train.sources import Document, Sources, pack_sources
from puna.train.stages import Train

if TYPE_CHECKING:
    from puna.model.llama import Llama


def sources_of(
    model: Llama,
    context: Context,
    parameters: Train,
    *,
    seed: int,
    recipe: Mapping[str, Any],
    here: World,
) -> tuple[Sources, dict[str, Any]]:
    """All training corpora, encoded, capped, sorted and packed; and the recipe with the order in it.

    Without a mixture they are one source, packed together in the order they are given.
    """
    recipe = dict(recipe)
    brought = _documents(model, context.inputs["corpus"], parameters)
    kept = brought
    if parameters.mixture is not None:
        check_names(parameters.mixture, tuple(brought))
        kept = {
            name: capped(documents, parameters.mixture.caps.get(name), seed=derive(seed, name))
            for name, documents in brought.items()
        }
    if parameters.order == "sorted":
        keys = _sort_keys(model, kept, context.out, parameters, fingerprint(recipe), here)
        recipe["sorted"] = fingerprint(keys)
        of_document = {
            id(document.encoded): key
            for name, documents in kept.items()
            for document, key in zip(documents, keys[name], strict=True)
        }
        kept = {
            name: [documents[place] for place in in_order(keys[name], descending=parameters.descending)]
            for name, documents in kept.items()
        }
    group = group_of(OBJECTIVES[parameters.objective].kind)
    mode = packing_of(parameters)
    packed = pack_sources(brought, kept, parameters.max_length, mode=mode, group=group)
    if parameters.order == "sorted":
        packed = dataclasses.replace(packed, keys=keys_of_rows(packed.rows, of_document))
    return packed, recipe


def _documents(model: Llama, paths: Mapping[str, Path], parameters: Train) -> dict[str, list[Document]]:
    """The rows of the corpora by source: by corpus, by the rows' own column, or all together."""
    kind = OBJECTIVES[parameters.objective].kind
    found: dict[str, list[Document]] = {}
    for name, path in paths.items():
        corpus = Corpus.open(path)
        if corpus.kind != kind:
            raise PunaError(
                f"objective {parameters.objective!r} learns from a corpus of {kind}",
                where=path,
                found=f"a corpus of {corpus.kind}",
                fix=f"use objective {', '.join(n for n, o in OBJECTIVES.items() if o.kind == corpus.kind)!r}"
                if any(o.kind == corpus.kind for o in OBJECTIVES.values())
                else "convert the corpus",
            )
        tasks: list[str] = []
        rows = encode(model, corpus, parameters, _noting(corpus, tasks))
        each = itertools.chain.from_iterable(itertools.repeat(task, group_of(kind)) for task in tasks)
        for encoded, task in zip(rows, each, strict=True):
            by_row = parameters.mixture is not None and parameters.mixture.by == "source"
            source = task if by_row else name if parameters.mixture is not None else "all"
            found.setdefault(source, []).append(Document(encoded, task))
    return found


def _noting(corpus: Corpus, tasks: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of a corpus; what their column ``source`` says is added to ``tasks``."""
    for row in corpus.rows():
        tasks.append(row["source"])
        yield row


def _sort_keys(
    model: Llama,
    sources: Mapping[str, list[Document]],
    out: Path,
    parameters: Train,
    recipe: str,
    here: World,
) -> dict[str, list[float]]:
    """What the documents of each source are sorted by: lengths in tokens, or losses of the model as it is."""
    if parameters.sort_by == "length":
        return {name: [float(len(d.encoded)) for d in documents] for name, documents in sources.items()}
    losses = stored(out, recipe)
    here.wait()  # all have looked before the first process writes
    if losses is None:
        with measuring(model, here.device):
            losses = {
                name: document_losses(
                    model,
                    [document.encoded for document in documents],
                    parameters.max_length,
                    mode=packing_of(parameters),
                    micro_batch_tokens=parameters.micro_batch_tokens,
                    world=here,
                )
                for name, documents in sources.items()
            }
        if here.is_main:
            store(out, recipe, losses)
    return losses


def mixed_rows(sources: Sources, parameters: Train, seed: int) -> MixedRows | None:
    """What draws the rows, where the mixture weighs its sources; else every epoch takes all rows."""
    if parameters.mixture is None or not parameters.mixture.weighs:
        return None
    return MixedRows(
        parameters.mixture,
        sources.names,
        sources.of,
        numpy.array([row.tokens for row in sources.rows], dtype=numpy.int64),
        limits=Limits(parameters.epochs, parameters.max_steps, parameters.max_tokens),
        batch_tokens=parameters.batch_tokens,
        seed=seed,
        shuffled=parameters.order == "shuffled",
    )


def packing_of(parameters: Train) -> Mode:
    """How the rows of the run are packed."""
    return parameters.packing or usual_mode(OBJECTIVES[parameters.objective].kind)


def encode(model: Llama, corpus: Corpus, parameters: Train, rows: Any = None) -> list[Encoded]:
    """The rows of a corpus (all, unless some are given) as the objective's model reads them."""
    return encode_rows(
        corpus.rows() if rows is None else rows,
        corpus.kind,
        cast(Tokenizer, model.tokenizer),
        model.template,
        train_on=parameters.train_on,
        last_only=parameters.last_turn_only,
        markers=parameters.markers if corpus.kind == "documents" else (),
    )
