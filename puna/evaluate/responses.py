"""What a model makes of conversations: the loss of their answers, and its choice among given ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy

from puna.core.errors import PunaError
from puna.data.corpus import Corpus
from puna.evaluate.bits_per_byte import sum_nats, windows_of
from puna.evaluate.choices import Slot, score
from puna.evaluate.statistics import Floats
from puna.model.labels import require_words
from puna.text.encode import IGNORED, encode_rows

if TYPE_CHECKING:
    from puna.model.llama import Llama


@dataclass(frozen=True)
class ResponseLoss:
    """Nats and tokens of what the assistant says in each conversation, float64 ``[conversations]``."""

    nats: Floats
    tokens: Floats


def measure(
    model: Llama, rows: Sequence[Mapping[str, Any]], *, window: int, batch_tokens: int, label: str
) -> ResponseLoss:
    """The loss of the assistant's messages, end-of-turn tokens included, each given all that stands before.

    A conversation is written by the model's own template. One longer than ``window``, bounded by the
    model's context, is read in windows that overlap by half.
    """
    if model.tokenizer is None:
        raise PunaError("the model has no tokenizer", where=model.source)
    require_words(model, "the loss of answers")
    window = min(window, model.spec.max_positions)
    encoded = encode_rows(rows, "messages", model.tokenizer, model.template)
    windows = [
        piece
        for place, row in enumerate(encoded)
        for piece in windows_of(
            place,
            row.ids,
            window,
            max(window // 2, 1),
            [token if learnt else IGNORED for token, learnt in zip(row.ids, row.trained, strict=True)],
        )
        if any(target != IGNORED for target in piece.targets)
    ]
    return ResponseLoss(
        nats=sum_nats(model, windows, len(rows), batch_tokens, label),
        tokens=numpy.array([row.targets for row in encoded], dtype=numpy.float64),
    )


@dataclass(frozen=True)
class Task:
    """Conversations whose last message is one of ``choices``; ``gold`` says which."""

    choices: tuple[str, ...]
    gold: tuple[int, ...]


def task_of(name: str, corpus: Corpus, rows: Sequence[Mapping[str, Any]], choices: Sequence[str]) -> Task:
    """The task of some rows of a corpus; without ``choices`` they are the last messages that it has."""

    def answer(row: Mapping[str, Any]) -> str:
        last = row["messages"][-1]
        if last["role"] != "assistant" or len(row["messages"]) < 2:
            raise PunaError(
                "a task's conversation needs a question and the assistant's answer",
                where=f"{name}, row {row['id']}",
                found=f"a last message of the {last['role']}",
            )
        return str(last["content"])

    where = f"tasks.{name}"
    known = tuple(choices) or tuple(sorted({answer(row) for row in corpus.rows()}))
    if len(set(known)) != len(known) or len(known) < 2:
        raise PunaError("a task needs two or more different choices", where=where, found=list(known))
    gold = []
    for row in rows:
        if answer(row) not in known:
            raise PunaError(
                "an answer is none of the choices",
                where=f"{name}, row {row['id']}",
                found=answer(row),
                expected=", ".join(known[:10]),
                fix=f"add it to {where}, or leave the row out",
            )
        gold.append(known.index(answer(row)))
    return Task(known, tuple(gold))


def choose(model: Llama, rows: Sequence[Mapping[str, Any]], task: Task) -> list[int]:
    """The likeliest choice of each conversation's last message, whole choices being scored."""
    from puna.decode.engine import Engine

    if model.template is None:
        raise PunaError("a task needs a chat template", where=model.source, fix="use a model that has one")
    prompts: list[Any] = [list(row["messages"][:-1]) for row in rows]
    scored = score(Engine(model), prompts, [[Slot("", task.choices)] for _ in rows])
    return [method.said[0] for _, method in scored]
