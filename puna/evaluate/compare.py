"""Several models on the same corpora and prompts, one model in memory at a time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from puna.core.errors import PunaError, unknown_name
from puna.core.seeds import numpy_generator
from puna.data.corpus import Corpus
from puna.evaluate import bits_per_byte, fertility, samples, translation
from puna.evaluate.result import Documents, Pairs, Result
from puna.text import pretrained

if TYPE_CHECKING:
    from puna.evaluate.stages import Evaluate
    from puna.model.llama import Llama

Further = Callable[[str, "Llama"], None]
"""What else is measured of a model, given its name."""


def evaluate_models(
    models: Mapping[str, str],
    corpora: Mapping[str, str],
    settings: Evaluate,
    *,
    seed: int = 0,
    dtype: str = "bfloat16",
    device: str = "cpu",
    further: Further | None = None,
) -> Result:
    """Measure every model on every corpus and let each answer the prompts.

    ``models`` and ``corpora`` map the names used in the results to sources (folders, files, assets
    or hub ids) and corpus folders. Corpora of documents give bits per byte and fertility, corpora of
    sentence pairs give translation scores. Which documents are read depends on the corpus's name
    and ``seed``, never on the model. Models are opened one after another and freed. ``further`` is called
    with each of them, and measures corpora of conversations.
    """
    _check_names(models, corpora, settings)
    opened = {name: Corpus.open(path) for name, path in corpora.items()}
    for name in settings.untouched:
        if opened[name].kind != "documents":
            raise PunaError(
                f"corpus {name!r} cannot show what was forgotten",
                where="evaluate, untouched",
                found=f"a corpus of {opened[name].kind}",
                expected="a corpus of documents",
                fix="take it out of untouched; its translation scores are told in any case",
            )
    result = Result(
        models=list(models),
        baseline=settings.baseline or next(iter(models)),
        compare=settings.compare,
        untouched=settings.untouched,
        draws=settings.draws,
        seed=seed,
    )
    _read(opened, settings, result, conversations=further is not None)
    asked = [(label, prompt) for label, prompts in settings.prompts.items() for prompt in prompts]
    result.samples = [
        {"label": label, "prompt": samples.prompt_text(prompt), "outputs": {}} for label, prompt in asked
    ]
    for name, source in models.items():
        model = pretrained.load(source, dtype=dtype, device=device)
        _measure(name, model, settings, [prompt for _, prompt in asked], result)
        if further is not None:
            further(name, model)
        del model
        gc.collect()
    return result


def _read(corpora: Mapping[str, Corpus], settings: Evaluate, result: Result, *, conversations: bool) -> None:
    """Put the rows that are measured into ``result``; ``conversations`` are left to others, or refused."""
    for name, corpus in corpora.items():
        if corpus.kind == "documents":
            result.documents[name] = _documents(name, corpus, settings, result.seed)
        elif corpus.kind == "sentence_pairs":
            result.pairs[name] = _pairs(name, corpus, settings, result.seed)
        elif not (conversations and corpus.kind == "messages"):
            raise PunaError(
                f"a corpus of {corpus.kind} cannot be measured",
                where=corpus.path,
                expected="a corpus of documents (bits per byte) or sentence_pairs (translation)",
                fix="the stage forgetting measures conversations" if corpus.kind == "messages" else None,
            )


def _check_names(models: Mapping[str, str], corpora: Mapping[str, str], settings: Evaluate) -> None:
    if not models:
        raise PunaError("there is no model to evaluate")
    if not corpora and not settings.prompts:
        raise PunaError("there is nothing to evaluate on", fix="give a corpus, or prompts for samples")
    for name in [
        settings.baseline or next(iter(models)),
        *(name for pair in settings.compare for name in pair),
    ]:
        if name not in models:
            raise unknown_name("model", name, models, where="evaluate")
    for name in settings.untouched:
        if name not in corpora:
            raise unknown_name("corpus", name, corpora, where="evaluate, untouched")


def _measure(name: str, model: Llama, settings: Evaluate, asked: Sequence[Any], result: Result) -> None:
    """Everything about one model."""
    for corpus, documents in result.documents.items():
        assert model.tokenizer is not None
        encoded = [model.tokenizer.encode(text) for text in documents.texts]
        result.fertility[corpus, name] = fertility.measure(model.tokenizer, documents.texts, encoded)
        result.bits[corpus, name] = bits_per_byte.measure(
            model,
            documents.texts,
            window=settings.window,
            batch_tokens=settings.batch_tokens,
            encoded=encoded,
            label=f"{name}: bits per byte of {corpus}",
        )
    if asked:
        for sample, text in zip(
            result.samples, samples.sample(model, asked, settings.sample_tokens), strict=True
        ):
            sample["outputs"][name] = text
    for corpus, pairs in result.pairs.items():
        assert settings.translation is not None
        prompts = translation.prompts(pairs.rows, settings.translation.format, chat=settings.translation.chat)
        answers = translation.translate(
            model, prompts, max_tokens=settings.translation.max_tokens, stop=settings.translation.stop
        )
        language = str(pairs.rows[0]["target_language"])
        references = [str(row["target_text"]) for row in pairs.rows]
        result.translations[corpus, name] = translation.score(answers, references, target_language=language)
        pairs.prompts = [samples.prompt_text(prompt) for prompt in prompts]


def _documents(name: str, corpus: Corpus, settings: Evaluate, seed: int) -> Documents:
    """The documents that are measured: drawn by seed up to the limits, then in the corpus's order."""
    rows = drawn(name, corpus, settings.max_documents, seed)
    kept: list[tuple[int, dict[str, Any]]] = []
    size = 0
    for place, row in rows:
        size += len(row["text"].encode())
        if kept and settings.max_bytes is not None and size > settings.max_bytes:
            break
        kept.append((place, row))
    kept.sort(key=lambda item: item[0])
    return Documents([str(row["id"]) for _, row in kept], [row["text"] for _, row in kept], of=corpus.count)


def _pairs(name: str, corpus: Corpus, settings: Evaluate, seed: int) -> Pairs:
    if settings.translation is None:
        raise PunaError(
            f"corpus {name!r} holds sentence pairs, and nothing says how to translate them",
            fix="set `translation` (an empty mapping takes the defaults), or leave the corpus out",
        )
    rows = sorted(drawn(name, corpus, settings.translation.rows, seed), key=lambda item: item[0])
    return Pairs([row for _, row in rows])


def drawn(name: str, corpus: Corpus, limit: int | None, seed: int) -> list[tuple[int, dict[str, Any]]]:
    """At most ``limit`` rows with their places, in a random order that depends on name and seed."""
    if corpus.count == 0:
        raise PunaError("the corpus is empty", where=name)
    order = numpy_generator(seed, "evaluate", name).permutation(corpus.count)[:limit]
    wanted = {int(place): rank for rank, place in enumerate(order)}
    rows = [(place, row) for place, row in enumerate(corpus.rows()) if place in wanted]
    return sorted(rows, key=lambda item: wanted[item[0]])
