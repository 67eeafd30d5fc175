"""A model's own answers to the conversations of a corpus."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from puna.core.errors import PunaError
from puna.core.seeds import derive, numpy_generator
from puna.core.stage import Context, Outcome
from puna.data.corpus import Corpus, write_corpus
from puna.data.ledger import Ledger
from puna.decode.engine import Completion, Engine
from puna.decode.sampling import Sampling
from puna.text import pretrained

if TYPE_CHECKING:
    from puna.decode.draft_stages import Respond


def open_messages(corpus: Corpus, rows: int | None = None) -> list[dict[str, Any]]:
    """The first ``rows`` conversations of a corpus of messages, or all; another kind is an error."""
    if corpus.kind != "messages":
        raise PunaError(
            "a corpus of messages is needed here", where=corpus.path, found=f"a corpus of {corpus.kind}"
        )
    return list(itertools.islice(corpus.rows(), rows))


def questions(corpus: Corpus, *, skip: int, rows: int | None, seed: int) -> list[dict[str, Any]]:
    """Conversations in an order drawn by ``seed``, each question once: ``rows`` behind the first ``skip``.

    Whoever draws with the same seed has the same order, so that parts that do not overlap are of
    different questions.
    """
    found: dict[str, dict[str, Any]] = {}
    every = open_messages(corpus)
    for place in numpy_generator(seed, "questions").permutation(len(every)):
        row = every[int(place)]
        if asked(row):
            found.setdefault(" ".join(asked(row)[-1]["content"].casefold().split()), row)
    chosen = list(itertools.islice(found.values(), skip, None if rows is None else skip + rows))
    if not chosen:
        raise PunaError(
            "no question is left", where=corpus.path, found=f"{len(found)} questions, {skip} of them skipped"
        )
    return chosen


def asked(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """The conversation up to where the assistant is to answer: without a last turn of its own."""
    messages = [dict(message) for message in row["messages"]]
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def respond(context: Context, parameters: Respond) -> Outcome:
    """The stage: answers of the model in ``model``; conversations it has no word for are dropped."""
    model = pretrained.load(context.inputs["model"], dtype=context.dtype, device=context.device)
    source = Corpus.open(context.inputs["corpus"])
    rows = questions(source, skip=parameters.skip, rows=parameters.rows, seed=context.seed)
    engine = Engine(model, quantize=parameters.quantize, kernels=parameters.kernels)
    sampling = Sampling(
        max_tokens=parameters.max_tokens,
        temperature=parameters.temperature,
        top_k=parameters.top_k,
        top_p=parameters.top_p,
        seed=derive(context.seed, context.name),
    )
    found = engine.generate([asked(row) for row in rows], sampling)
    ledger = Ledger()
    about = {"source": str(model.source), "licence": "that of the model"}
    answered = _answered(rows, found, ledger)
    count = parameters.answers_per_document
    made = write_corpus(
        context.out / "corpus",
        "messages" if count is None else "documents",
        answered if count is None else _strung(answered, count, ledger),
        provenance=[*source.meta["provenance"], about],
        ledger=ledger,
    )
    tokens = sum(len(completion.ids) for completion in found)
    ended = sum(completion.finish_reason == "stop" for completion in found)
    context.report.setdefault("samples", []).extend(
        {"prompt": asked(row)[-1]["content"], "outputs": {"answer": completion.text}}
        for row, completion in zip(rows[:5], found[:5], strict=True)
    )
    return Outcome(
        {"corpus": made.path},
        {
            "rows": float(made.count),
            "dropped": float(ledger.dropped().total()),
            "tokens": float(tokens),
            "ended": ended / len(found),
        },
    )


def _answered(
    rows: Sequence[Mapping[str, Any]], found: Sequence[Completion], ledger: Ledger
) -> Iterator[dict[str, Any]]:
    tally = ledger.step("answers", "rows")
    for row, completion in zip(rows, found, strict=True):
        text = completion.text.strip()
        if not text:
            tally.drop("nothing was said")
            continue
        tally.keep()
        yield {**row, "messages": [*asked(row), {"role": "assistant", "content": text}]}


def _strung(rows: Iterator[dict[str, Any]], count: int, ledger: Ledger) -> Iterator[dict[str, Any]]:
    """Documents of up to ``count`` answers each, a blank between two; nothing tells where one ends."""
    tally = ledger.step("documents", "documents")
    while part := list(itertools.islice(rows, count)):
        text = " ".join(row["messages"][-1]["content"] for row in part)
        tally.keep()
        first = part[0]
        yield {"id": first["id"], "text": text, "source": first["source"], "language": first["language"]}
