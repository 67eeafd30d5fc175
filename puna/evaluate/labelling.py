"""What a labeller says of a corpus, and what a language model says that was never trained to label.

System S14 compares with prompting: the zero-shot baseline scores each label's words as the assistant's answer
(:mod:`puna.evaluate.choices`), with the same prompt for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from puna.core.errors import PunaError
from puna.core.seeds import numpy_generator
from puna.data.corpus import Corpus
from puna.data.kinds import Kind
from puna.data.kinds import labels_of as labels_of_row
from puna.evaluate.label_scores import UNSAID, Scores, majority, score
from puna.model.labels import label_logits, labels_of
from puna.text import pretrained
from puna.text.encode import IGNORED
from puna.text.labelled import encode_labelled
from puna.text.packing import Row, Slice, collate

if TYPE_CHECKING:
    from puna.evaluate.labelling_stages import LabelScores, ZeroShot
    from puna.model.llama import Llama


@dataclass(frozen=True)
class Labelled:
    """Rows of a corpus and their true labels; a text has one."""

    kind: Kind
    rows: list[dict[str, Any]]

    @classmethod
    def read(cls, path: Path | str, most: int | None = None, *, seed: int = 0) -> Labelled:
        """All rows of a labelled corpus, or ``most`` of them, drawn by ``seed``."""
        corpus = Corpus.open(path)
        if not corpus.labels:
            raise PunaError("the corpus has no labels", where=path)
        rows = list(corpus.rows())
        if most is not None and most < len(rows):
            drawn = numpy_generator(seed, "labelled rows").permutation(len(rows))[:most]
            rows = [rows[number] for number in sorted(drawn.tolist())]
        return cls(corpus.kind, rows)

    @property
    def true(self) -> list[list[str]]:
        """The labels of each row."""
        return [labels_of_row(self.kind, row) for row in self.rows]


@torch.no_grad()
def predictions(
    model: Llama, labelled: Labelled, *, max_length: int = 512, batch_tokens: int = 2048
) -> list[list[str]]:
    """The likeliest label of each text, or of each word: [rows] of labels as in :attr:`Labelled.true`.

    Of a row beyond ``max_length`` tokens the rest is not read: a word whose first token lies there gets
    :data:`UNSAID`. The model is left in evaluation mode. Rows of like length share a pass; which ones does
    not matter, since none sees another.
    """
    kind = labels_of(model)
    if (kind.per == "word") != (labelled.kind == "labelled_words"):
        raise PunaError(
            "the model labels something else than the corpus",
            where=model.source,
            found=f"labels of {kind.per}s, rows of {labelled.kind}",
        )
    model.eval()
    encoded = encode_labelled(labelled.rows, labelled.kind, model.tokenizer, kind.names)  # type: ignore[arg-type]
    said: list[list[str]] = [[UNSAID] * len(labels) for labels in labelled.true]
    order = sorted(range(len(encoded)), key=lambda number: -len(encoded[number]))
    start = 0
    while start < len(order):
        longest = min(len(encoded[order[start]]), max_length)
        part = order[start : start + max(1, batch_tokens // longest)]
        rows = [Row((Slice(encoded[n], 0, min(len(encoded[n]), max_length)),)) for n in part]
        batch = collate(rows).to(model.device)
        logits = label_logits(model, batch.input_ids, batch.positions, batch.segments)
        best = logits.argmax(-1).cpu()  # [rows] of texts, [rows, time] of words
        for place, number in enumerate(part):
            if kind.per == "text":
                said[number] = [kind.names[int(best[place])]]
                continue
            found = best[place][batch.labels[place].cpu() != IGNORED].tolist()
            said[number][: len(found)] = [kind.names[label] for label in found]
        start += len(part)
    return said


def zero_shot(source: str | Path, labelled: Labelled, settings: ZeroShot, *, dtype: str) -> list[list[str]]:
    """The likeliest label of each text under a language model, its words taken as the answer."""
    from puna.decode.engine import Engine
    from puna.evaluate.choices import Slot
    from puna.evaluate.choices import score as score_choices

    if labelled.kind != "labelled_texts":
        raise PunaError("zero-shot labels are those of texts", where="zero_shot", found=labelled.kind)
    names = sorted({label for labels in labelled.true for label in labels})
    words = tuple(settings.words.get(name, name) for name in names)
    engine = Engine(pretrained.load_merged(source, dtype=dtype))
    prompts: list[Any] = [
        [{"role": "user", "content": settings.ask.replace("{text}", row["text"])}] for row in labelled.rows
    ]
    scored = score_choices(engine, prompts, [[Slot("", words)] for _ in prompts])
    return [[names[method.said[0]]] for _, method in scored]


def measure(
    inputs: Mapping[str, Any], parameters: LabelScores, *, seed: int, dtype: str
) -> dict[str, Scores]:
    """Scores by who said the labels: each model, "majority", and "zero_shot" with a language model."""
    labelled = Labelled.read(inputs["corpus"], parameters.rows, seed=seed)
    found: dict[str, Scores] = {}
    for name, path in inputs["models"].items():
        model = pretrained.load(path, dtype=dtype)
        said = predictions(model, labelled, max_length=parameters.max_length)
        found[name] = score(said, labelled.true)
    if inputs.get("train") is not None:
        seen = Corpus.open(inputs["train"]).meta["labels"]
        found["majority"] = score(majority(labelled.true, seen), labelled.true)
    if inputs.get("language_model") is not None:
        if parameters.zero_shot is None:
            raise PunaError("how shall the language model be asked?", where="zero_shot", fix="zero_shot: {}")
        least = Labelled(labelled.kind, labelled.rows[: parameters.zero_shot.rows])
        said = zero_shot(inputs["language_model"], least, parameters.zero_shot, dtype=dtype)
        found["zero_shot"] = score(said, least.true)
    return found


def table(scores: Mapping[str, Scores], title: str) -> dict[str, Any]:
    """For the report: a row for each."""
    with_entities = any(each.entity_f1 is not None for each in scores.values())
    columns = ["who", "accuracy", "macro F1", *(["entity F1"] if with_entities else [])]
    rows: list[list[str]] = []
    for name, each in scores.items():
        figures: Sequence[float | None] = [
            each.accuracy,
            each.macro_f1,
            *([each.entity_f1] if with_entities else []),
        ]
        rows.append([name, *("-" if figure is None else f"{figure:.3f}" for figure in figures)])
    return {"title": title, "columns": columns, "rows": rows}
