"""The work of the stage ``answer_checks`` (S73): labels as text, an adapter beside its merged model.

Labels are judged by what they say, not by how they were made: what is learnt in a packed batch is decoded,
and has to be what the assistant says in these conversations, turn by turn, each with its end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from puna.core.errors import PunaError
from puna.core.stage import Context, Outcome
from puna.data.corpus import Corpus
from puna.model.probe import difference, probe
from puna.text import pretrained
from puna.text.encode import encode_rows
from puna.text.packing import IGNORED, Row, collate, pack
from puna.text.template import Template, template_for
from puna.text.tokenizer import Tokenizer
from puna.train.answer_stages import AnswerChecks


@dataclass
class _Counts:
    """Answers that were looked at, those learnt word for word, and tokens learnt outside of any."""

    answers: int = 0
    learnt: int = 0
    later: int = 0
    later_learnt: int = 0
    outside: int = 0
    targets: int = 0


def run(context: Context, parameters: AnswerChecks) -> Outcome:
    """Compare both models, then read the labels of the corpus back."""
    adapted = pretrained.load(context.inputs["adapter"], dtype="float32")
    if adapted.adapter is None:
        raise PunaError("not an adapter", where=context.inputs["adapter"], expected="a PEFT adapter's folder")
    if adapted.tokenizer is None:
        raise PunaError("the model has no tokenizer", where=adapted.source)
    template = adapted.template or template_for(adapted.tokenizer)
    tokenizer, before = cast(Tokenizer, adapted.tokenizer), probe(adapted)
    del adapted  # two models at a time would be twice the memory
    merged = pretrained.load_merged(context.inputs["model"], dtype="float32")
    figures = {"merged_difference": difference(before, probe(merged))}
    counts = labels_of(Path(context.inputs["corpus"]), tokenizer, template, parameters)
    return Outcome(
        metrics=figures
        | {
            "answers": float(counts.answers),
            "answers_learnt": counts.learnt / counts.answers,
            "later_answers": float(counts.later),
            "later_answers_learnt": counts.later_learnt / counts.later if counts.later else 0.0,
            "outside": float(counts.outside),
            "targets": float(counts.targets),
        }
    )


def labels_of(corpus: Path, tokenizer: Tokenizer, template: Template, parameters: AnswerChecks) -> _Counts:
    """Conversations packed as training packs them, and what their labels say."""
    opened = Corpus.open(corpus, kind="messages")
    rows = [row for _, row in zip(range(parameters.conversations), opened.rows(), strict=False)]
    packed = pack(encode_rows(rows, "messages", tokenizer, template), parameters.max_length, mode="fit")
    by_id = {str(row["id"]): row for row in rows}
    counts = _Counts()
    for row in packed:
        _count(row, by_id, tokenizer, counts)
    if not counts.answers:
        raise PunaError("no conversation fits the length", where="max_length", found=parameters.max_length)
    return counts


def _count(row: Row, by_id: Mapping[str, Mapping[str, Any]], tokenizer: Tokenizer, counts: _Counts) -> None:
    """Compare what a packed row learns with what its conversations' assistants say."""
    labels = collate([row]).labels[0]
    counts.targets += int((labels != IGNORED).sum())
    start = 0
    for piece in row.slices:
        said = [
            message["content"].strip()
            for message in by_id[piece.document.source]["messages"]
            if message["role"] == "assistant"
        ]
        runs = _runs(labels[start : start + len(piece)])
        start += len(piece)
        texts = [tokenizer.decode(run).strip() for run in runs]
        ended = [not tokenizer.special_ids.isdisjoint(run) for run in runs]
        right = [
            place < len(texts) and texts[place] == answer and ended[place]
            for place, answer in enumerate(said)
        ]
        counts.answers += len(said)
        counts.learnt += sum(right)
        counts.later += max(0, len(said) - 1)
        counts.later_learnt += sum(right[1:])
        counts.outside += sum(
            len(run) for place, run in enumerate(runs) if place >= len(said) or not right[place]
        )


def _runs(labels: torch.Tensor) -> list[list[int]]:
    """The unbroken runs of learnt ids."""
    runs: list[list[int]] = []
    before = False
    for label in labels.tolist():
        learnt = label != IGNORED
        if learnt:
            if not before:
                runs.append([])
            runs[-1].append(label)
        before = learnt
    return runs
